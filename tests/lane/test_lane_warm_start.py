"""A warm start: every block is learned against its own output, whatever the others do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from toy_lanes import Toy, write_pictures

import ptqcore
from ptq_lane.warm_start import BlockErrors

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


class Two(nn.Module):
    """Two blocks, and a sum between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.second(self.first(x) + 1)


@pytest.fixture
def learned():
    """The network, its changed weights that are learned, and a warm start."""
    network = Two().requires_grad_(False)
    weights = {f"{name}.weight": getattr(network, name).weight * 1.5 for name in ("first", "second")}
    for weight in weights.values():
        weight.requires_grad_()
    learner = SimpleNamespace(io=SimpleNamespace(batch=lambda samples, exact: ((X[samples],), {})))
    return network, weights, BlockErrors(learner, network, ["first", "second"])


def error(found, exact):
    return (found - exact).square().sum() / exact.square().sum()


def test_each_block_is_compared_with_what_it_returns_in_full_precision(learned):
    network, weights, objective = learned
    loss = objective.loss([functional_call(network, weights, X)], [], [0, 1])
    objective.close()
    made = functional_call(network.first, {"weight": weights["first.weight"]}, X)
    then = functional_call(network.second, {"weight": weights["second.weight"]}, made + 1)
    torch.testing.assert_close(loss, error(made, network.first(X)) + error(then, network(X)))


def test_no_block_answers_to_the_error_of_another(learned):
    network, weights, objective = learned
    objective.loss([functional_call(network, weights, X)], [], [0, 1]).backward()
    objective.close()
    alone = weights["first.weight"].detach().clone().requires_grad_()
    error(functional_call(network.first, {"weight": alone}, X), network.first(X)).backward()
    torch.testing.assert_close(weights["first.weight"].grad, alone.grad)


def test_once_it_is_closed_gradients_pass_again(learned):
    network, weights, objective = learned
    objective.close()
    functional_call(network, weights, X).sum().backward()
    assert weights["first.weight"].grad.abs().sum() > 0


class Slow(Toy):
    """A family that asks for a warm start."""

    warm_start = 0.25


@pytest.mark.parametrize(
    ("family", "option", "learned"),
    [("toy_lanes:Toy", "null", 20), ("toy_lanes:Toy", 0.5, 10), (f"{__name__}:Slow", "null", 15)],
)
def test_the_first_share_is_as_the_recipe_says_or_else_the_family(tmp_path, family, option, learned):
    write_pictures(tmp_path, 12)
    learning = f"{{iterations: 20, batch: 4, warm_start: {option}, selection: {{evaluations: 20}}}}"
    settings = {
        "task.family": family,
        "task.model": "toy_lanes:ToyNet",
        "task.calibration": 4,
        "task.images": tmp_path,
        "evaluate.baseline": "false",
        "steps": f"[{{selective-focus: {learning}}}]",
    }
    recipe = ptqcore.find_recipe("w4a4", "lane", [f"{key}={value}" for key, value in settings.items()])
    record = ptqcore.quantize(recipe, "lane", tmp_path / "run")
    (block,) = record.blocks
    assert len(block.losses) == 20
    (shares,) = [one for one in record.figures if getattr(one, "title", "").startswith("Sensitivity of")]
    assert list(shares.x) == list(range(learned))
