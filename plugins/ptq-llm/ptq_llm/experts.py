"""Mixtures of experts: one linear layer for each expert, instead of one parameter for all.

transformers keeps the weights of all experts of a layer in one parameter [experts, out, in] and lets
the function that multiplies by them be chosen by name. Here every expert's matrix is a layer of its
own, and the function is a loop that calls those layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EACH_EXPERT = "each_expert"
EXPERT = "expert"
_KEPT_AS = "kept_as"


class ExpertBank(nn.ModuleList):
    """One projection of all experts of a layer: a linear layer each.

    Args:
        weight: [experts, out, in], or [experts, in, out] if `transposed`; the layers' weights are
            views of it where they can be, so that nothing is copied.
        transposed: whether the model keeps them so.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        weights = (one.T.contiguous() if transposed else one for one in weight)
        super().__init__(linear(one, None, EXPERT) for one in weights)
        self.transposed = transposed


def linear(weight: Tensor, bias: nn.Parameter | None, kept_as: str) -> nn.Linear:
    """A linear layer in evaluation mode with this weight [out, in] and bias [out].

    `kept_as` says what the architecture has in its place, which is what a reader of an export finds.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    layer.register_parameter("bias", bias)
    setattr(layer, _KEPT_AS, kept_as)
    return layer.eval()


def kept_as(layer: nn.Module) -> str:
    """What an architecture has in the place of a layer: `Linear`, if nothing was changed."""
    return str(getattr(layer, _KEPT_AS, "Linear"))


def has_experts(module: Any) -> bool:
    """Whether a module multiplies by parameters for all experts, and lets one choose how.

    These are the names that every experts implementation of transformers relies on.
    """
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(module, "is_transposed")


def split_experts(module: Any) -> int:
    """Put banks in the place of a module's expert parameters; returns how many experts it has."""
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = module.get_parameter(name)
        delattr(module, name)
        setattr(module, name, ExpertBank(weight, module.is_transposed))
    return len(module.down_proj)


def use(model: Any, implementation: str) -> None:
    """Let the experts of a model be computed by `eager`, as its own code does, or by `each_expert`."""
    ALL_EXPERTS_FUNCTIONS.register(EACH_EXPERT, call_each_expert)
    model.set_experts_implementation(implementation)


def call_each_expert(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts implementation of transformers for modules whose projections are banks.

    Every expert is called once in every pass, on the tokens that the router sends to it, if only on
    none: which layers run, and in what order, does not depend on the data.

    Args:
        experts: the module.
        hidden_states: [tokens, hidden].
        top_k_index: experts of each token, [tokens, k].
        top_k_weights: their weights, [tokens, k].

    Returns:
        The weighted sum of the experts' outputs, [tokens, hidden].
    """
    ups = experts.gate_up_proj if experts.has_gate else experts.up_proj
    if torch.compiler.is_exporting():
        return _all_tokens(experts, ups, hidden_states, top_k_index, top_k_weights)
    chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
    counts = chosen.bincount(minlength=len(ups)).tolist()
    places = chosen.argsort(stable=True).split(counts)  # of each expert, in tokens · k
    result = torch.zeros_like(hidden_states)
    for expert, rows in zip(range(len(ups)), places, strict=False):  # an index beyond them masks a token
        tokens = rows // top_k_index.shape[-1]
        output = _call(experts, ups[expert], expert, hidden_states[tokens]) * weights[rows, None]
        result.index_add_(0, tokens, output.to(result.dtype))
    return result


def _all_tokens(
    experts: Any, ups: nn.ModuleList, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same with every expert called on every token: an exported graph has no sizes that depend on
    the data."""
    outputs = []
    for expert, up in enumerate(ups):
        weights = torch.where(top_k_index == expert, top_k_weights, 0).sum(-1, keepdim=True)
        outputs.append(_call(experts, up, expert, hidden_states) * weights)
    return torch.stack(outputs).sum(0).to(hidden_states.dtype)


def _call(experts: Any, up: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The output of one expert for its tokens x [tokens, hidden], before it is weighted."""
    x = up(x)
    if experts.has_bias:
        x = x + (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[expert]
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = experts.down_proj[expert](x)
    if experts.has_bias:
        x = x + experts.down_proj_bias[expert]
    return experts.post_expert_norm(x) if experts.has_post_expert_norm else x
