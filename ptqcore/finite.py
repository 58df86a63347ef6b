"""NaN and infinite values: which layer makes them, and the gate that none of them passes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore.dataflow import tensors_in
from ptqcore.distributed import Share
from ptqcore.errors import DataError, ModelError
from ptqcore.on_disk import pieces


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinite values, if any does."""
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def check_stored(tensors: Mapping[str, Tensor]) -> None:
    """The gate in front of every artifact.

    Args:
        tensors: all that a model stores (weights, scales, zero points, biases, tables), by name.

    Raises:
        ModelError: naming the first layer of which something is NaN or infinite.
    """
    name = not_finite(tensors)
    if name is not None:
        layer, _, kind = name.rpartition(".")
        raise ModelError(
            f"layer {layer!r}: its {kind} holds NaN or infinite values once quantized, so that nothing "
            "is saved of it: use another step or observer there, or add the layer to quant.ignore"
        )


def check_model(model: nn.Module) -> None:
    """Make sure that the weights can be quantized.

    Raises:
        ModelError: naming the first tensor that holds NaN or infinite values.
    """
    name = not_finite(model.state_dict())
    if name is not None:
        raise ModelError(
            f"tensor {name!r} of the model holds NaN or infinite values: repair the checkpoint"
        )


def check_samples(samples: Sequence[Any]) -> None:
    """Make sure that a model can be calibrated on samples.

    Raises:
        DataError: if there is none; if one is empty; or if one holds NaN or infinite values, other than
            −∞ in a mask of 0 and −∞.
    """
    if not len(samples):
        raise DataError("the task gave no calibration samples: give it at least one")
    for number, sample in enumerate(samples):
        tensors = tensors_in(sample)
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise DataError(f"calibration sample {number + 1} is empty: leave it out")
        if not all(_is_finite(tensor) or _is_mask(tensor) for tensor in tensors):
            raise DataError(
                f"calibration sample {number + 1} holds NaN or infinite values: repair it, or leave it out"
            )


def check_outputs(
    outputs: list[list[Tensor]],
    module: nn.Module,
    path: str,
    run: Callable[[int], object],
    when: str,
    share: Share | None = None,
) -> None:
    """Make sure that a module, as it now is, returns numbers.

    Args:
        outputs: its output tensors, for every calibration sample.
        module: the module.
        path: its path in the model.
        run: computes it again for a sample, given by its number.
        when: in what state the module is, for the sentence.
        share: which of all samples these are.

    Raises:
        ModelError: naming the layer inside that first makes NaN or infinite values, and the sample.
    """
    for sample, tensors in enumerate(outputs):
        if all(map(_is_finite, tensors)):
            continue
        layer = _source(module, path, partial(run, sample))
        whole = f"block {path!r}" if path else "the model"
        name = whole if layer is None else f"layer {layer!r}"
        number = sample if share is None else share.numbers[sample]
        half = any(tensor.dtype == torch.float16 for tensor in tensors)
        hint = "; float16 ends at 65504: give the model in float32 or bfloat16" if half else ""
        raise ModelError(
            f"{name} gives NaN or infinite values {when}, for calibration sample {number + 1}{hint}"
        )


def check_range(low: Tensor, high: Tensor, what: str) -> None:
    """Make sure that an activation has a range.

    Raises:
        ModelError: naming it, if an end is NaN or infinite.
    """
    if not (_is_finite(low) and _is_finite(high)):
        raise ModelError(
            f"{what} holds NaN or infinite values on the calibration samples, so that it has no range: add "
            "the layer to quant.ignore, or quantize weights alone"
        )


def is_masked(tensor: Tensor) -> bool:
    """Whether it holds numbers, and −∞ where a model wants none."""
    return not tensor.is_floating_point() or not bool((tensor.isnan() | (tensor == torch.inf)).any())


def _source(module: nn.Module, path: str, run: Callable[[], object]) -> str | None:
    """The first module inside that makes what is not finite of what is; None if there is none."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = tensors_in((args, kwargs))
            if all(_is_finite(x) or _is_mask(x) for x in given) and not all(
                map(_is_finite, tensors_in(output))
            ):
                found.append(name)

        return look

    handles = [
        each.register_forward_hook(hook(name), with_kwargs=True)
        for name, each in module.named_modules(prefix=path)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name in found if name), None)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or all(bool(one.isfinite().all()) for one in pieces(tensor))


def _is_mask(tensor: Tensor) -> bool:
    """Whether it is 0 where something counts and −∞ where it does not."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())
