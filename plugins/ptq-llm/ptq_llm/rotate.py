"""The step `rotate`: outliers spread over all channels by rotations that leave the function as it is.

QuaRot (Ashkboos et al., arXiv 2404.00456): the residual stream is rotated once and for all (section 4.1),
the values of attention head by head, and what output and down projections read while the model runs
(section 4.2). Everything but the last is folded into weights.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ptq_llm.residual_stream import Bases, ResidualStream, StreamError, find_stream
from ptq_llm.rewrites import Change, Rewrites
from ptq_llm.rotation import Hadamard, Rotation, random_rotation, rotation_that_keeps_ones
from ptq_llm.value_heads import ValueHeads, find_value_heads
from ptqcore import Dataflow, ModelError, Step, StepOptions, relative_difference, say, tensors_in

_TOLERANCE = 1e-5
_NOISES = 4  # what a rotation may change, in what rounding the same parameters changes


class RotateOptions(StepOptions):
    """Which activations are rotated; `online` costs a fast transform in front of each of its layers."""

    residual: bool = Field(default=True, description="the residual stream, folded into weights")
    values: bool = Field(default=True, description="values of attention per head, folded into weights")
    online: bool = Field(default=True, description="inputs of output and down projections, as they run")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.residual or self.values or self.online):
            raise ValueError("residual, values and online are all false: set one of them to true")
        return self


class Rotate(Step):
    """Rotates what the options say.

    Each part is tried first: where the dataflow does not allow it, or where the model's output would change
    by more than 1e-5 and more than rounding explains, it is left out, and the reason said.
    """

    name = "rotate"
    shares_samples = True
    stage = "transform"
    data_free = True
    Options: ClassVar[type[StepOptions]] = RotateOptions
    options: RotateOptions

    @torch.no_grad()
    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        options, attempts = self.options, _Attempts(model, run)
        generator = torch.Generator().manual_seed(self.context.seed)
        bases = Bases(model, flow)
        if options.residual:
            self._rotate_residual(bases, attempts, generator)
        layers = self._inner_layers(bases)
        heads: list[ValueHeads] = []
        if options.values:
            found = find_value_heads(model, flow, run, layers)
            rewrites = rotate_values(model, found, generator)
            if attempts.make("values", f"the values of {len(found)} attention layers", rewrites):
                heads = found
        if options.online:
            widths = {one.consumer: one.rows.shape[1] for one in heads}
            rewrites = rotate_online(model, layers, widths, generator)
            if attempts.make(
                "online", f"the inputs of {len(rewrites.modules)} layers as they run", rewrites
            ):
                self.attaches = "online Hadamard rotations"
        attempts.finish()

    def _rotate_residual(self, bases: Bases, attempts: "_Attempts", generator: torch.Generator) -> None:
        try:
            self._check_reached(bases)
            stream = find_stream(bases)
            rewrites = rotate_stream(bases.model, stream, generator)
        except StreamError as error:
            attempts.refuse("residual", str(error))
        else:
            attempts.make("residual", f"the residual stream of {stream.channels} channels", rewrites)

    def _check_reached(self, bases: Bases) -> None:
        """A layer that only other samples reach would read a stream that it does not know."""
        for path, module in bases.model.named_modules():
            linear = isinstance(module, nn.Linear)
            if linear and not bases.flow.called(path) and self.context.reason_to_skip(path) is None:
                raise StreamError(f"the first calibration sample does not reach {path!r}")

    def _inner_layers(self, bases: Bases) -> list[str]:
        """The layers to quantize that read neither the residual stream nor what a norm returns: behind
        attention, and behind gates or activation functions."""
        outer = bases.behind_norms() | {bases.stream()}
        reads_outer = {one.weight[0] for one in bases.linears if bases.of(one.input) in outer}
        return [
            path
            for path in dict.fromkeys(linear.weight[0] for linear in bases.linears)
            if path not in reads_outer
            and type(bases.model.get_submodule(path)) is nn.Linear
            and self.context.reason_to_skip(path) is None
        ]


class _Attempts:
    """Parts of the step: tried one by one, and made together."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self.model, self.run = model, run
        self.before = [tensor.clone() for tensor in tensors_in(run()) if tensor.is_floating_point()]
        self.tolerance = 0.0
        self.rewrites = Rewrites()
        self.made: list[str] = []
        self.refused: list[str] = []

    def refuse(self, option: str, why: str) -> None:
        """Leave a part out."""
        self.refused.append(f"{option} is left out: {why}")
        say(f"rotate: {self.refused[-1]}")

    def make(self, option: str, what: str, rewrites: Rewrites) -> bool:
        """Try a part, and plan it if the outputs stay; whether they do."""
        if not rewrites.modules:
            self.refuse(option, "the model has no layers for it")
            return False
        difference, allowed = self._tried(rewrites), _TOLERANCE
        if difference > allowed:
            allowed = max(allowed, _NOISES * self._tried(_rounded_again(self.model, rewrites)))
        if difference > allowed:
            self.refuse(option, f"the outputs would change by {difference:.2g} of the largest")
            return False
        self.tolerance += allowed
        self.rewrites.add(rewrites)
        self.made.append(what)
        return True

    def _tried(self, rewrites: Rewrites) -> float:
        with rewrites.trial(self.model):
            return self._difference()

    def finish(self) -> None:
        """Change the model.

        Raises:
            ModelError: if nothing can be rotated, or the outputs change.
        """
        if not self.made:
            raise ModelError(
                f"step rotate: nothing of this model can be rotated ({'; '.join(self.refused)}): "
                "take the step out of the recipe"
            )
        untied = _shared(self.model, self.rewrites)
        self.rewrites.make(self.model)
        if untied:
            _set_untied(self.model)
        difference = self._difference()
        if difference > self.tolerance:
            raise ModelError(
                f"step rotate: the outputs of the model change by {difference:.2g} of the largest, at most "
                f"{self.tolerance:.2g} was expected: set some of residual, values and online to false"
            )
        say(f"rotate: {', '.join(self.made)}; the outputs differ by {difference:.2g}")

    def _difference(self) -> float:
        """max|y' − y| / max|y| of the outputs as they are now; infinite if one is not a number."""
        found = [tensor for tensor in tensors_in(self.run()) if tensor.is_floating_point()]
        if any(bool(tensor.isnan().any()) for tensor in found):
            return torch.inf
        return relative_difference(self.before, found)


def _rounded_again(model: nn.Module, rewrites: Rewrites) -> Rewrites:
    """The same parameters, each moved at random by as much as it may have been rounded."""
    generator, noisy = torch.Generator().manual_seed(0), Rewrites()

    def move(x: Tensor, eps: float) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + x * noise.to(x.device) * (eps / 2)

    for path, rewrite in rewrites.modules.items():
        for name in rewrite.names:
            eps = torch.finfo(model.get_submodule(path).get_parameter(name).dtype).eps
            noisy.modules[path].rows[name] = [partial(move, eps=eps)]
    return noisy


def rotate_stream(model: nn.Module, stream: ResidualStream, generator: torch.Generator) -> Rewrites:
    """The residual stream x becomes x R: what makes it is multiplied by R, what reads it by Rᵀ, in weights.

    Gains of norms go into the layers that read them. So do biases, if all of these layers have one; else
    they are rotated. A norm that subtracts the mean wants a rotation that keeps the vector of ones.

    Raises:
        StreamError: if a norm's bias can go nowhere.
    """
    keeps_ones = any(norm.subtracts_mean for norm in stream.norms.values())
    rotate = (rotation_that_keeps_ones if keeps_ones else random_rotation)(stream.channels, generator)
    rewrites = Rewrites()
    modules = rewrites.modules
    for owner, name in stream.tables:
        modules[owner].rows[name] = [rotate]
    for linear in stream.writers:
        modules[linear.weight[0]].columns[linear.weight[1]] = [rotate]
        if linear.bias is not None:
            modules[linear.bias[0]].rows[linear.bias[1]] = [rotate]
    for linear, norm in stream.readers:
        gains = None if norm is None else stream.norms[norm].gains(model.get_submodule(norm))
        fold: list[Change] = [] if gains is None else [partial(torch.mul, gains)]
        modules[linear.weight[0]].rows[linear.weight[1]] = [*fold, rotate]
    for path in stream.norms:
        _make_plain(model, stream, path, rotate, rewrites)
    return rewrites


def _make_plain(
    model: nn.Module, stream: ResidualStream, path: str, rotate: Rotation, rewrites: Rewrites
) -> None:
    """A norm without gain, and without bias if that can go into the layers that read it."""
    norm, module = stream.norms[path], model.get_submodule(path)
    gains, offsets = norm.gains(module), norm.offsets(module)
    values = rewrites.modules[path].values
    if norm.gain is not None and gains is not None:
        values[norm.gain] = torch.full_like(gains, norm.identity)
    if norm.bias is None or offsets is None:
        return
    readers = [linear for linear, behind in stream.readers if behind == path]
    if all(linear.bias is not None for linear in readers):
        values[norm.bias] = torch.zeros_like(offsets)
        for linear in readers:
            assert linear.bias is not None
            rewrites.modules[linear.bias[0]].moved_in[linear.bias[1]] = (linear.weight[1], offsets)
        return
    divided = offsets if gains is None else torch.where(offsets == 0, offsets, offsets / gains)
    if not bool(divided.isfinite().all()):
        raise StreamError(f"the norm {path!r} has gains of 0 beside biases that are not")
    values[norm.bias] = rotate(divided)


def rotate_values(model: nn.Module, heads: Iterable[ValueHeads], generator: torch.Generator) -> Rewrites:
    """The values of all heads of a layer are multiplied by one rotation, and the means of values by its
    inverse: what is shared by several heads (grouped queries) may be."""
    rewrites = Rewrites()
    for one in heads:
        width = one.rows.shape[1]
        rotate = random_rotation(width, generator)
        change = partial(_rotate_rows, rows=one.rows.unique(dim=0), rotate=rotate)
        rewrites.modules[one.producer].columns["weight"] = [change]
        if model.get_submodule(one.producer)._parameters.get("bias") is not None:
            rewrites.modules[one.producer].rows["bias"] = [change]
        rewrites.modules[one.consumer].rows["weight"] = [partial(_rotate_parts, width=width, rotate=rotate)]
    return rewrites


def _rotate_rows(x: Tensor, rows: Tensor, rotate: Rotation) -> Tensor:
    changed = x.clone()
    changed[..., rows] = rotate(x[..., rows])
    return changed


def _rotate_parts(x: Tensor, width: int, rotate: Rotation) -> Tensor:
    return rotate(x.unflatten(-1, (-1, width))).flatten(-2)


def rotate_online(
    model: nn.Module, layers: Iterable[str], widths: Mapping[str, int], generator: torch.Generator
) -> Rewrites:
    """The inputs of linear layers are rotated as they run, and their weights by the inverse.

    Args:
        model: the model.
        layers: paths of the layers.
        widths: path → channels of a head, where these are rotated already: the rest is across heads.
        generator: of the random signs.
    """
    rewrites = Rewrites()
    for path in layers:
        width, channels = widths.get(path, 1), model.get_submodule(path).get_parameter("weight").shape[1]
        if channels > width:
            rewrite = rewrites.modules[path]
            rewrite.attachment = Hadamard.random(channels // width, width, generator)
            rewrite.rows["weight"] = [rewrite.attachment]
    return rewrites


def _shared(model: nn.Module, rewrites: Rewrites) -> bool:
    """Whether two of the parameters that change are one."""
    names = [(path, name) for path, rewrite in rewrites.modules.items() for name in rewrite.names]
    counts = Counter(id(model.get_submodule(path).get_parameter(name)) for path, name in names)
    return any(count > 1 for count in counts.values())


def _set_untied(model: Any) -> None:
    """Let a model of transformers say that its head is no longer its embedding."""
    config = getattr(model, "config", None)
    for one in (config, config.get_text_config()) if config is not None else ():
        one.tie_word_embeddings = False
