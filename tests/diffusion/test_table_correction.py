"""Tables that take the mean error of the sums that they are in, for each timestep."""

from typing import ClassVar

import pytest
import tiny_denoisers
import torch
from tiny_denoisers import rand
from torch import Tensor, nn

import ptqcore
from ptq_diffusion.table_correction import find_sum
from ptqcore import Plugin, Recipe, RecipeError, Task, TimestepTable, trace
from ptqcore.plugin import Installed, Registry
from ptqcore.recipe import validate

WIDTH = 4
TIMESTEPS = [10.0, 30.0, 70.0]


class Inner(nn.Module):
    """Adds a function of the time to one of x, and all that to x."""

    def __init__(self):
        super().__init__()
        self.mix, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU()

    def forward(self, x, emb):
        return x + self.act(self.mix(x) + self.time(emb))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Inner()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        emb = torch.cat([(timestep[:, None] / scale).sin() for scale in (1.0, 10.0, 100.0, 1000.0)], 1)
        return self.inner(self.first(x), emb)


class Denoise(Task):
    name = "denoise"
    given: ClassVar[list[dict[str, Tensor]]] = [
        {"x": rand(5, WIDTH, seed=seed), "timestep": torch.full((5,), TIMESTEPS[seed % 3])}
        for seed in range(6)
    ]

    def load_model(self):
        return Denoiser()

    def samples(self, model):
        return self.given

    def timestep(self, sample):
        return float(sample["timestep"][0])

    def evaluate(self, model):
        return {}

    def save_assets(self, folder):
        pass

    @classmethod
    def build(cls, folder):
        return Denoiser()


def quantized(folder, correction, **quant):
    plugin = Plugin(
        "tiny", tasks={"denoise": f"{__name__}:Denoise"}, steps={"tiar": "ptq_diffusion.tiar:TIAR"}
    )
    data = {
        "name": "x",
        "task": {"kind": "denoise"},
        "quant": {"weights": {"bits": 2, "granularity": "channel"}, **quant},
        "steps": [{"tiar": {"mode": "cache", "correction": correction}}, "round"],
    }
    registry = Registry([Installed("tiny", "ptq-tiny", "1.0", plugin)])
    ptqcore.quantize(validate(Recipe, data), "tiny", folder, registry=registry)
    return ptqcore.load(folder, Denoiser())


@torch.no_grad()
def test_a_row_takes_the_mean_error_of_what_it_is_added_to_at_its_timestep(tmp_path):
    plain, corrected = (quantized(tmp_path / str(each), each) for each in (False, True))
    exact = Denoiser()
    assert isinstance(corrected.inner.time, TimestepTable)
    for row, timestep in enumerate(TIMESTEPS):
        x = torch.cat([sample["x"] for sample in Denoise.given if sample["timestep"][0] == timestep])
        wanted = exact.inner.mix(exact.first(x)).mean(0)
        found = corrected.inner.mix(corrected.first(x)).mean(0)
        expected = plain.inner.time.table[row] + wanted - found
        torch.testing.assert_close(corrected.inner.time.table[row], expected)
        assert (wanted - found).abs().max() > 0.01


def _note(found, _, args):
    found.append(args[0])


@torch.no_grad()
def sums(model):
    """The mean of the sum [timesteps, channels]."""
    seen = {timestep: [] for timestep in TIMESTEPS}
    for sample in Denoise.given:
        found = seen[float(sample["timestep"][0])]
        handle = model.inner.act.register_forward_pre_hook(
            lambda _, args, found=found: found.append(args[0])
        )
        model(**sample)
        handle.remove()
    return torch.stack([torch.cat(found).mean(0) for found in seen.values()])


@pytest.mark.parametrize("bits", [None, 2])
def test_the_mean_of_the_sum_is_that_of_full_precision_at_every_timestep(tmp_path, bits):
    rounded = {} if bits is None else {"activations": {"bits": bits, "symmetric": False}}
    plain, corrected = (quantized(tmp_path / str(each), each, **rounded) for each in (False, True))
    torch.testing.assert_close(sums(corrected), sums(Denoiser()))
    assert (sums(plain) - sums(Denoiser())).abs().amin(0).max() > 0.01


def test_correction_is_for_tables(tmp_path):
    data = {"name": "x", "task": {"kind": "denoise"}, "quant": {"weights": {"bits": 2}}}
    chosen = validate(Recipe, data | {"steps": [{"tiar": {"correction": True}}, "round"]})
    plugin = Plugin(
        "tiny", tasks={"denoise": f"{__name__}:Denoise"}, steps={"tiar": "ptq_diffusion.tiar:TIAR"}
    )
    with pytest.raises(RecipeError, match="set mode to cache or auto"):
        ptqcore.quantize(
            chosen, "tiny", tmp_path, registry=Registry([Installed("tiny", "ptq-tiny", "1.0", plugin)])
        )


@pytest.mark.parametrize(("shift", "sums"), [("default", 8), ("scale_shift", 0)])
def test_features_that_are_only_added_are_found_on_the_map(shift, sums):
    model = tiny_denoisers.build("unet", resnet_time_scale_shift=shift)
    call = tiny_denoisers.call_of("unet", model)
    flow = tiny_denoisers.traced(model, call)
    features = tiny_denoisers.find_temporal(model, flow, call).features
    found = {path: find_sum(flow, path) for path in features}
    assert len(features) == 8
    assert sum(one is not None for one in found.values()) == sums
    for path, one in found.items():
        if one is not None:
            assert one.edge.site.owner == path.rpartition(".")[0]
            assert one.edge.site.name == "add"
            assert one.edge.site.ordinal == 0  # not that of the shortcut
            assert one.shape[2:] == (1, 1)


class Wired(nn.Module):
    def __init__(self, wire):
        super().__init__()
        self.time, self.wire = nn.Linear(WIDTH, WIDTH), wire

    def forward(self, x, emb):
        return self.wire(x, self.time(emb))


@pytest.mark.parametrize(
    "wire",
    [
        lambda x, y: x * y[:, :, None, None],
        lambda x, y: x + y[:, :, None, None] + y.sum(),
        lambda x, y: x + y.flip(1)[:, :, None, None],
        lambda x, y: x + y[:, [1, 0, 2, 3], None, None],
        lambda x, y: torch.add(x, y[:, :, None, None], alpha=2),
        lambda x, y: (x[:, :, :1, :1] + y[:, :, None, None]) * y[:, :, None, None],
        lambda x, y: y[:, :, None, None] + y[:, :, None, None] + x,
    ],
)
def test_what_is_more_than_added_is_left_alone(wire):
    model = Wired(wire)
    flow = trace(model, lambda: model(rand(2, WIDTH, 3, 3), rand(2, WIDTH)))
    assert find_sum(flow, "time") is None


def test_the_mean_is_over_what_the_feature_is_the_same_for():
    model = Wired(lambda x, y: x + y.view(2, WIDTH, 1, 1))
    flow = trace(model, lambda: model(rand(2, WIDTH, 3, 3), rand(2, WIDTH)))
    x = rand(6, WIDTH, 5, 5)
    torch.testing.assert_close(find_sum(flow, "time").per_row(x), x.double().mean((2, 3)))
