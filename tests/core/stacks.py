"""Stacks of residual layers for the tests of blocks and of the walk."""

import torch
from torch import nn


class Residual(nn.Module):
    """x + second(relu(first(x)))."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class InPlace(Residual):
    """The first thing it does is to overwrite its own input."""

    def forward(self, x):
        x.mul_(0.5)
        return super().forward(x)


class Masked(Residual):
    """Takes positions and keywords and returns a tuple, like the layers of old transformers."""

    def forward(self, x, mask, scale=1.0, table=None):
        return super().forward(x * mask) * scale + table, mask.sum()


class Stack(nn.Module):
    """stem – layers, called one by one – mean over the rows – head."""

    def __init__(self, layers, width=6, classes=3):
        super().__init__()
        self.stem, self.layers = nn.Linear(width, width), nn.ModuleList(layers)
        self.head = nn.Linear(width, classes)

    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.head(self.run_layers(self.stem(x) * 2).mean(0))


class MaskedStack(Stack):
    def run_layers(self, x):
        mask = (torch.arange(x.shape[0]) % 2)[:, None].float()
        for layer in self.layers:
            x, _ = layer(x, mask, scale=0.5, table=self.stem.bias)
        return x


class KeywordStack(Stack):
    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x=x)
        return x
