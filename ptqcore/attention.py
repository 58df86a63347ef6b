"""PyTorch's attention module with layers in the place of the parameters that it multiplies itself.

`nn.MultiheadAttention` keeps the weights of its projections as parameters of its own, packed into one
matrix, and does not call the layer that it has for the output: nothing there can be quantized. Tasks
split such modules as soon as a model is built and loaded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptqcore.modules import replace_module


def split_attention(model: nn.Module) -> list[str]:
    """Replace every `nn.MultiheadAttention` of a model by a `SplitAttention` of the same function.

    Names of parameters change: load float weights before, and do it in `Task.build` too. Dropout is left
    out, as in evaluation. Modules with extra keys (`add_bias_kv`, `add_zero_attn`), and subclasses, stay.

    Args:
        model: changed in place.

    Returns:
        The paths that were replaced.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if path
        and type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and not module.add_zero_attn
    }
    for path, module in found.items():
        replace_module(model, path, SplitAttention(module))
    return list(found)


class SplitAttention(nn.Module):
    """Attention of several heads: layers `query`, `key`, `value` and `output`.

    It is called as `nn.MultiheadAttention` is, and returns the same pair.
    """

    in_proj_bias = None  # PyTorch's transformer layers look for it

    def __init__(self, module: nn.MultiheadAttention) -> None:
        """Take weights and settings from a module."""
        super().__init__()
        self.embed_dim, self.num_heads = module.embed_dim, module.num_heads
        self.batch_first = module.batch_first
        packed, bias = module.in_proj_weight, module.in_proj_bias
        apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights: tuple[Tensor, ...] = apart if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.output = _linear(module.out_proj.weight, module.out_proj.bias)
        self.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [batch, queries, channels], key and value [batch, keys, …] where `batch_first`, else with
        the first two dimensions exchanged, or without a batch.

        Args:
            key_padding_mask: [batch, keys], bool: keys to be ignored, or what is added to their products.
            need_weights: whether to return the softmax [batch, queries, keys] too.
            attn_mask: [queries, keys] or [batch · heads, queries, keys], as `key_padding_mask`.
            average_attn_weights: False: the softmax of every head [batch, heads, queries, keys].
            is_causal: that `attn_mask` is causal; it must be given all the same.
        """
        batched = query.ndim == 3
        exchanged = batched and not self.batch_first
        q, k, v = self.query(query), self.key(key), self.value(value)
        q, k, v = (self._heads(x if batched else x.unsqueeze(0), exchanged) for x in (q, k, v))
        mask = self._mask(key_padding_mask, attn_mask, q.dtype)
        weights = None
        if need_weights:
            scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = torch.matmul(weights, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        if exchanged:
            mixed = mixed.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self.output(mixed if batched else mixed.squeeze(0)), weights

    def _heads(self, x: Tensor, exchanged: bool) -> Tensor:
        """[batch, heads, tokens, channels of a head]."""
        x = x.transpose(0, 1) if exchanged else x
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the products, broadcast to [batch, heads, queries, keys]."""
        added = None if mask is None else _added(mask, dtype)
        if added is not None and added.ndim == 3:
            added = added.reshape(-1, self.num_heads, *added.shape[1:])
        if padding is None:
            return added
        ignored = _added(padding, dtype)
        ignored = (ignored if ignored.ndim == 2 else ignored.unsqueeze(0))[:, None, None]
        return ignored if added is None else added + ignored


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
