"""How config.json spells which layers of a GPTQ checkpoint are quantized, and how."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from ptqcore import QuantSpec, __version__

CHECKPOINT_FORMATS = {1: "gptq", 2: "gptq_v2"}


class Scheme(NamedTuple):
    """What readers must know of a layer's grid; `group_size` is −1 for one scale per output channel."""

    bits: int
    group_size: int
    sym: bool

    @classmethod
    def of(cls, spec: QuantSpec) -> "Scheme":
        return cls(spec.bits, spec.group_size or -1, spec.symmetric)


def quantization_config(schemes: dict[str, Scheme | None], version: int) -> dict[str, Any]:
    """The `quantization_config` of config.json, and all of quantize_config.json.

    The scheme that most layers have holds for all that nothing else is said of. Exceptions are in
    `dynamic`, which GPTQModel, vLLM and SGLang read; transformers (through optimum) knows full
    precision alone as an exception, by `modules_in_block_to_quantize`.

    Args:
        schemes: the scheme of every linear layer in the model's blocks, by path and in the model's
            order; None for full precision.
        version: of the zero points, 1 or 2.
    """
    base = _most_common(schemes.values())
    assert base is not None, "no layer is quantized"
    config: dict[str, Any] = {
        "quant_method": "gptq",
        **base._asdict(),
        "desc_act": False,
        "lm_head": False,
        "format": CHECKPOINT_FORMATS[version],
        "checkpoint_format": CHECKPOINT_FORMATS[version],
        "meta": {"quantizer": [f"ptqcore:{__version__}"]},
    }
    if overrides := _dynamic(schemes, base):
        config["dynamic"] = overrides
    if None in schemes.values():
        config["modules_in_block_to_quantize"] = [[path for path in schemes if schemes[path] is not None]]
    return config


def _dynamic(schemes: dict[str, Scheme | None], base: Scheme) -> dict[str, dict[str, Any]]:
    """Pattern → what differs from the base: `+:` another scheme, `-:` full precision.

    The first pattern that matches a layer's path from its start counts. vLLM joins siblings (q, k and v;
    gate and up) into one layer and asks for a name that stands in no file: therefore the scheme of most
    of a module's children is said of all of them, after the children that differ.
    """
    children: dict[str, list[str]] = {}
    for path in schemes:
        children.setdefault(path.rpartition(".")[0], []).append(path)
    patterns = {}
    for parent, paths in children.items():
        common = _most_common(schemes[path] for path in paths) or base
        said = {re.escape(path): schemes[path] for path in paths if schemes[path] != common}
        if common != base:
            said[re.escape(f"{parent}.") + "[^.]+"] = common
        for pattern, scheme in said.items():
            sign = "-" if scheme is None else "+"
            patterns[f"{sign}:{pattern}$"] = {} if scheme is None else scheme._asdict()
    return patterns


def _most_common(schemes: Iterable[Scheme | None]) -> Scheme | None:
    """The most frequent scheme but full precision, the first of them in a tie; None if there is none."""
    counts = Counter(scheme for scheme in schemes if scheme is not None)
    return counts.most_common(1)[0][0] if counts else None
