"""The temporal block of a denoiser: the layers that compute of the time alone, found without their names.

Source: TFMQ-DM (Huang et al., CVPR 2024), the temporal information block and the temporal features. There
it is found by module names of one code base; here by what the layers' inputs depend on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.probe import Dependencies, ProbedCall, has_weight, probe
from ptqcore import Dataflow, ModelError, Op, tensors_in

_T = TypeVar("_T")

TimeClass = Literal["constant", "timestep", "condition", "timestep+condition", "sample"]
"""What an input is a function of; `sample`: of the sample, whatever else."""

_CLASSES: tuple[TimeClass, ...] = ("constant", "timestep", "condition", "timestep+condition", "sample")
_READ_THE_FIRST = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
_READ_NOT_THE_FIRST = {
    "empty_like",
    "full_like",
    "new_empty",
    "new_full",
    "new_ones",
    "new_tensor",
    "new_zeros",
    "ones_like",
    "rand_like",
    "randn_like",
    "zeros_like",
}


@dataclass(frozen=True)
class TemporalMap:
    """Which modules of a denoiser are told the time, alone or with what else.

    classes: path → class of the input, of every module that is called, in the order in which they end.
    weights: path → number of weights, of the layers among them: modules with a weight of two or more
    dimensions.
    features: the layers of the class `timestep` whose output is mixed with something that depends on more
    than the time, before another layer: the temporal features g_i(h(t)).
    conditional_features: the same of the class `timestep+condition`.
    """

    classes: Mapping[str, TimeClass]
    weights: Mapping[str, int]
    features: tuple[str, ...]
    conditional_features: tuple[str, ...]

    def of(self, path: str) -> TimeClass:
        """The class of a module's input.

        Raises:
            ModelError: if the module is not called.
        """
        if path not in self.classes:
            raise ModelError(f"module {path!r} is not called by the denoiser, so it has no class of time")
        return self.classes[path]

    def layers(self, time_class: TimeClass) -> tuple[str, ...]:
        """The layers of a class, in the order in which they are called."""
        return tuple(path for path in self.weights if self.classes[path] == time_class)

    @property
    def block(self) -> tuple[str, ...]:
        """The temporal block: all layers whose input is a function of the time alone."""
        return self.layers("timestep")

    @property
    def conditional(self) -> tuple[str, ...]:
        """The layers whose input is a function of the time and the conditions."""
        return self.layers("timestep+condition")

    def table(self) -> str:
        """Layers, features and weights of each class, in lines to print."""
        features = {"timestep": self.features, "timestep+condition": self.conditional_features}
        total = sum(self.weights.values())
        lines = [f"{'input depends on':<18} {'layers':>6} {'features':>8} {'weights':>13} {'share':>7}"]
        for name in _CLASSES:
            layers = self.layers(name)
            weights = sum(self.weights[path] for path in layers)
            shown = len(features[name]) if name in features else "-"
            share = weights / total if total else 0.0
            lines.append(f"{name:<18} {len(layers):>6} {shown:>8} {weights:>13,} {share:>7.2%}")
        return "\n".join(lines)


def find_temporal(model: nn.Module, flow: Dataflow, call: DenoiserCall) -> TemporalMap:
    """Which layers of a denoiser make up its temporal block, and which of them give temporal features.

    The class of a layer is what the values of its input were seen to depend on (see `probe`). Where they
    are mixed is read off the dataflow map.

    Args:
        model: the denoiser; it stays as it is.
        flow: one traced forward pass of it, of this very call.
        call: an example call.

    Raises:
        ModelError: if the forward pass that was traced is another, or the model cannot be probed.
    """
    probed = probe(model, call)
    flows = _Flows(model, flow, call, probed)
    classes = {
        path: _class_of(frozenset().union(*(one.given for one in probed[path])))
        for path in dict.fromkeys(made.path for made in flow.calls)
    }
    weights = {
        path: cast(Tensor, model.get_submodule(path).weight).numel()
        for path in classes
        if path in flows.layers
    }
    mixed: dict[str, tuple[str, ...]] = {
        name: tuple(path for path in weights if classes[path] == name and flows.is_mixed(path))
        for name in ("timestep", "timestep+condition")
    }
    return TemporalMap(classes, weights, mixed["timestep"], mixed["timestep+condition"])


def values_read(name: str, inputs: Sequence[_T]) -> Sequence[_T]:
    """Those of a function's tensors whose values it reads; of the others it takes shape or dtype alone."""
    if name in _READ_THE_FIRST:
        return inputs[:1]
    return inputs[1:] if name in _READ_NOT_THE_FIRST else inputs


class _Flows:
    """What each tensor of a traced pass depends on.

    Where modules begin and end the probe has seen it; between, tensors depend on what they are made of.
    """

    def __init__(
        self,
        model: nn.Module,
        flow: Dataflow,
        call: DenoiserCall,
        probed: Mapping[str, list[ProbedCall]],
    ) -> None:
        self.flow, self.consumers = flow, flow.consumers()
        self.layers = {path for path in probed if has_weight(model.get_submodule(path))}
        self.returned = {number for made in flow.called("") for number in made.outputs}
        self._check(call, probed)
        self.known: dict[int, Dependencies] = {}
        for path, calls in probed.items():
            for made, seen in zip(flow.called(path), calls, strict=True):
                self.known.update(zip(made.inputs, seen.inputs, strict=True))
                self.known.update(zip(made.outputs, seen.outputs, strict=True))
        for op in flow.ops:
            for number in op.outputs:
                self.known.setdefault(number, self._of(values_read(op.name, op.inputs)))

    def is_mixed(self, path: str) -> bool:
        """Whether what a layer returns meets something that depends on more, or leaves the model."""
        own = self._of([number for made in self.flow.called(path) for number in made.outputs])
        left = [number for made in self.flow.called(path) for number in made.outputs]
        seen = set(left)
        while left:
            number = left.pop()
            if number in self.returned:
                return True
            for op in self._readers(number):
                if not self._of(op.outputs) <= own:
                    return True
                if op.site.owner not in self.layers:
                    left += [made for made in op.outputs if made not in seen]
                    seen.update(op.outputs)
        return False

    def _readers(self, number: int) -> list[Op]:
        ops = self.consumers.get(number, [])
        return [op for op in ops if number in values_read(op.name, op.inputs)]

    def _of(self, numbers: Sequence[int]) -> Dependencies:
        return frozenset().union(*(self.known.get(number, frozenset()) for number in numbers))

    def _check(self, call: DenoiserCall, probed: Mapping[str, list[ProbedCall]]) -> None:
        """The traced pass must be one of this call."""
        shapes = [self.flow.shapes[number] for number in self.flow.inputs]
        given = [tuple(tensor.shape) for tensor in tensors_in(dict(call.values))]
        if shapes != given:
            raise ModelError(
                f"the traced pass got tensors of shapes {shapes}, the call has {given}: trace the model "
                "with the call that is to be probed"
            )
        for path in {made.path for made in self.flow.calls} | set(probed):
            traced = [(len(made.inputs), len(made.outputs)) for made in self.flow.called(path)]
            seen = [(len(one.inputs), len(one.outputs)) for one in probed.get(path, [])]
            if traced != seen:
                raise ModelError(
                    f"module {path!r} is called {len(traced)} times in the traced pass, and {len(seen)} "
                    "times with the same call in single precision and evaluation mode: what a denoiser "
                    "computes must not depend on chance"
                )


def _class_of(dependencies: Dependencies) -> TimeClass:
    if "sample" in dependencies:
        return "sample"
    found = "+".join(word for word in ("timestep", "condition") if word in dependencies)
    return cast(TimeClass, found or "constant")
