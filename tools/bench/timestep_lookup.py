"""What it costs a denoiser to look up activation ranges for each timestep, as a share of its calls.

    python tools/bench/timestep_lookup.py [--full-size]

Two copies of a network have the same layers with the same weights of 4 bits and inputs of 8 bits; one has
a range for each of 20 timesteps at the inputs of its temporal block, or of all its layers, the other one
range for all. Both are called in turn, and medians of CPU time are compared. Such differences are small
beside the noise of a call, so that look-ups are also timed on their own: the entry of a call, where the
timestep is found among those that are known, and what all quantizers do more than with one range. Their
share is that of a call with one range for all.

`sd-structure` is a small network of random weights with the layers of Stable Diffusion 1.x. Its calls are
far cheaper than those of the original, its look-ups are not: with --full-size (4 GB of memory) they are
also related to a call of a network of that size, of random weights in full precision, for one image of 512
pixels.
"""

import argparse
import copy
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ptq_diffusion import pipelines
from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import find_temporal
from ptqcore import Block, FakeQuant, MinMax, QuantizedTensor, QuantSpec, Timesteps, trace, weight_rows
from ptqcore.modules import quantizable_layers
from ptqcore.progress import say

STEPS = 20
_WEIGHTS = QuantSpec(bits=4, symmetric=False, granularity="channel")
_ONE = QuantSpec(bits=8, symmetric=False)
_EACH = QuantSpec(bits=8, symmetric=False, granularity="timestep", timesteps=STEPS)
_TIMES = [float(1000 // STEPS * step) for step in range(STEPS)]


@dataclass(frozen=True)
class Network:
    """A float denoiser, and how many channels and pixels what it is called with has."""

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    text: tuple[int, ...] = ()

    def call(self, rows: int) -> DenoiserCall:
        """A call at a known timestep, the same for all rows."""
        generator = torch.Generator().manual_seed(0)
        values: dict[str, Any] = {
            "sample": torch.randn(rows, *self.shape, generator=generator),
            "timestep": torch.tensor(int(_TIMES[STEPS // 2])),
        }
        if self.text:
            values["encoder_hidden_states"] = torch.randn(rows, *self.text, generator=generator)
        return DenoiserCall(values, "timestep", "sample")


@dataclass(frozen=True)
class Lookup:
    """CPU-seconds: of a call with one range for all timesteps, of one with a range for each, and of what
    look-ups do on their own, at the entry of a call and in all `layers` that have such ranges."""

    layers: int
    without: float
    with_ranges: float
    entry: float
    inside: float

    @property
    def share(self) -> float:
        """Of look-ups on their own in a call."""
        return (self.entry + self.inside) / self.without


def embedded() -> Network:
    """The denoiser of digits that comes with ptq-diffusion."""
    return Network("mnist-unet", pipelines.load("mnist-unet").denoiser, (1, 16, 16))


def like_stable_diffusion(small: bool = True) -> Network:
    """A network of random weights with the layers of Stable Diffusion 1.x, in its size or a small one."""
    if small:
        sizes = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8}
        return Network("sd-structure", UNet2DConditionModel(**sizes).eval(), (4, 16, 16), (77, 32))
    model = UNet2DConditionModel(cross_attention_dim=768).eval()
    return Network("sd-size", model, (4, 64, 64), (77, 768))


def quantized(model: nn.Module, by_timestep: Collection[str] = ()) -> nn.Module:
    """A copy with all layers quantized, the inputs of some with a range for each timestep."""
    model = copy.deepcopy(model).requires_grad_(False)
    for path, layer in quantizable_layers(model, "").items():
        observer, weight = MinMax(_WEIGHTS), weight_rows(layer).detach()
        observer.update(weight.flatten(1))
        rounded = QuantizedTensor.from_range(weight, *observer.range(), _WEIGHTS)
        spec = _EACH if path in by_timestep else _ONE
        quantizer = Block(model, "").quantize_layer(path, rounded, spec).input_quantizer
        assert quantizer is not None
        ends = torch.full((spec.timesteps or 1,), 4.0)
        quantizer.set_range(-ends, ends)
    if by_timestep:
        Timesteps.of(_TIMES, "timestep").attach(model)
    return model


def temporal_block(network: Network) -> tuple[str, ...]:
    """The layers of the temporal block."""
    model, call = network.model, network.call(2)
    return find_temporal(model, trace(model, lambda: call.run(model)), call).block


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU-seconds of each of so many times."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return found


@torch.no_grad()
def measure(network: Network, by_timestep: Collection[str], rows: int, repeats: int) -> Lookup:
    """Calls of so many rows, of both copies in turn."""
    one, each = quantized(network.model), quantized(network.model, by_timestep)
    call = network.call(rows)
    call.run(one)
    call.run(each)  # the dequantized weights are made in the first call
    turns: list[tuple[nn.Module, list[float]]] = [(one, []), (each, [])]
    for _ in range(repeats):
        turns.reverse()  # neither copy is always the second
        for model, found in turns:
            found += seconds(partial(call.run, model), 1)
    times = {id(model): median(found) for model, found in turns}
    entry = _entry_seconds(call, repeats)
    inside = _inside_seconds(each, call, repeats) - _inside_seconds(one, call, repeats, by_timestep)
    return Lookup(len(by_timestep), times[id(one)], times[id(each)], entry, inside)


class _Nothing(nn.Module):
    """A denoiser that computes nothing."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def _entry_seconds(call: DenoiserCall, repeats: int) -> float:
    """What a call takes longer in which a timestep is looked up."""
    plain, attached = _Nothing(), _Nothing()
    Timesteps.of(_TIMES, "timestep").attach(attached)
    sample, timestep = call.values["sample"], call.times
    found = [_each(partial(model, sample, timestep), repeats) for model in (plain, attached)]
    return found[1] - found[0]


def _inside_seconds(
    model: nn.Module, call: DenoiserCall, repeats: int, paths: Collection[str] | None = None
) -> float:
    """What all quantizers with a range for each timestep, or those of some layers, take to find theirs."""
    named = {path: module for path, module in model.named_modules() if isinstance(module, FakeQuant)}
    quantizers = [
        module
        for path, module in named.items()
        if (module.spec.timesteps if paths is None else path.rpartition(".")[0] in paths)
    ]
    sample = call.values["sample"]
    known = Timesteps.of(_TIMES, "timestep")
    with known.during(call.times):
        return _each(lambda: [quantizer.parameters_for(sample) for quantizer in quantizers], repeats)


def _each(work: Callable[[], object], repeats: int, together: int = 20) -> float:
    """Median of the CPU-seconds of what is too short for the clock."""

    def several() -> None:
        for _ in range(together):
            work()

    several()
    return median(seconds(several, repeats)) / together


def main() -> None:
    """Measure everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100, help="calls of each copy")
    parser.add_argument("--full-size", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title="look-ups of ranges for each timestep, CPU time of one thread")
    for name in ("network", "ranges", "layers", "rows", "call ms", "with them"):
        table.add_column(name, justify="left" if name in ("network", "ranges") else "right")
    for name in ("entry µs", "layers µs", "share"):
        table.add_column(name, justify="right")
    for network, sizes in ((embedded(), (1, 32)), (like_stable_diffusion(), (1,))):
        scopes = {"temporal": temporal_block(network), "all": tuple(quantizable_layers(network.model, ""))}
        for scope, paths in scopes.items():
            for rows in sizes:
                say(f"{network.name}, {scope}, {rows} rows")
                found = measure(network, paths, rows, options.repeats)
                table.add_row(network.name, scope, str(found.layers), str(rows), *_shown(found))
    if options.full_size:
        table.caption = _related(found.entry + found.inside)
    Console(width=120).print(table)


def _shown(found: Lookup) -> list[str]:
    return [
        f"{found.without * 1e3:.2f}",
        f"{found.with_ranges / found.without - 1:+.1%}",
        f"{found.entry * 1e6:.0f}",
        f"{found.inside * 1e6:.0f}",
        f"{found.share:.2%}",
    ]


@torch.no_grad()
def _related(lookups: float) -> str:
    """Look-ups of all layers beside a call of a network of Stable Diffusion's size."""
    network = like_stable_diffusion(small=False)
    call = network.call(1)
    took = min(seconds(lambda: call.run(network.model), 2))
    return (
        f"a full-precision call in the size of Stable Diffusion 1.x, one image of 512 pixels: {took:.1f}\n"
        f"s, of which the look-ups of all layers of sd-structure are {lookups / took:.3%}"
    )


if __name__ == "__main__":
    main()
