"""Recorded calls of a denoiser: the inputs it had, equally many at every timestep, each image at few."""

from collections import Counter
from types import SimpleNamespace

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.rows import CallLayout
from ptq_diffusion.sampling import sample
from ptq_diffusion.schedules import set_scheduler
from ptq_diffusion.trajectories import TOGETHER, assign, collect, timesteps
from ptqcore import DataError, ModelError

PROMPTS = ("a cat", "two dogs on a hill")
PROBING = 2


def bare(denoiser=None, scheduler=None):
    return Loaded(denoiser or tiny.unet(), "denoiser", scheduler or DDIMScheduler())


def text():
    pipeline = tiny.text_to_image()
    return Loaded(pipeline.unet, "unet", pipeline.scheduler, pipeline)


def flow():
    pipeline = tiny.flow()
    return Loaded(pipeline.transformer, "transformer", pipeline.scheduler, pipeline)


def rows(recorded):
    """Timestep → rows of the samples there."""
    found = Counter()
    for call in recorded.calls:
        found[float(call.times[0])] += call.rows
    return dict(found)


def equal(one, two):
    if isinstance(one, DenoiserCall):
        return equal(dict(one.values), dict(two.values))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(equal(*pair) for pair in zip(one, two, strict=True))
    return one == two


def test_a_seed_is_carried_through_all_steps_once():
    recorded = collect(bare(), SamplingOptions(steps=10, batch=4), range(12), keep=2)
    assert recorded.denoiser_calls == 10 * 3 + PROBING
    assert rows(recorded) == {float(timestep): 2 for timestep in range(0, 1000, 100)}
    assert [float(call.times[0]) for call in recorded.calls] == [float(t) for t in range(900, -1, -100)]
    assert torch.equal(timesteps(recorded.calls), torch.arange(0, 1000, 100).float())


def test_what_is_recorded_is_what_the_denoiser_was_given():
    loaded, options, seeds = bare(), SamplingOptions(steps=5, batch=4), [3, 1, 4, 15, 9, 2, 6]
    samples = sample(loaded, options, seeds)
    noise = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    inputs = [torch.cat(noise), *samples.states[:-1]]
    recorded = collect(loaded, options, seeds, keep=3, seed=8)
    chosen = assign(loaded.scheduler.timesteps.tolist(), len(seeds), 3, seed=8)
    for step, call in enumerate(recorded.calls):
        expected = inputs[step][sorted(chosen[step])]
        given = call.values["sample"]
        order = [row.flatten().tolist() for row in given]
        assert sorted(order) == sorted(row.flatten().tolist() for row in expected)
        assert torch.equal(call.values["timestep"], loaded.scheduler.timesteps[step].expand(3))


@pytest.mark.parametrize("make", ["unet", "classes", "guided classes", "text", "flow"])
def test_recorded_calls_give_the_outputs_of_the_run(make):
    """`flow` has position tables with as many rows as there are images in a batch."""
    loaded = {"text": text, "flow": flow}.get(make, bare)()
    options = {"steps": 3, "batch": 4, "height": 8, "width": 8}
    if make == "classes":
        loaded = loaded.with_denoiser(tiny.unet(num_class_embeds=3))
    elif make == "guided classes":
        loaded = loaded.with_denoiser(tiny.dit())
        options |= {"guidance": 2.0}
    elif make in ("text", "flow"):
        options |= {"prompts": PROMPTS, "guidance": 4.0}
    outputs = {}

    def mark(call, row):
        conditions = [each[row].tolist() for each in call.conditions.values()]
        return repr((call.values[call.sample][row].tolist(), float(call.times.reshape(-1)[0]), conditions))

    def hook(denoiser, args, kwargs, output):
        call = DenoiserCall.of(denoiser, *args, **kwargs)
        for row in range(call.rows):
            outputs[mark(call, row)] = output[0][row].clone()

    handle = loaded.denoiser.register_forward_hook(hook, with_kwargs=True)
    recorded = collect(loaded, SamplingOptions(**options), range(9), keep=4)
    handle.remove()
    assert len(recorded.calls) == 3
    for call in recorded.calls:
        assert call.rows == (8 if make in ("guided classes", "text") else 4)
        with torch.no_grad():
            output = call.run(loaded.denoiser)[0]
        for row in range(call.rows):
            assert torch.allclose(output[row], outputs[mark(call, row)], atol=1e-5)


def test_both_halves_of_guidance_are_in_a_call():
    recorded = collect(text(), SamplingOptions(steps=2, prompts=PROMPTS, batch=3), range(6), keep=4)
    for call in recorded.calls:
        x, words = call.values["sample"], call.values["encoder_hidden_states"]
        assert torch.equal(x[:4], x[4:])
        assert torch.equal(words[0], words[1])
        assert len(torch.unique(words[4:].flatten(1), dim=0)) == 2


def test_networks_that_are_told_the_guidance_get_one_row():
    options = SamplingOptions(steps=2, prompts=PROMPTS, guidance=4.0, height=8, width=8)
    call = collect(flow(), options, range(4), keep=4).calls[0]
    assert call.values["guidance"].tolist() == [4.0] * 4
    assert call.values["img_ids"].shape == (4, 3)


def test_visits_of_a_timestep_share_its_images():
    options, seeds = SamplingOptions(steps=10), range(8)
    pndm = set_scheduler(
        bare(scheduler=DDIMScheduler(steps_offset=1)), "PNDMScheduler", skip_prk_steps=True
    )
    schedule = [901, 801, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    recorded = collect(pndm, options, seeds, keep=4)
    assert recorded.denoiser_calls == 11 + PROBING
    assert rows(recorded) == {float(timestep): 4 for timestep in schedule}
    chosen = assign(schedule, 8, 4, 0)
    assert [len(images) for images in chosen] == [4, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4]
    heun = collect(set_scheduler(bare(), "HeunDiscreteScheduler"), options, seeds, keep=4)
    assert heun.denoiser_calls == 19 + PROBING
    assert len(timesteps(heun.calls)) == 10
    assert set(rows(heun).values()) == {4}


@pytest.mark.parametrize(("keep", "sizes"), [(1, [1]), (16, [16]), (24, [12, 12]), (17, [1] * 17)])
def test_calls_of_a_timestep_are_equally_large(keep, sizes):
    recorded = collect(bare(), SamplingOptions(steps=2, batch=8), range(keep), keep)
    assert [call.rows for call in recorded.calls] == sizes * 2
    assert max(sizes) <= TOGETHER


def test_the_same_seeds_give_the_same_calls():
    options = SamplingOptions(steps=4, batch=5)
    one, two, other = (collect(bare(), options, range(9), keep=2, seed=seed).calls for seed in (0, 0, 1))
    assert all(equal(*pair) for pair in zip(one, two, strict=True))
    assert not all(equal(*pair) for pair in zip(one, other, strict=True))


def test_recorded_calls_are_the_callers_own():
    loaded = text()
    options = SamplingOptions(steps=3, prompts=PROMPTS, batch=2)
    one, two = (collect(loaded, options, range(4), keep=2).calls for _ in range(2))
    for call in one:
        for value in call.values.values():
            if isinstance(value, torch.Tensor):
                assert not value.requires_grad
                value.zero_()
    assert all(equal(*pair) for pair in zip(two, collect(loaded, options, range(4), 2).calls, strict=True))
    assert not loaded.denoiser._forward_pre_hooks


def test_more_images_than_are_sampled_cannot_be_kept():
    with pytest.raises(DataError, match="5 images are to be kept at every timestep, and 4 are sampled"):
        collect(bare(), SamplingOptions(steps=2), range(4), keep=5)
    with pytest.raises(DataError, match="0 images"):
        collect(bare(), SamplingOptions(steps=2), range(4), keep=0)


@given(
    schedule=st.lists(st.floats(0, 999), min_size=1, max_size=12),
    images=st.integers(1, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_images_are_assigned_evenly(schedule, images, share, seed):
    keep = 1 + int(share * (images - 1))
    chosen = assign(schedule, images, keep, seed)
    assert chosen == assign(schedule, images, keep, seed)
    at = {timestep: [] for timestep in schedule}
    for timestep, kept in zip(schedule, chosen, strict=True):
        at[timestep] += kept
    assert all(len(kept) == len(set(kept)) == keep for kept in at.values())
    visits = Counter(schedule)
    for timestep, kept in zip(schedule, chosen, strict=True):
        assert len(kept) in (keep // visits[timestep], -(-keep // visits[timestep]))
    used = Counter(image for kept in at.values() for image in kept)
    counts = [used[image] for image in range(images)]
    assert sum(counts) == keep * len(visits)
    assert max(counts) - min(counts) <= 1


class TwoNetworks:
    """As Wan 2.2: one network for early steps and another for late ones, guidance in two calls; texts are
    as long as the longest of a batch."""

    def __init__(self, restless=False):
        self.early, self.late = tiny.text_to_image().unet, tiny.text_to_image().unet
        self.scheduler, self.restless = DDIMScheduler(clip_sample=False), restless
        self.components = {"early": self.early, "late": self.late, "scheduler": self.scheduler, "vae": None}

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, num_inference_steps, generator, output_type):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generator])
        words = torch.zeros(len(prompt), max(map(len, prompt)), tiny.WIDTH)
        for row, line in enumerate(prompt):
            words[row, : len(line)] = len(line)
        for timestep in self.scheduler.timesteps:
            network = self.early if timestep >= 500 else self.late
            noise = network(x, timestep, encoder_hidden_states=words).sample
            free = network(x, timestep, encoder_hidden_states=torch.zeros(len(x), 3, tiny.WIDTH)).sample
            if self.restless and timestep < 300:
                network(x, timestep, encoder_hidden_states=words)
            x = self.scheduler.step(free + 2 * (noise - free), timestep, x).prev_sample
        return SimpleNamespace(images=x.movedim(1, -1).numpy())


@pytest.mark.parametrize(("component", "given"), [("early", [800, 600]), ("late", [400, 200, 0])])
def test_a_denoiser_of_some_steps_only(component, given):
    pipeline = TwoNetworks()
    loaded = Loaded(getattr(pipeline, component), component, pipeline.scheduler, pipeline)
    recorded = collect(loaded, SamplingOptions(steps=5, prompts=("one",), batch=4), range(8), keep=4)
    assert rows(recorded) == dict.fromkeys(given, 2 * 4)
    words, free = recorded.calls[0], recorded.calls[1]
    assert torch.equal(words.values["sample"], free.values["sample"])
    assert words.values["encoder_hidden_states"].any()
    assert not free.values["encoder_hidden_states"].any()


def test_texts_of_other_lengths_are_not_put_together():
    pipeline = TwoNetworks()
    loaded = Loaded(pipeline.early, "early", pipeline.scheduler, pipeline)
    options = SamplingOptions(steps=1, prompts=("one", "three"), batch=1)
    pipeline.scheduler.register_to_config(timestep_spacing="trailing")
    calls = collect(loaded, options, range(4), keep=4).calls
    lengths = sorted(call.values["encoder_hidden_states"].shape for call in calls)
    assert lengths == [(2, 3, tiny.WIDTH), (2, 5, tiny.WIDTH), (4, 3, tiny.WIDTH)]


def test_more_calls_in_some_steps_than_in_the_first():
    pipeline = TwoNetworks(restless=True)
    loaded = Loaded(pipeline.late, "late", pipeline.scheduler, pipeline)
    with pytest.raises(ModelError, match="more often in some steps than in the first"):
        collect(loaded, SamplingOptions(steps=5, prompts=("one",)), range(2), keep=1)


def test_a_denoiser_that_is_not_called():
    pipeline = TwoNetworks()
    loaded = Loaded(tiny.unet(), "unet", pipeline.scheduler, pipeline)
    with pytest.raises(ModelError, match="does not call its component 'unet'"):
        collect(loaded, SamplingOptions(steps=5, prompts=("one",)), range(2), keep=1)


def call(**values):
    return DenoiserCall(values, "t", "x")


def joined(one, two, both, images):
    """The values of some images of a call for several, put together again."""
    layout = CallLayout.of(one, two)
    return layout.join(layout.take(both, images, 3))


def test_rows_of_images_in_nested_values_and_lists():
    def made(images):
        n = len(images)
        number = torch.tensor(images, dtype=torch.float32)
        halves = torch.cat([-number, number])
        return call(
            x=halves[:, None],
            t=torch.tensor(3.0),
            frames=halves.repeat_interleave(2)[:, None],
            each=[(i, h) for h in (0, 1) for i in images],
            more={"size": number, "table": torch.arange(4 * n)[:4], "scale": 2.0},
            pair=(halves, torch.zeros(5)),
            nothing=None,
        )

    values = joined(made([7]), made([7, 7]), made([1, 2, 3]), [0, 2])
    expected = made([1, 3]).values
    assert list(values) == list(expected)
    assert all(equal(values[name], expected[name]) for name in expected)


def test_what_is_kept_does_not_change_with_the_call():
    def made(images):
        return call(
            x=torch.ones(images, 2), t=torch.tensor(3.0), table=torch.ones(5), each=[torch.ones(1)] * images
        )

    layout, whole = CallLayout.of(made(1), made(2)), made(3)
    (kept,) = layout.take(whole, [1], 3)
    for tensor in (whole.values["x"], whole.values["t"], whole.values["table"], *whole.values["each"]):
        tensor.zero_()
    assert equal(kept, dict(made(1).values))


def test_calls_that_cannot_be_split_into_images():
    one, two = torch.zeros(1, 3), torch.zeros(2, 3)
    with pytest.raises(ModelError, match=r"3 parts as 'more.ids' for one image, but 4 for two"):
        CallLayout.of(
            call(x=one, t=0, more={"ids": torch.zeros(3)}), call(x=two, t=0, more={"ids": torch.zeros(4)})
        )
    with pytest.raises(ModelError, match="called in another way for two images"):
        CallLayout.of(call(x=one, t=0), call(x=two, t=0, mask=None))
    with pytest.raises(ModelError, match="64 rows for one image"):
        CallLayout.of(call(x=torch.zeros(64, 2), t=0), call(x=torch.zeros(128, 2), t=0))
    layout = CallLayout.of(call(x=two, t=0), call(x=torch.zeros(4, 3), t=0))
    with pytest.raises(ModelError, match="3 rows for 3 images in some steps, but 6 in the first"):
        layout.take(call(x=torch.zeros(3, 3), t=0), [0], 3)
