"""A transformer from features of an image to queries, as in DETR (Carion et al., arXiv 2005.12872).

Positions are added to queries and keys in every layer, and not to values; norms follow the sums. Every
projection is a layer of its own, every product a function, so that each can be quantized. There is no
dropout: the networks are evaluated only.
"""

import math

import torch
from torch import Tensor, nn

_TEMPERATURE = 10000.0
_EPSILON = 1e-6


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """[height · width, channels]: half of the channels tell the row of a place, the others its column.

    Row i = 1 … height counts as the angle a = 2π i / (height + 1e-6), columns likewise; channel c of C is
    the sine (c even) or cosine (c odd) of a / 10000^(2 (c // 2) / C).
    """
    half = channels // 2
    rows, columns = _waves(height, half), _waves(width, half)
    shape = (height, width, half)
    return torch.cat([rows[:, None].expand(shape), columns.expand(shape)], dim=-1).flatten(0, 1)


def _waves(count: int, channels: int) -> Tensor:
    """[count, channels]: sines and cosines in turn."""
    angle = torch.arange(1, count + 1, dtype=torch.float32) / (count + _EPSILON) * (2 * math.pi)
    power = torch.arange(0, channels, 2, dtype=torch.float32) / channels
    turned = angle[:, None] / _TEMPERATURE**power
    return torch.stack([turned.sin(), turned.cos()], dim=-1).flatten(1)


class Attention(nn.Module):
    """Attention of several heads: layers `query`, `key`, `value` and `output`."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, queries, channels]; key, value [n, keys, channels] → [n, queries, channels]."""
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * self.scale, dim=-1)
        return self.output(torch.matmul(weights, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[n, tokens, channels] → [n, heads, tokens, channels / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention, then two linear layers, each with a shortcut and a norm behind the sum."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, feedforward)
        self.act = nn.ReLU()
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [n, tokens, channels], positions [tokens, channels] → [n, tokens, channels]."""
        placed = x + positions
        x = self.norm1(x + self.self_attn(placed, placed, x))
        return self.norm2(x + self.linear2(self.act(self.linear1(x))))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the features, then two linear layers."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.multihead_attn = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, feedforward)
        self.act = nn.ReLU()
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """x, queries [n, queries, channels]; memory [n, tokens, channels]; positions [tokens, channels]
        → [n, queries, channels]."""
        placed = x + queries
        x = self.norm1(x + self.self_attn(placed, placed, x))
        x = self.norm2(x + self.multihead_attn(x + queries, memory + positions, memory))
        return self.norm3(x + self.linear2(self.act(self.linear1(x))))


class Transformer(nn.Module):
    """Encoder layers over the features, decoder layers over the queries, and a norm."""

    def __init__(self, channels: int, heads: int, feedforward: int, depth: int) -> None:
        """Args:
        channels: of features and queries; heads: of attention; feedforward: between the linear layers.
        depth: number of encoder layers, and of decoder layers.
        """
        super().__init__()
        sizes = (channels, heads, feedforward)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(depth))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """features [n, channels, h, w], queries [queries, channels] → [n, queries, channels]."""
        positions = sine_positions(features.shape[2], features.shape[3], features.shape[1])
        positions = positions.to(features)
        memory = features.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            memory = layer(memory, positions)
        queries = queries.expand(len(features), -1, -1)
        x = torch.zeros_like(queries)
        for layer in self.decoder:
            x = layer(x, queries, memory, positions)
        return self.norm(x)
