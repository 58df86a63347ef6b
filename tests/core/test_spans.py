"""Spans: blocks that are quantized one by one, finished together, and walked again."""

from typing import ClassVar

import pytest
import torch
from tiny_task import run, weights_of
from torch import nn

from ptqcore.artifact import restore
from ptqcore.rounding import Round
from ptqcore.step import StepOptions

BLOCKS = 7


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x).relu()


class Net(nn.Module):
    """Blocks in a row, with a function between each two, and one in place."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(BLOCKS))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * 0.9
            x += 0.1
        return x

    def behind(self, last, x):
        """What flows out of a block."""
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == last:
                return x
            x = x * 0.9 + 0.1
        return None


def make():
    torch.manual_seed(0)
    return Net().eval()


SAMPLES = [torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)) for rows in (2, 3, 5)]
PATHS = [f"layers.{number}" for number in range(BLOCKS)]


class SpanOptions(StepOptions):
    """size: of a span."""

    size: int = 3


class Together(Round):
    """Rounds, notes what it is given behind a span, and shifts the biases there, so that what flows on is
    another."""

    name = "together"
    stage: ClassVar = None
    needs_exact = True
    Options: ClassVar = SpanOptions
    seen: ClassVar[list] = []
    fails_at: ClassVar[str | None] = None

    def __init__(self, options, context):
        super().__init__(options, context)
        self.span = options.size

    def prepare(self, model, flow, run):
        self.model = model

    def block(self, block, calibration):
        if block.path == Together.fails_at:
            raise KeyboardInterrupt
        super().block(block, calibration)

    def finish_span(self, blocks, chain):
        with torch.no_grad():
            before = [chain.run(sample)[0].clone() for sample in range(chain.samples)]
            for block in blocks:
                for layer in block.quantized_layers().values():
                    layer.bias.add_(torch.tensor([float(torch.stack([x.mean() for x in before]).mean())]))
            after = [chain.run(sample)[0] for sample in range(chain.samples)]
            last = PATHS.index(blocks[-1].path)
            Together.seen.append(
                {
                    "paths": [block.path for block in blocks],
                    "exact": [tensors[0].clone() for tensors in chain.exact],
                    "changed": not torch.equal(before[0], after[0]),
                    "chain": after,
                    "model": [self.model.behind(last, sample) for sample in SAMPLES],
                }
            )
        return [float(len(blocks)), 1.0]


STEPS = {"together": f"{__name__}:Together", "alone": f"{__name__}:Alone"}


class Alone(Round):
    """A step of one block at a time beside it."""

    name = "alone"
    stage: ClassVar = None
    calls: ClassVar[list] = []

    def block(self, block, calibration):
        pass

    def finish_span(self, blocks, chain):
        Alone.calls.append(len(blocks))
        return []


@pytest.fixture(autouse=True)
def _afresh():
    Together.seen.clear()
    Alone.calls.clear()
    Together.fails_at = None


def quantized(folder, size, resume=False, step=None):
    step = step or {"together": {"size": size}}
    return run(folder, make, SAMPLES, step, steps=STEPS, resume=resume)


@pytest.mark.parametrize(
    ("size", "lengths"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (7, [7]), (99, [7])]
)
def test_the_last_span_may_be_shorter_and_no_block_is_left_out(tmp_path, size, lengths):
    record = quantized(tmp_path / "out", size)
    assert [len(each["paths"]) for each in Together.seen] == lengths
    assert [path for each in Together.seen for path in each["paths"]] == PATHS
    assert [block.path for block in record.blocks] == PATHS
    assert [layer.path for layer in record.layers] == [f"{path}.inner" for path in PATHS]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_chain_is_the_model_so_far_and_its_target_the_full_precision_model(tmp_path, size):
    quantized(tmp_path / "out", size)
    for each in Together.seen:
        assert each["changed"]
        torch.testing.assert_close(each["chain"], each["model"])
        last = PATHS.index(each["paths"][-1])
        with torch.no_grad():
            torch.testing.assert_close(each["exact"], [make().behind(last, x) for x in SAMPLES])


@pytest.mark.parametrize("size", [2, 3, 7])
def test_what_flows_into_the_next_span_is_what_the_finished_one_gives(tmp_path, size):
    """The biases of each span depend on what flows in: a model computed span by span has the same."""
    quantized(tmp_path / "out", size)
    model = restore(tmp_path / "out", lambda _: make())
    with torch.no_grad():
        whole = [model.behind(BLOCKS - 1, x) for x in SAMPLES]
    torch.testing.assert_close(Together.seen[-1]["chain"], whole)


def test_losses_go_to_the_last_block_of_a_span(tmp_path):
    record = quantized(tmp_path / "out", 3)
    assert [block.losses for block in record.blocks] == [(), (), (3.0, 1.0)] * 2 + [(1.0, 1.0)]


def test_the_longest_span_of_the_steps_is_every_steps(tmp_path):
    quantized(tmp_path / "out", 4, step=[{"together": {"size": 4}}, "alone"])
    assert Alone.calls == [4, 3]


@pytest.mark.parametrize("fails_at", PATHS)
def test_an_interrupted_run_repeats_the_span_and_gives_the_same_bytes(tmp_path, fails_at):
    quantized(tmp_path / "whole", 3)
    Together.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "resumed", 3)
    Together.fails_at = None
    Together.seen.clear()
    record = quantized(tmp_path / "resumed", 3, resume=True)
    finished = PATHS.index(fails_at) // 3 * 3
    assert [path for each in Together.seen for path in each["paths"]] == PATHS[finished:]
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")
    assert [block.losses for block in record.blocks] == [(), (), (3.0, 1.0)] * 2 + [(1.0, 1.0)]


def test_a_span_of_which_only_a_part_was_saved_is_repeated_whole(tmp_path):
    quantized(tmp_path / "whole", 3)
    Together.fails_at = PATHS[6]
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "resumed", 3)
    (tmp_path / "resumed/.work/block-0005.json").unlink()
    Together.fails_at = None
    Together.seen.clear()
    quantized(tmp_path / "resumed", 3, resume=True)
    assert [each["paths"] for each in Together.seen] == [PATHS[3:6], PATHS[6:]]
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")
