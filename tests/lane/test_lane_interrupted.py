"""Selective focus learns a whole network for minutes: a run killed meanwhile goes on in the middle."""

import pytest
from toy_lanes import write_pictures

import ptqcore
from ptq_lane.objective import LaneObjective
from ptqcore import midway

WARM, UPDATES = 8, 24


class Stopped(BaseException):
    """The end of a run, from within."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Of a small network, with images held out and sensitivities measured several times."""
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder, 20)
    learning = {
        "iterations": WARM + UPDATES,
        "warm_start": WARM / (WARM + UPDATES),
        "batch": 4,
        "pixels": 1.0,
        "held_out": 0.25,
        "judged": 6,
    }
    learning |= {"selection": {"evaluations": 5}}
    settings = {
        "task.family": "toy_lanes:Toy",
        "task.model": "toy_lanes:ToyNet",
        "task.calibration": 8,
        "task.images": folder,
        "export": "[]",
        "evaluate.baseline": "false",
        "steps": [{"focus-ranges": {}}, {"selective-focus": learning}],
    }
    return ptqcore.find_recipe("w4a4", "lane", [f"{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, ptqcore.quantize(recipe, "lane", folder)


def curves(record):
    """What the report draws of the run."""
    return [figure for figure in record.figures if isinstance(figure, ptqcore.Curves)]


@pytest.mark.parametrize("stop", [1, 5, 11, 16, 23])
def test_a_run_killed_in_the_middle_goes_on_with_the_same_weights_of_groups(
    recipe, whole, tmp_path, monkeypatch, stop
):
    made = []

    def before(self, updates, original=LaneObjective.before):
        if len(made) == stop:
            raise Stopped
        made.append(updates)
        original(self, updates)

    with monkeypatch.context() as patch:
        patch.setattr(midway, "SECONDS", 0.0)
        patch.setattr(LaneObjective, "before", before)
        with pytest.raises(Stopped):
            ptqcore.quantize(recipe, "lane", tmp_path)
        stop = None
        record = ptqcore.quantize(recipe, "lane", tmp_path, resume=True)
    folder, expected = whole
    assert made == list(range(UPDATES))
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert curves(record) == curves(expected) != []
    assert [block.losses for block in record.blocks] == [block.losses for block in expected.blocks]
