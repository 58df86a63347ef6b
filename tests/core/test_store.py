"""Tensors that outlive a loop: memory up to a budget, files beyond it."""

import gc
from pathlib import Path

import pytest
import torch

from ptqcore.errors import ArtifactError
from ptqcore.store import Store

KILOBYTE = 256  # float32 values


def test_within_the_budget_a_tensor_stays_what_it_is(tmp_path):
    store, tensor = Store(4096, tmp_path), torch.randn(KILOBYTE)
    assert store.keep(tensor) is tensor
    assert not store.in_files


def test_beyond_the_budget_a_tensor_lies_in_a_file(tmp_path):
    store, tensors = Store(2048, tmp_path), [torch.randn(2, KILOBYTE // 2) for _ in range(4)]
    kept = [store.keep(tensor) for tensor in tensors]
    assert [one is other for one, other in zip(kept, tensors, strict=True)] == [True, True, False, False]
    assert all(torch.equal(one, other) for one, other in zip(kept, tensors, strict=True))
    assert store.in_files


def test_a_file_goes_with_its_tensor(tmp_path):
    store = Store(0, tmp_path)
    kept = store.keep(torch.ones(2, KILOBYTE))
    read = kept + 1
    del kept
    gc.collect()
    assert torch.equal(read, torch.full((2, KILOBYTE), 2.0))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_memory_that_is_given_back_is_used_again(tmp_path):
    store = Store(1024, tmp_path)
    first = store.keep(torch.randn(KILOBYTE))
    del first
    gc.collect()
    second = torch.randn(KILOBYTE)
    assert store.keep(second) is second


def test_other_dtypes_shapes_and_empty_tensors_come_back_equal(tmp_path):
    store = Store(1, tmp_path)
    for tensor in (torch.arange(7), torch.randn(2, 3, 4).bfloat16(), torch.zeros(0, 3), torch.tensor(5.0)):
        kept = store.keep(tensor)
        assert kept.shape == tensor.shape
        assert kept.dtype == tensor.dtype
        assert torch.equal(kept, tensor)


def test_no_file_is_left_when_the_store_is_gone(tmp_path):
    store = Store(0, tmp_path)
    store.keep(torch.randn(KILOBYTE))
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_one_sentence(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    store = Store(0, tmp_path)
    with pytest.raises(
        ArtifactError, match=r"cannot keep activations in .*: No space left on device; free"
    ):
        store.keep(torch.ones(4))


def test_a_file_may_not_grow_beyond_the_limit_of_the_process(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        store = Store(0, tmp_path)
        store.keep(torch.ones(4))
        with pytest.raises(ArtifactError, match="File too large; free some space there"):
            store.keep(torch.ones(4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
