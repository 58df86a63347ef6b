"""Tensors that stay in their file, and modules made of them."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptqcore import (
    ArtifactError,
    ModelError,
    as_type,
    digest_of,
    is_on_disk,
    tensors_on_disk,
    without_memory,
)
from ptqcore import on_disk as module
from ptqcore.on_disk import OnDisk, in_memory, load, pieces, storage_of

_WIDTH = 160  # of matrices that are not small enough to be read at once


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(300, _WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 300)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(_network().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def network(file: Path) -> nn.Sequential:
    with without_memory():
        made = _network()
    assert all(parameter.is_meta for parameter in made.parameters())
    made.load_state_dict(tensors_on_disk(file), assign=True)
    return made


def test_only_small_tensors_are_in_memory(network: nn.Sequential) -> None:
    kinds = {name: isinstance(tensor, OnDisk) for name, tensor in network.named_parameters()}
    assert kinds == {"0.weight": True, "1.weight": True, "1.bias": False, "3.weight": True, "3.bias": False}
    assert is_on_disk(network)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_network_computes_the_same(network: nn.Sequential, mode: type) -> None:
    tokens = torch.arange(12).view(3, 4)
    with mode():
        assert torch.equal(network(tokens), _network()(tokens))


def test_gradients_flow_through_weights_on_disk(network: nn.Sequential) -> None:
    x, y = (torch.ones(2, _WIDTH, requires_grad=True) for _ in range(2))
    network[3](x).square().sum().backward()
    _network()[3](y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_the_digest_is_that_of_the_tensors_in_memory(network: nn.Sequential) -> None:
    assert digest_of(dict(network.state_dict())) == digest_of(dict(_network().state_dict()))


def test_loaded_weights_are_plain_parameters(network: nn.Sequential) -> None:
    load(network)
    assert not is_on_disk(network)
    assert all(type(parameter) is nn.Parameter for parameter in network.parameters())
    assert torch.equal(network[3].weight, _network()[3].weight)


def test_loading_keeps_shared_weights_shared(network: nn.Sequential) -> None:
    network[3].weight = network[0].weight
    load(network)
    assert network[3].weight is network[0].weight


def test_a_copy_of_a_network_reads_the_same_file(network: nn.Sequential) -> None:
    other = copy.deepcopy(network)
    assert storage_of(other[1].weight) == storage_of(network[1].weight) != storage_of(network[3].weight)


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x.copy_(x + 1), lambda x: x.data.zero_()])
def test_nobody_writes_into_a_file(network: nn.Sequential, write) -> None:
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match=r"a weight that lies on disk .*leave it out"),
    ):
        write(network[1].weight)


def test_they_can_be_written_from(network: nn.Sequential) -> None:
    target = torch.zeros(_WIDTH, _WIDTH)
    target.copy_(network[1].weight.detach())
    target.add_(network[1].weight.detach())
    assert torch.equal(target, _network()[1].weight.detach() * 2)


def test_another_type_is_made_when_they_are_read(network: nn.Sequential) -> None:
    half = as_type(network[1].weight, torch.bfloat16)
    assert isinstance(half, OnDisk)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half + 0, _network()[1].weight.bfloat16())


def test_a_lookup_reads_rows_alone(network: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Place, "read", lambda _: pytest.fail("the whole matrix was read"))
    tokens = torch.tensor([[7, 299], [0, 7]])
    assert torch.equal(network[0](tokens), _network()[0](tokens))
    assert network[0](torch.zeros(0, dtype=torch.long)).shape == (0, _WIDTH)


def test_large_ones_are_read_in_pieces(network: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 7 * _WIDTH * 4)
    monkeypatch.setattr(module.Place, "read", lambda _: pytest.fail("the whole matrix was read"))
    parts = list(pieces(network[3].weight))
    assert {len(part) for part in parts} == {7, 300 % 7}
    assert torch.equal(torch.cat(parts), _network()[3].weight)
    x = torch.randn(5, _WIDTH)
    torch.testing.assert_close(network[3](x), _network()[3](x))


def test_other_shapes_are_one_piece(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "some.safetensors")
    found = tensors_on_disk(tmp_path / "some.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(torch.cat([part.view(-1) for part in pieces(found[name])]), tensor.view(-1))


def test_a_file_that_was_cut_short_is_one_sentence(network: nn.Sequential, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"can no longer be read: it has become shorter"):
        in_memory(network[1].weight)


def test_a_file_that_is_gone_is_one_sentence(network: nn.Sequential, file: Path) -> None:
    file.unlink()
    with pytest.raises(ArtifactError, match=r"can no longer be read: .*No such file"):
        network(torch.arange(3))
