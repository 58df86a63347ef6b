"""Inputs that are rounded while the temporal block learns are rounded as they then are at each timestep."""

import pytest
import torch
from torch import nn

from ptq_diffusion.temporal_rounding import rounded_by_row, rounding, squared_error
from ptqcore import FakeQuant, QuantSpec, Timesteps


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_as_by_a_range_for_each_timestep(bits, symmetric):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    kind = {"granularity": "timestep", "timesteps": 5, "of_timestep": True}
    deployed = FakeQuant(QuantSpec(bits=bits, symmetric=symmetric, **kind))
    deployed.set_range(x.amin(1), x.amax(1))
    with Timesteps.of(range(5), "timestep").during(torch.arange(5.0)):
        wanted = deployed(x)
    torch.testing.assert_close(
        rounded_by_row(x, QuantSpec(bits=bits, symmetric=symmetric, granularity="channel")), wanted
    )


def test_layers_compute_with_rounded_inputs_for_a_while():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(6, 4)
    spec = QuantSpec(bits=2, granularity="channel")
    before = model(x)
    with rounding(model, {"1": spec}):
        assert torch.equal(model(x), model[1](rounded_by_row(model[0](x), spec)))
    assert torch.equal(model(x), before)


def test_gradients_pass_through_what_is_rounded():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(6, 4)
    with rounding(model, {"1": QuantSpec(granularity="channel", symmetric=False)}):
        model(x).sum().backward()
    wanted = model[1].weight.detach().sum(0)
    torch.testing.assert_close(model[0].bias.grad, 6 * wanted)


def test_the_error_is_summed_over_features_and_averaged_over_timesteps():
    predicted = [torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0], [1.0]])]
    target = [torch.zeros(2, 2), torch.zeros(2, 1)]
    assert float(squared_error(predicted, target)) == 5 / 2 + 10 / 2
