"""Functions that hide products of activations, in the single steps that they stand for.

PyTorch computes attention, and products that are written as equations, in one function, inside which
nothing can be observed or rounded. While `decomposed` is active such a function is computed in steps:
wherever its result is looked at (the traced pass, the tape, a model with activation quantizers, its
ONNX graph) the two products and the softmax between them are functions of their own, with a site each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_T = TypeVar("_T")


def decomposed() -> TorchFunctionMode:
    """A context in which functions that hide products are computed in steps.

    Enter it after the mode that is to see the steps.
    """
    return _Decomposing()


def in_steps(run: Callable[[], _T]) -> Callable[[], _T]:
    """The same run, in which functions that hide products are computed in steps."""

    def computed() -> _T:
        with decomposed():
            return run()

    return computed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, softmax(scale · Q Kᵀ + mask) V, in steps.

    As there, a row of which a mask leaves nothing gives zeros. Half precision is computed in single
    precision, as the kernels of PyTorch do inside.

    Args:
        query: [..., heads, queries, channels].
        key: [..., heads, keys, channels]; with `enable_gqa` of fewer heads, as is `value`.
        value: [..., heads, keys, channels].
        attn_mask: broadcast to [..., heads, queries, keys]: what is added to the products, or, bool,
            where a query may look.
        dropout_p: probability with which an element of the softmax becomes 0.
        is_causal: whether query i looks at the keys 0 … i alone.
        scale: of the products; None: 1 / √channels.
        enable_gqa: whether several heads of queries share one of keys and values.
    """
    dtype = query.dtype
    precision = torch.promote_types(dtype, torch.float32)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    scores = torch.matmul(query.to(precision), key.transpose(-2, -1).to(precision))
    scores = scores * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(seen.logical_not(), -math.inf)
    if attn_mask is not None:
        scores = _masked(scores, attn_mask)
    shares = scores.softmax(-1)
    if attn_mask is not None:
        shares = shares.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
    if dropout_p:
        shares = F.dropout(shares, dropout_p)
    return torch.matmul(shares, value.to(precision)).to(dtype)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask.logical_not(), -math.inf)
    return scores + mask


@dataclass(frozen=True)
class _Product:
    """An equation of two factors as matrix products; every part is letters of dimensions."""

    factors: tuple[str, str]
    result: str
    batch: str
    rows: str
    summed: str
    columns: str

    @classmethod
    def of(cls, equation: str, *shapes: Sequence[int]) -> "_Product | None":
        """None for other equations: of three factors and more, with diagonals, sums of one factor alone,
        dimensions that are repeated or not named."""
        terms, _, result = equation.replace(" ", "").partition("->")
        factors = terms.split(",")
        if len(factors) != 2 or not result or "." in equation:
            return None
        if any(len(set(part)) < len(part) for part in (*factors, result)):
            return None
        left, right = factors
        sizes = [dict(zip(*pair, strict=True)) for pair in zip(factors, shapes, strict=True)]
        shared = [name for name in left if name in right]
        if any(sizes[0][name] != sizes[1][name] for name in shared):
            return None
        batch = "".join(name for name in shared if name in result)
        summed = "".join(name for name in shared if name not in result)
        rows = "".join(name for name in left if name not in right)
        columns = "".join(name for name in right if name not in left)
        if not summed or not set(rows + columns) <= set(result):
            return None
        return cls((left, right), result, batch, rows, summed, columns)


def einsum(equation: str, *operands: Any) -> Tensor:
    """`torch.einsum` of two tensors that is a batched matrix product, as one."""
    one, other = _factors(operands)
    product = _Product.of(equation, one.shape, other.shape)
    assert product is not None
    made = product.batch + product.rows + product.columns
    sizes = dict(zip("".join(product.factors), (*one.shape, *other.shape), strict=True))
    one = _arranged(one, product.factors[0], product.batch, product.rows, product.summed)
    other = _arranged(other, product.factors[1], product.batch, product.summed, product.columns)
    result = torch.matmul(one, other).reshape([sizes[name] for name in made])
    return result.permute([made.index(name) for name in product.result])


def _factors(operands: Sequence[Any]) -> Sequence[Tensor]:
    """The tensors of an equation, which may be given as one list."""
    return operands[0] if isinstance(operands[0], list | tuple) else operands


def _is_product(equation: str, *operands: Any) -> bool:
    factors = _factors(operands)
    return len(factors) == 2 and _Product.of(equation, *(x.shape for x in factors)) is not None


def _arranged(x: Tensor, names: str, batch: str, rows: str, columns: str) -> Tensor:
    """x with its dimensions in this order, those of rows and of columns flattened to one each."""
    x = x.permute([names.index(name) for name in batch + rows + columns])
    sizes = list(x.shape)
    start, middle = len(batch), len(batch) + len(rows)
    return x.reshape([*sizes[:start], math.prod(sizes[start:middle]), math.prod(sizes[middle:])])


def _opened(function: Any) -> FunctionType:
    """A Python function of PyTorch that asks no mode about itself, so that modes see what it calls."""
    inside = {**function.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(
        function.__code__, inside, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_IN_STEPS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    torch.einsum: einsum,
}


class _Decomposing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        steps = _IN_STEPS.get(func)
        if steps is None or (steps is einsum and not _is_product(*args, **kwargs)):
            return func(*args, **kwargs)
        with self:  # its steps may hide products too
            return steps(*args, **kwargs)
