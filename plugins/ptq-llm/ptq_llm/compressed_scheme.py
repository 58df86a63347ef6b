"""What compressed-tensors can say about a layer: which grids it holds, and how config.json spells them."""

from typing import Any

from ptqcore import ExportError, QuantSpec

Scheme = tuple[QuantSpec, QuantSpec | None]  # grids of the weight and of the input


def refuse(scheme: Scheme) -> None:
    """Refuse grids that the format cannot hold, or that nothing loads.

    Raises:
        ExportError: naming the key, its value and what to set instead.
    """
    weights, activations = scheme
    problems = _weight_problems(weights)
    problems |= _packed_problems(weights) if activations is None else _input_problems(weights, activations)
    for sentence, found in problems.items():
        if found:
            raise ExportError(f"export compressed-tensors cannot hold {sentence}")


def _weight_problems(weights: QuantSpec) -> dict[str, bool]:
    """What could be wrong with any weight's grid → whether it is."""
    return {
        "quant.weights.dtype e5m2: its 8-bit float is e4m3, set it to e4m3": weights.dtype == "e5m2",
        "quant.weights.granularity group with dtype e4m3: FP8 weights have one scale per channel or "
        "tensor, set it to channel": weights.is_float and weights.granularity == "group",
    }


def _packed_problems(weights: QuantSpec) -> dict[str, bool]:
    """What could be wrong with the grid of a weight beside float inputs → whether it is."""
    return {
        "quant.weights.granularity tensor without quant.activations: packed integer weights have one "
        "scale per channel or group, set it to channel or group": (
            not weights.is_float and weights.granularity == "tensor"
        ),
    }


def _input_problems(weights: QuantSpec, activations: QuantSpec) -> dict[str, bool]:
    """What could be wrong with quantized inputs beside such weights → whether it is."""
    return {
        f"quant.activations.dtype {activations.dtype} with quant.weights.dtype {weights.dtype}: both "
        f"must be int or both e4m3, set the former to {weights.dtype} or remove quant.activations": (
            activations.dtype != weights.dtype
        ),
        f"quant.activations.bits {activations.bits}: quantized inputs have 8 bits, set it to 8": (
            activations.bits != 8
        ),
        f"quant.activations.granularity {activations.granularity}: inputs have one scale per token "
        "or tensor, set it to token with dynamic true": activations.granularity not in ("token", "tensor"),
        f"quant.weights.bits {weights.bits} with integer quant.activations: such weights are stored as "
        "int8, set it to 8 or remove quant.activations": weights.bits != 8,
        "quant.weights.granularity group with integer quant.activations: int8 weights have one scale "
        "per channel or tensor, set it to channel": weights.granularity == "group",
        "quant.weights.symmetric false with integer quant.activations: int8 weights have no zero "
        "points, set it to true": not weights.symmetric,
    }


def refuse_experts(scheme: Scheme, name: str) -> None:
    """Refuse grids that no reader takes for experts.

    Raises:
        ExportError: naming an expert, the key, its value and what to set instead.
    """
    weights, activations = scheme
    problems = {
        "quant.weights.symmetric false: experts are read without zero points, set it to true": (
            not weights.symmetric
        ),
        "integer quant.activations: experts are read packed, without quantized inputs, or as e4m3; remove "
        "quant.activations": activations is not None and not weights.is_float,
        "quant.activations.dynamic false: experts are read without the scale of their input, set "
        "granularity to token with dynamic true": activations is not None and not activations.dynamic,
    }
    for sentence, found in problems.items():
        if found:
            raise ExportError(f"export compressed-tensors cannot hold the expert {name} with {sentence}")


def format_of(scheme: Scheme) -> str:
    """The format's own name for the way a layer's weight is stored."""
    weights, activations = scheme
    if weights.is_float:
        return "naive-quantized" if activations is None else "float-quantized"
    return "pack-quantized" if activations is None else "int-quantized"


def quantization_config(schemes: dict[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        schemes: the scheme of every quantized layer, by path; one group if all are the same, else
            one group with the layers' paths for each.
        ignore: paths of the linear layers that are not quantized.
    """
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    formats = {format_of(scheme) for scheme in members}
    groups = {}
    for index, (scheme, names) in enumerate(members.items()):
        groups[f"group_{index}"] = _group(scheme, ["Linear"] if len(members) == 1 else names)
        if len(formats) > 1:
            groups[f"group_{index}"]["format"] = format_of(scheme)
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": groups,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights, activations = scheme
    return {
        "targets": targets,
        "weights": _arguments(weights),
        "input_activations": None if activations is None else _arguments(activations),
        "output_activations": None,
    }


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "float" if spec.is_float else "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }
