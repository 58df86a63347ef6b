"""Plans: in which order steps make sense, and what is said of those that do not."""

from itertools import pairwise, permutations
from typing import get_args

import pytest

from ptqcore.errors import RecipeError
from ptqcore.plan import make_plan
from ptqcore.plugin import Installed, Plugin, Registry
from ptqcore.recipe import Recipe, validate
from ptqcore.step import Stage, Step

STAGES = ("transform", "range", "quantize", "correct")


def step_of(title, what):
    """A step of a stage."""
    return type(title, (Step,), {"name": title, "stage": what, "__module__": __name__})


ALL = [step_of(f"{what[0]}{number}", what) for what in STAGES for number in (1, 2)]
ALL += [type("a1", (Step,), {"name": "a1", "__module__": __name__})]
globals().update({step.name: step for step in ALL})  # found by import path, as a plugin's


@pytest.fixture(scope="module")
def registry():
    steps = {step.name: f"{__name__}:{step.name}" for step in ALL}
    plugin = Plugin("tiny", tasks={"tiny": "tiny_task:TinyTask"}, steps=steps)
    return Registry([Installed("tiny", "ptq-tiny", "1.0", plugin)])


def plan(registry, *steps):
    quant = {"weights": {"bits": 4, "granularity": "channel"}}
    data = {"name": "tiny", "task": {"kind": "tiny"}, "quant": quant, "steps": list(steps)}
    return make_plan(validate(Recipe, data), "tiny", registry)


def test_the_stages_are_these_in_this_order():
    assert get_args(Stage) == STAGES


@pytest.mark.parametrize(
    "steps",
    [
        ["q1"],
        ["t1", "q1"],
        ["t1", "t2", "r1", "q1", "c1"],
        ["t2", "t1", "r1", "r2", "q2", "c1", "c2"],
        ["a1"],
        ["a1", "t1", "q1"],
        ["t1", "q1", "a1"],
        ["t1", "a1", "c1"],  # a step of no stage may quantize
    ],
)
def test_transforms_then_ranges_then_one_quantizer_then_corrections(registry, steps):
    assert [kind.name for kind, _ in plan(registry, *steps).step_classes] == steps


@pytest.mark.parametrize("order", list(permutations(["t1", "r1", "q1", "c1"]))[1:])
def test_every_other_order_is_refused_with_the_two_steps_named(registry, order):
    with pytest.raises(RecipeError, match="makes no sense: put it before") as caught:
        plan(registry, *order)
    place = "trqc".index
    wrong = next((a, b) for a, b in pairwise(order) if place(a[0]) > place(b[0]))
    assert str(caught.value).startswith(f"recipe key 'steps': {wrong[1]} (")
    assert f"behind {wrong[0]} (" in str(caught.value)


def test_a_step_of_no_stage_between_does_not_hide_a_senseless_order(registry):
    with pytest.raises(RecipeError, match=r"t1 .* behind q1"):
        plan(registry, "q1", "a1", "t1")


@pytest.mark.parametrize("steps", [["q1", "q2"], ["q1", "q1"], ["t1", "q1", "a1", "q2"]])
def test_two_steps_that_quantize_are_refused(registry, steps):
    with pytest.raises(RecipeError, match=r"q1 and q\d both quantize the weights: keep one"):
        plan(registry, *steps)


@pytest.mark.parametrize("steps", [["t1"], ["r1"], ["c1"], ["t1", "r1", "c1"]])
def test_without_a_step_that_quantizes_a_recipe_is_refused(registry, steps):
    with pytest.raises(
        RecipeError, match="no step quantizes the weights: add one that does, for example round"
    ):
        plan(registry, *steps)
