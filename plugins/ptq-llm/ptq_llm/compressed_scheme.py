"""What compressed-tensors can say about a layer: which grids it holds, and how config.json spells them."""

from typing import Any

from ptqcore import ExportError, QuantSpec

Scheme = tuple[QuantSpec, QuantSpec | None]  # grids of the weight and of the input

PACKED = "pack-quantized"


def refuse(scheme: Scheme) -> None:
    """Refuse grids that the format cannot hold, or that nothing loads.

    Raises:
        ExportError: naming the key, its value and what to set instead.
    """
    weights, activations = scheme
    problems = {
        "quant.weights.dtype e5m2: its 8-bit float is e4m3, set it to e4m3": weights.dtype == "e5m2",
    }
    if activations is not None:
        problems |= {
            "quant.activations.dtype e5m2: its 8-bit float is e4m3, set it to e4m3": (
                activations.dtype == "e5m2"
            ),
            f"quant.activations.scale_dtype {activations.scale_dtype} with dynamic true: readers compute "
            "the scales of such inputs in the dtype of the model, set it to null": (
                activations.dynamic and activations.scale_dtype is not None
            ),
        }
    for sentence, found in problems.items():
        if found:
            raise ExportError(f"export compressed-tensors cannot hold {sentence}")


def refuse_together(schemes: dict[Scheme, str]) -> None:
    """Refuse schemes that are loaded one by one, but not beside each other.

    transformers loads packed zero points only where it dequantizes at once, which it does with one scheme
    for the whole model.

    Args:
        schemes: those of a model, each with what it is of.

    Raises:
        ExportError: naming two of them.
    """
    for scheme, owner in schemes.items():
        if has_packed_zero_points(scheme) and len(schemes) > 1:
            other = next(name for one, name in schemes.items() if one != scheme)
            raise ExportError(
                f"export compressed-tensors cannot hold quant.weights.symmetric false where {owner} and "
                f"{other} have different grids: transformers takes packed zero points only with one grid "
                "for all layers, set it to true or give all layers the same bits"
            )


def has_packed_zero_points(scheme: Scheme) -> bool:
    """Whether the zero points of a weight are packed like its codes, which those of one for all are not."""
    weights, _ = scheme
    return format_of(scheme) == PACKED and not weights.symmetric and weights.granularity != "tensor"


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
        "quant.weights.granularity group with dtype e4m3: such experts are read with one scale per channel "
        "or tensor, set it to channel": weights.is_float and weights.granularity == "group",
        "quant.activations beside integer weights: such experts are read packed, without quantized inputs; "
        "remove it": activations is not None and not weights.is_float,
        "quant.activations.dynamic false: experts are read without the scale of their input, set "
        "granularity to token with dynamic true": activations is not None and not activations.dynamic,
    }
    for sentence, found in problems.items():
        if found:
            raise ExportError(f"export compressed-tensors cannot hold the expert {name} with {sentence}")


def format_of(scheme: Scheme) -> str:
    """The format's own name for the way a layer's weight is stored: integers beside float inputs packed,
    others as int8 whatever their width, and FP8 as it is."""
    weights, activations = scheme
    if weights.is_float:
        return "naive-quantized" if activations is None else "float-quantized"
    return PACKED if activations is None else "int-quantized"


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
