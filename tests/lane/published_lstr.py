"""LSTR as published, from a checkpoint's tensors alone: names, shapes, and what they compute.

Written with PyTorch's own functions and attention module, apart from the network under test.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)
DEPTHS = (1, 2, 2, 2)
CHANNELS, HEADS, FEEDFORWARD, QUERIES = 32, 2, 128, 7


def random_state(classes: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes of a published checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in _shapes(classes).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 16
        strong = ("query_embed", "input_proj", "in_proj_weight", "out_proj.weight")
        gain = 4 if any(part in name for part in strong) else 1  # so that queries differ
        tensor = torch.randn(shape, generator=generator) * gain / math.sqrt(fan_in)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            tensor = tensor.abs() + 0.5
        state[f"module.{name}"] = tensor
    return state


def with_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with what a profiler and batch norms leave in a checkpoint."""
    extra = {"total_ops": torch.zeros(1), "module.layer1.total_params": torch.zeros(1)}
    extra["module.layer1.0.bn1.num_batches_tracked"] = torch.tensor(7)
    return state | extra


def _shapes(classes: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 7, 7)}
    _norm(shapes, "bn1", 16)
    inputs = 16
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
        for block in range(depth):
            place = f"layer{stage}.{block}"
            shapes[f"{place}.conv1.weight"] = (width, inputs, 3, 3)
            _norm(shapes, f"{place}.bn1", width)
            shapes[f"{place}.conv2.weight"] = (width, width, 3, 3)
            _norm(shapes, f"{place}.bn2", width)
            if inputs != width:
                shapes[f"{place}.downsample.0.weight"] = (width, inputs, 1, 1)
                _norm(shapes, f"{place}.downsample.1", width)
            inputs = width
    shapes["query_embed.weight"] = (QUERIES, CHANNELS)
    shapes |= {"input_proj.weight": (CHANNELS, 128, 1, 1), "input_proj.bias": (CHANNELS,)}
    for kind, attentions in (("encoder", 1), ("decoder", 2)):
        for index in range(2):
            place = f"transformer.{kind}.layers.{index}"
            for attention in ("self_attn", "multihead_attn")[:attentions]:
                shapes[f"{place}.{attention}.in_proj_weight"] = (3 * CHANNELS, CHANNELS)
                shapes[f"{place}.{attention}.in_proj_bias"] = (3 * CHANNELS,)
                _linear(shapes, f"{place}.{attention}.out_proj", CHANNELS, CHANNELS)
            _linear(shapes, f"{place}.linear1", CHANNELS, FEEDFORWARD)
            _linear(shapes, f"{place}.linear2", FEEDFORWARD, CHANNELS)
            for norm in range(1, attentions + 2):
                shapes |= {f"{place}.norm{norm}.{kind_}": (CHANNELS,) for kind_ in ("weight", "bias")}
    shapes |= {f"transformer.decoder.norm.{kind}": (CHANNELS,) for kind in ("weight", "bias")}
    _linear(shapes, "class_embed", CHANNELS, classes)
    for head in ("specific_embed", "shared_embed"):
        for layer, outputs in enumerate((CHANNELS, CHANNELS, 4)):
            _linear(shapes, f"{head}.layers.{layer}", CHANNELS, outputs)
    return shapes


def _norm(shapes: dict[str, tuple[int, ...]], place: str, channels: int) -> None:
    for kind in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{place}.{kind}"] = (channels,)


def _linear(shapes: dict[str, tuple[int, ...]], place: str, inputs: int, outputs: int) -> None:
    shapes |= {f"{place}.weight": (outputs, inputs), f"{place}.bias": (outputs,)}


@torch.no_grad()
def published(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, queries, classes] and curves [n, queries, 8]: two bounds, four shared parameters and two
    of the lane's own."""
    s = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    x = F.relu(_batch_norm(s, "bn1", F.conv2d(images, s["conv1.weight"], stride=2, padding=3)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, depth in enumerate(DEPTHS, 1):
        for block in range(depth):
            x = _block(s, f"layer{stage}.{block}", x, stride=2 if stage > 1 and block == 0 else 1)
    features = F.conv2d(x, s["input_proj.weight"], s["input_proj.bias"])
    n, _, height, width = features.shape
    memory = features.flatten(2).permute(2, 0, 1)
    places = [(row, column) for row in range(1, height + 1) for column in range(1, width + 1)]
    positions = torch.tensor([wave(r, height, 16) + wave(c, width, 16) for r, c in places])[:, None]
    for index in range(2):
        layer = f"transformer.encoder.layers.{index}"
        placed = memory + positions
        memory = _norm1(
            s, f"{layer}.norm1", memory + _attend(s, f"{layer}.self_attn", placed, placed, memory)
        )
        memory = _norm1(s, f"{layer}.norm2", memory + _feedforward(s, layer, memory))
    queries = s["query_embed.weight"][:, None].repeat(1, n, 1)
    x = torch.zeros_like(queries)
    for index in range(2):
        layer = f"transformer.decoder.layers.{index}"
        x = _norm1(s, f"{layer}.norm1", x + _attend(s, f"{layer}.self_attn", x + queries, x + queries, x))
        seen = _attend(s, f"{layer}.multihead_attn", x + queries, memory + positions, memory)
        x = _norm1(s, f"{layer}.norm2", x + seen)
        x = _norm1(s, f"{layer}.norm3", x + _feedforward(s, layer, x))
    x = _norm1(s, "transformer.decoder.norm", x).transpose(0, 1)
    own, shared = _head(s, "specific_embed", x), _head(s, "shared_embed", x)
    shared = shared.mean(1, keepdim=True).repeat(1, QUERIES, 1)
    curves = torch.cat([own[..., :2], shared, own[..., 2:]], dim=-1)
    return F.linear(x, s["class_embed.weight"], s["class_embed.bias"]), curves


def wave(index: int, count: int, channels: int) -> list[float]:
    """The position embedding of row (or column) `index`, from 1, of `count`."""
    angle = 2 * math.pi * index / (count + 1e-6)
    turns = [angle / 10000 ** (2 * (c // 2) / channels) for c in range(channels)]
    return [math.cos(turn) if c % 2 else math.sin(turn) for c, turn in enumerate(turns)]


def _batch_norm(s: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        s[f"{place}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def _block(s: dict[str, Tensor], place: str, x: Tensor, stride: int) -> Tensor:
    y = F.conv2d(x, s[f"{place}.conv1.weight"], stride=stride, padding=1)
    y = F.relu(_batch_norm(s, f"{place}.bn1", y))
    y = _batch_norm(s, f"{place}.bn2", F.conv2d(y, s[f"{place}.conv2.weight"], padding=1))
    if f"{place}.downsample.0.weight" in s:
        x = F.conv2d(x, s[f"{place}.downsample.0.weight"], stride=stride)
        x = _batch_norm(s, f"{place}.downsample.1", x)
    return F.relu(x + y)


def _norm1(s: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (CHANNELS,), s[f"{place}.weight"], s[f"{place}.bias"])


def _attend(s: dict[str, Tensor], place: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    module = nn.MultiheadAttention(CHANNELS, HEADS)
    module.load_state_dict({n[len(place) + 1 :]: t for n, t in s.items() if n.startswith(f"{place}.")})
    return module.eval()(query, key, value)[0]


def _feedforward(s: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    x = F.relu(F.linear(x, s[f"{place}.linear1.weight"], s[f"{place}.linear1.bias"]))
    return F.linear(x, s[f"{place}.linear2.weight"], s[f"{place}.linear2.bias"])


def _head(s: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    for layer in range(3):
        x = F.linear(x, s[f"{place}.layers.{layer}.weight"], s[f"{place}.layers.{layer}.bias"])
        x = F.relu(x) if layer < 2 else x
    return x
