"""A model that was probed comes back as it was, and a pass that is not the call's is refused."""

import pytest
import torch
from tiny_denoisers import build, call_of, rand, traced
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import find_temporal
from ptqcore import ModelError


def test_the_model_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = build("unet", dropout=0.5)
    model.mid_block.train()
    model.time_embedding.linear_1.weight.data.zero_()
    model.conv_in.weight.requires_grad_(False)
    model.conv_out.weight.grad = rand(*model.conv_out.weight.shape)
    grad = model.conv_out.weight.grad
    parameters = dict(model.named_parameters())
    bits = {name: value.detach().clone() for name, value in parameters.items()}
    versions = {name: value._version for name, value in parameters.items()}
    modes = {name: module.training for name, module in model.named_modules()}
    call = call_of("unet", model)
    flow = traced(model, call)
    state = torch.get_rng_state()
    find_temporal(model, flow, call)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(torch.equal(value, bits[name]) for name, value in parameters.items())
    assert {name: value._version for name, value in parameters.items()} == versions
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert not model.conv_in.weight.requires_grad
    assert model.conv_in.bias.requires_grad
    assert model.conv_out.weight.grad is grad
    assert torch.equal(grad, rand(*grad.shape))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.layer = nn.Linear(4, 4)
        self.fails = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.fails:
            raise RuntimeError("out of memory")
        return self.layer(x) + t[:, None]


def test_buffers_come_back_and_so_does_all_after_an_error() -> None:
    model = Counting()
    call = DenoiserCall.of(model, rand(2, 4), torch.tensor([5.0, 6.0]))
    flow = traced(model, call)
    find_temporal(model, flow, call)
    assert model.calls == 1
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        find_temporal(model, flow, call)
    assert model.calls == 1
    assert model.training
    assert model.layer.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_of_another_call_is_refused() -> None:
    model = build("unet")
    small = DenoiserCall.of(model, rand(1, 3, 8, 8), torch.tensor([500]))
    with pytest.raises(ModelError, match=r"got tensors of shapes .*, the call has .*: trace the model"):
        find_temporal(model, traced(model, small), call_of("unet", model))
