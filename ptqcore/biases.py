"""Biases as integer engines hold them: whole numbers, in steps of input scale times weight scale.

An engine adds the bias to a sum of products of codes, in 32 bits. Rounded in the same way here, the
simulation computes what engines compute, and no exporter has to change a number.
"""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from ptqcore.dataflow import Dataflow
from ptqcore.edges import ActivationQuantizers
from ptqcore.modules import QuantModule
from ptqcore.packed import QuantizedTensor
from ptqcore.placement import CLIPPING, LAYERS, Edge, moves

# Biases stay this far from the end of 32 bits, so that the sum of products fits beside them.
LARGEST = 2**30


def round_biases(layers: dict[str, QuantModule], flow: Dataflow, quantizers: ActivationQuantizers) -> None:
    """Round the biases of all layers whose input has one grid, and let them compute in whole numbers.

    Where a bias is too large for 32 bits, the weights of its channel are next to nothing: these are
    rounded to a coarser step, which makes the step of the bias coarser too.
    """
    outputs = _output_scales(flow, quantizers)
    for path, scales in input_scales(flow, quantizers).items():
        layer = layers.get(path)
        if layer is None or len(scales) != 1 or layer.weight_scale.dtype != torch.float32:
            continue
        record = layer.quantized_weight
        if record.spec.granularity == "group" or record.spec.is_float:
            continue
        (scale,) = scales
        layer.input_scale = torch.tensor([scale])
        if len(outputs[path]) == 1:
            (output,) = outputs[path]
            layer.output_scale = None if output is None else torch.tensor([output])
        if layer.bias is None:
            continue
        bias = layer.bias.detach()
        layer.set_weight(_with_room(record, bias, scale))
        step = (layer.weight_scale.flatten() * scale).double()
        layer.bias.data = (torch.round(bias / step) * step).float()


def input_scales(flow: Dataflow, quantizers: ActivationQuantizers) -> dict[str, set[float]]:
    """Path of a layer → the scales of the static grids that its input lies on, one a call."""
    found: dict[str, set[float]] = defaultdict(set)
    on_grid: dict[int, float] = {}

    def scale(edge: Edge) -> float | None:
        known = quantizers[edge].scale if edge in quantizers.names else None
        return None if known is None or len(known) > 1 else float(known)

    for op in flow.ops:
        first = on_grid.get(op.inputs[0]) if op.inputs else None
        given = scale(Edge(op.site, "input"))
        first = first if given is None else given
        if op.name in LAYERS and first is not None:
            found[op.site.owner].add(first)
        for index, number in enumerate(op.outputs):
            made = scale(Edge(op.site, "output", index))
            if made is None and (moves(op) or op.name == "relu"):
                made = first
            if made is not None:
                on_grid[number] = made
    return found


def _output_scales(flow: Dataflow, quantizers: ActivationQuantizers) -> dict[str, set[float | None]]:
    """Path of a layer → the scales that its output is rounded to, behind a clipping function or at once."""
    readers = flow.consumers()
    found: dict[str, set[float | None]] = defaultdict(set)
    for op in flow.ops:
        if op.name in LAYERS:
            after = readers.get(op.outputs[0], [])
            clipped = len(after) == 1 and after[0].name in CLIPPING
            edge = Edge(after[0].site if clipped else op.site, "output")
            edge = edge if edge in quantizers.names else Edge(op.site, "output")
            scale = quantizers[edge].scale if edge in quantizers.names else None
            found[op.site.owner].add(None if scale is None or len(scale) > 1 else float(scale))
    return found


def _with_room(record: QuantizedTensor, bias: Tensor, scale: float) -> QuantizedTensor:
    """The weight, with coarser steps in the channels whose bias would not fit; a power of two each."""
    step = record.scale.double().abs() * scale
    needed = (bias.double()[:, None] / (step * LARGEST)).abs().clamp(min=1)
    factor = torch.exp2(torch.log2(needed).ceil())
    if not bool((factor > 1).any()):
        return record
    zero_point = record.spec.middle if record.zero_point is None else record.zero_point
    codes = torch.round((record.codes - zero_point) / factor) + zero_point
    return replace(
        record, codes=codes.to(torch.uint8), scale=(record.scale * factor).to(record.scale.dtype)
    )
