"""The authors' checkpoints of LSTR, turned into our network."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ptq_lane.lstr.network import LSTR
from ptq_lane.lstr.variants import VARIANTS, find_variant
from ptqcore import ModelError, put_weights

_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")
"""Written by a profiler and by batch norms in training; they decide nothing."""
_CLASSES = "class_embed.weight"
_BOUNDS = 2
_RENAMED = (
    (r"^(conv1|bn1|layer\d)\.", r"backbone.\1."),
    (r"^transformer\.(encoder|decoder)\.layers\.", r"transformer.\1."),
    (r"^transformer\.decoder\.norm\.", "transformer.norm."),
    (r"\.out_proj\.", ".output."),
    (r"^class_embed\.", "class_head."),
    (r"^specific_embed\.layers\.0\.", "own_hidden.0."),
    (r"^specific_embed\.layers\.1\.", "own_hidden.2."),
    (r"^shared_embed\.layers\.0\.", "shared_hidden.0."),
    (r"^shared_embed\.layers\.1\.", "shared_hidden.2."),
    (r"^shared_embed\.layers\.2\.", "shared_head."),
)


def load(variant: str, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """LSTR with the weights of one of the authors' checkpoints, in evaluation mode.

    Every tensor of the checkpoint is used and every tensor of the network filled, counters aside.

    Args:
        variant: "tusimple" or "culane".
        state: name → tensor, as read from the file; a prefix `module.` does not matter.
        path: the file, for messages.

    Raises:
        ModelError: if there is no such variant, or the checkpoint belongs to another one or to another
            network.
    """
    found = find_variant(variant)
    label = f"task.checkpoint {str(path)!r}"
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    given = {name: tensor for name, tensor in bare.items() if not name.endswith(_COUNTERS)}
    if _CLASSES not in given:
        raise ModelError(
            f"{label} is not one of LSTR: it has no tensor {_CLASSES!r}, and its first is "
            f"{next(iter(given), None)!r}; set task.family to what it was trained as"
        )
    _check_classes(given[_CLASSES], found.name, label)
    network = LSTR(found.classes)
    put_weights(network, _ours(given), path)
    return network.eval()


def _check_classes(weight: Tensor, variant: str, label: str) -> None:
    classes = len(weight) if weight.ndim else 0
    if classes == VARIANTS[variant].classes:
        return
    fitting = [other.name for other in VARIANTS.values() if other.classes == classes]
    known = ", ".join(f"{other.name} {other.classes}" for other in VARIANTS.values())
    raise ModelError(
        f"{label} looks like the variant {fitting[0]!r} of LSTR, not {variant!r}: it tells {classes} "
        f"classes apart; set task.variant to {fitting[0]}"
        if fitting
        else f"{label} tells {classes} classes apart, which no variant of LSTR does ({known})"
    )


def _ours(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, joined layers split into ours."""
    ours = {}
    for name, tensor in given.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name and tensor.ndim and len(tensor) % 3 == 0:
            attention, _, kind = name.partition(".in_proj_")
            for layer, part in zip(("query", "key", "value"), tensor.tensor_split(3), strict=True):
                ours[f"{attention}.{layer}.{kind}"] = part
        elif name.startswith("specific_embed.layers.2.") and tensor.ndim:
            kind = name.rsplit(".", 1)[1]
            ours[f"bounds_head.{kind}"], ours[f"specific_head.{kind}"] = tensor[:_BOUNDS], tensor[_BOUNDS:]
        else:
            ours[name] = tensor
    return ours
