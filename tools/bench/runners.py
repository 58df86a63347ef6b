"""One model in PyTorch or in an engine, behind the same three questions: outputs, time, integers."""

import copy
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ptqcore.dataflow import tensors_in
from ptqcore.engines import execute
from ptqcore.export.feeding import named_inputs, output_names, with_tensors

_WARM_UPS = 3
_PRODUCTS = re.compile("Conv(?!ert)|Gemm|MatMul|Deconvolution|FullyConnected")


class Runner(Protocol):
    """A row of the table."""

    def module(self) -> nn.Module:
        """What the task evaluates in place of its model."""
        ...

    def milliseconds(self, sample: Any, threads: int, repeats: int) -> float:
        """The fastest of the runs of one sample, warm."""
        ...

    def integer_products(self, sample: Any) -> str:
        """How many of the executed convolutions and matrix products multiply integers."""
        ...


@dataclass(frozen=True)
class InTorch:
    """The model itself."""

    model: nn.Module

    def module(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def milliseconds(self, sample: Any, threads: int, repeats: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        inputs = _positions(sample)
        times = []
        for _ in range(_WARM_UPS + repeats):
            begin = time.perf_counter()
            self.model(*inputs)
            times.append((time.perf_counter() - begin) * 1e3)
        torch.set_num_threads(before)
        return min(times[_WARM_UPS:])

    def integer_products(self, sample: Any) -> str:
        return ""


@dataclass(frozen=True)
class InEngine:
    """A file that an engine runs in place of the model, in a process of its own for every batch."""

    model: nn.Module
    engine: str
    file: Path

    def module(self) -> nn.Module:
        """The model with all its attributes, which tasks may ask for, and the engine as its `forward`."""
        module = copy.copy(self.model)
        module.forward = self._forward
        return module

    @torch.no_grad()
    def _forward(self, *inputs: Tensor) -> Any:
        """Images one by one: the file need not take any other batch."""
        images = [self._arrays(tuple(one[None] for one in parts)) for parts in zip(*inputs, strict=True)]
        ran = execute(self.engine, self.file, images)
        like = self.model(*(one[:1] for one in inputs))
        outputs = [
            torch.from_numpy(np.concatenate([found[name] for found in ran.outputs]))
            for name in output_names(len(tensors_in(like)))
        ]
        return with_tensors(like, outputs)

    def milliseconds(self, sample: Any, threads: int, repeats: int) -> float:
        ran = execute(self.engine, self.file, [self._arrays(sample)], threads=threads, repeats=repeats)
        return min(ran.milliseconds)

    def integer_products(self, sample: Any) -> str:
        ran = execute(self.engine, self.file, [self._arrays(sample)], profile=True)
        products = [node for node in ran.nodes if _PRODUCTS.search(node.op)]
        return f"{sum(node.integer for node in products)} of {len(products)}"

    def _arrays(self, sample: Any) -> dict[str, np.ndarray]:
        return arrays(self.model, sample)


def arrays(model: nn.Module, sample: Any) -> dict[str, np.ndarray]:
    """A sample as an engine takes it."""
    return {name: tensor.numpy() for name, tensor in named_inputs(model, sample).items()}


def write_onnx(model: nn.Module, sample: Any, file: Path) -> None:
    """The full-precision model as PyTorch exports it, for any batch if it can be traced so."""
    twice = tree_map_only(Tensor, lambda one: torch.cat([one, one]), _positions(sample))
    batch = {0: torch.export.Dim("batch")}
    try:
        shapes = tree_map_only(Tensor, lambda _: batch, twice)
        program = torch.export.export(model, twice, dynamic_shapes=shapes, strict=False)
    except Exception:  # tracing fails in many ways
        program = torch.export.export(model, _positions(sample), strict=False)
    with torch.no_grad():
        count = len(tensors_in(model(*_positions(sample))))
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=21,
        input_names=list(named_inputs(model, sample)),
        output_names=list(output_names(count)),
        verbose=False,
    )
    assert exported is not None
    exported.save(file)


def _positions(sample: Any) -> tuple[Any, ...]:
    return sample if isinstance(sample, tuple) else (sample,)
