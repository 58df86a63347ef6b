"""Correlated, heavy-tailed inputs and weights of linear layers, and grids of every kind."""

import torch
from torch import Tensor

from ptqcore import Gram, QuantizedTensor, QuantSpec, grid

SPECS = {
    "symmetric groups": QuantSpec(bits=4, granularity="group", group_size=8),
    "signed groups": QuantSpec(bits=2, signed_scale=True, granularity="group", group_size=8),
    "asymmetric groups": QuantSpec(bits=3, symmetric=False, granularity="group", group_size=8),
    "ragged groups": QuantSpec(bits=3, symmetric=False, granularity="group", group_size=7),
    "half scales": QuantSpec(
        bits=3, symmetric=False, granularity="group", group_size=8, scale_dtype="float16"
    ),
    "channels": QuantSpec(bits=4, granularity="channel"),
    "asymmetric channels": QuantSpec(bits=2, symmetric=False, granularity="channel"),
    "tensor": QuantSpec(bits=5),
    "asymmetric tensor": QuantSpec(bits=4, symmetric=False),
    "float channels": QuantSpec(dtype="e4m3", granularity="channel"),
}


def heavy_tailed(*shape: int, seed: int) -> Tensor:
    """Student's t with 4 degrees of freedom: z / √(χ²₄ / 4)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    chi = torch.randn(4, *shape, generator=generator).square().sum(0)
    return normal / (chi / 4).sqrt()


def inputs(tokens: int, channels: int, seed: int = 0, mixing: int = 0) -> Tensor:
    """Tokens [tokens, channels] whose channels share half as many sources, and differ in size; `mixing`
    says how, so that other seeds give other tokens of the same kind."""
    generator = torch.Generator().manual_seed(1000 + mixing)
    sources = channels // 2 + 1
    mix = torch.randn(sources, channels, generator=generator)
    size = torch.randn(channels, generator=generator).exp()
    own = heavy_tailed(tokens, channels, seed=2 * seed + 1) * 0.3
    return (heavy_tailed(tokens, sources, seed=2 * seed) @ mix / sources**0.5 + own) * size


def gram_of(*batches: Tensor) -> Gram:
    """The Gram of batches of tokens [tokens, channels]."""
    gram = Gram(batches[0].shape[1])
    for batch in batches:
        gram.update(batch)
    return gram


def rounded(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """To nearest, in the range of the weights."""
    return QuantizedTensor.from_range(weight, *grid.value_range(weight.float(), spec), spec)


def output_error(x: Tensor, weight: Tensor, quantized: QuantizedTensor) -> float:
    """‖X(Ŵ − W)ᵀ‖², from the tokens themselves."""
    change = quantized.dequantize().double() - weight.double()
    return float((x.double() @ change.T).square().sum())


def damped(gram: Tensor, damping: float) -> Tensor:
    """A Gram with a number added to its diagonal, float64."""
    return gram.double() + damping * torch.eye(len(gram), dtype=torch.float64)


def objective(gram: Tensor, weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """δ H δᵀ of the error δ of every row [rows], float64."""
    change = quantized.dequantize().double() - weight.double()
    return ((change @ gram.double()) * change).sum(1)


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether two records hold the same numbers."""
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
