"""Runs that end before they are done: whatever is on disk then is whole, and `--resume` goes on with it."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_task import W3, W3A4, manifest_of, run, weights_of
from torch import nn

import ptqcore.fingerprint
from ptqcore import (
    LearnedRounding,
    Problem,
    QuantizedTensor,
    Schedule,
    Step,
    artifact,
    files,
    reconstruct,
)
from ptqcore.errors import ArtifactError
from ptqcore.rounding import Round

RECIPE = {"step": [{"qdrop": {"iterations": 3}}, "bias-correction"], "quant": W3A4}


class Stack(nn.Module):
    """Two blocks of one layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, generator=generator) for _ in range(3)]


def quantize(folder, resume=False, make=Stack, samples=None, **changes):
    return run(folder, make, samples or data(), resume=resume, **{**RECIPE, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    quantize(folder)
    return folder


class Stopped(BaseException):
    """The end of a run, from within."""


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run that ended in its second block, one block in its journal."""
    seen = []

    def before(self, block, calibration):
        seen.append(block.path)
        if len(seen) == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Round, "before", before)
        with pytest.raises(Stopped):
            quantize(tmp_path / "out", step="round")
    return tmp_path / "out"


def test_two_runs_give_the_same_bytes(whole, tmp_path):
    quantize(tmp_path)
    assert weights_of(tmp_path) == weights_of(whole)


# Killed at every point at which something is written


def killed(folder, point, resume):
    """Quantize in a process that is gone as if killed, right before its `point`-th change of files.

    Returns:
        Whether it was.
    """
    child = os.fork()
    if not child:
        try:
            _die_at(point)
            quantize(folder, resume=resume)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def _die_at(point):
    changes = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes == point:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_run_killed_at_any_change_of_files_is_resumed_to_the_same_bytes(whole, tmp_path):
    point, done = 0, False
    while not done:
        point += 1
        folder = tmp_path / str(point)
        done = not killed(folder, point, resume=False)
        if not done:
            assert not (folder / "manifest.json").exists() or weights_of(folder) == weights_of(whole)
            assert not killed(folder, 0, resume=True)
        assert weights_of(folder) == weights_of(whole)
        assert manifest_of(folder) == manifest_of(whole)
        left = {entry.name for entry in folder.iterdir()}
        assert left == {entry.name for entry in whole.iterdir()}
    assert point > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_run_killed_at_every_change_of_files_in_turn_is_done_in_the_end(whole, tmp_path):
    point = 1
    while killed(tmp_path, point, resume=True):
        point += 1
    assert weights_of(tmp_path) == weights_of(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_an_earlier_artifact_is_there_as_it_was_or_not_at_all(whole, tmp_path):
    """Never its manifest beside assets, exports or figures of another run."""
    quantize(tmp_path / "earlier", step="round", seed=1)
    names = {file.relative_to(tmp_path / "earlier") for file in (tmp_path / "earlier").rglob("*")}
    before = {name: (tmp_path / "earlier" / name) for name in names}
    before = {name: file.read_bytes() for name, file in before.items() if file.is_file()}
    point, seen = 0, set()
    while True:
        point += 1
        folder = shutil.copytree(tmp_path / "earlier", tmp_path / "out", dirs_exist_ok=False)
        if not killed(folder, point, resume=False):
            break
        if (folder / "manifest.json").exists():
            artifact.read_manifest(folder)
            if weights_of(folder) == before[Path("model.safetensors")]:
                assert all((folder / name).read_bytes() == content for name, content in before.items())
                seen.add("earlier")
            else:
                assert weights_of(folder) == weights_of(whole)
                seen.add("new")
        else:
            seen.add("none")
        shutil.rmtree(folder)
    assert seen == {"earlier", "none", "new"}


# A disk that fails


@pytest.fixture
def used(tmp_path):
    """A folder with an earlier artifact, and what is in it."""
    folder = tmp_path / "used"
    quantize(folder, step="round", seed=1)
    return folder, contents(folder)


def contents(folder):
    """Every file of a folder and its bytes, but for what interrupted work has left."""
    names = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    left = (".work", ".lock")
    return {name: file.read_bytes() for name, file in names.items() if name.parts[0] not in left}


READ_ONLY = (errno.EROFS, "Read-only file system; choose another --output")
OTHERS = [
    (errno.EACCES, "Permission denied; choose another --output"),
    (errno.ENOSPC, "the disk is full; free some space or choose another --output, then run again with"),
    (errno.EIO, "Input/output error; choose another --output"),
]


@pytest.mark.parametrize(
    ("point", "code", "said"), [(p, *READ_ONLY) for p in range(1, 11)] + [(4, *other) for other in OTHERS]
)
def test_a_folder_that_cannot_be_written_any_more(whole, used, monkeypatch, point, code, said):
    """From the n-th write on: in the journal, in the artifact, in the report."""
    folder, before = used
    writes = 0

    def replace(source, target, original=os.replace):
        nonlocal writes
        writes += 1
        if writes >= point:
            raise OSError(code, os.strerror(code))
        original(source, target)

    def unlink(path, missing_ok=False, original=Path.unlink):
        if writes >= point and code == errno.EROFS:
            raise OSError(code, os.strerror(code))
        original(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(ArtifactError, match=r"^cannot write .*: ") as caught:
            quantize(folder)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert contents(folder) == before
    assert code == errno.EROFS or not list(folder.rglob("*.partial"))
    quantize(folder, resume=True)
    assert weights_of(folder) == weights_of(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("limit", [700, 1500, 6000, 20000])
def test_files_that_may_not_be_that_large(whole, used, limit):
    resource = pytest.importorskip("resource")
    folder, before = used
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            quantize(folder)
        except ArtifactError as error:
            os.write(writable, str(error).encode())
        finally:
            os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    with open(readable, encoding="utf-8") as pipe:
        sentence = pipe.read()
    assert sentence.startswith("cannot write ")
    assert "File too large" in sentence
    assert contents(folder) == before
    quantize(folder, resume=True)
    assert weights_of(folder) == weights_of(whole)


def test_a_second_run_into_the_same_folder(used):
    folder, before = used
    with files.locked(folder), pytest.raises(ArtifactError, match="another run is writing to"):
        quantize(folder, step="round", seed=2)
    assert contents(folder) == before


def test_a_lock_that_its_holder_has_just_removed_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it: else two runs would each hold a lock of their own."""
    fcntl = pytest.importorskip("fcntl")

    def flock(handle, operation, original=fcntl.flock):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()
        original(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ArtifactError, match="another run is writing to"), files.locked(tmp_path):
        pass


# Resumed with something else


def refused(folder, **changes):
    with pytest.raises(ArtifactError) as caught:
        quantize(folder, resume=True, **{"step": "round", **changes})
    assert (folder / ".work/block-0000.json").exists()
    return str(caught.value)


def test_another_recipe_is_refused_and_the_keys_are_named(stopped):
    assert "had another recipe key 'seed' (0, now 1); restore that" in refused(stopped, seed=1)
    changed = W3A4 | {"weights": {"bits": 4, "granularity": "channel"}}
    assert "had another recipe key 'quant.weights.bits' (3, now 4); restore" in refused(
        stopped, quant=changed
    )
    assert " and 10 more; restore that" in refused(stopped, quant=W3)


def test_another_step_is_refused_and_named(stopped):
    sentence = refused(stopped, step=["equalize", "round"])
    assert """'steps.0.name' ("round", now "equalize")""" in sentence
    assert """'steps.1.name' (none, now "round")""" in sentence


def test_another_model_is_refused(stopped):
    assert "had another model; restore that" in refused(stopped, make=lambda: Stack(seed=1))


def test_other_data_are_refused(stopped):
    assert "had another calibration data; restore that" in refused(stopped, samples=data(seed=1))


def test_other_versions_are_refused_and_named(stopped, monkeypatch):
    monkeypatch.setattr(ptqcore.fingerprint, "__version__", "0.2.7")
    assert "had another version of ptqcore (0.1.0, now 0.2.7); restore that" in refused(stopped)


def test_the_same_run_goes_on_after_all_these(stopped, tmp_path):
    refused(stopped, seed=1)
    quantize(stopped, resume=True, step="round")
    quantize(tmp_path / "whole", step="round")
    assert weights_of(stopped) == weights_of(tmp_path / "whole")


def test_without_resume_another_run_may_begin(stopped, tmp_path):
    quantize(stopped, step="round", seed=1)
    assert not (stopped / ".work").exists()


# Killed while a block learns


LEARNS = {
    "qdrop": {"qdrop": {"iterations": 24, "weights": "adaround"}},
    "qdrop of codes and biases": {"qdrop": {"iterations": 24, "weights": "adaquant", "learn_biases": True}},
    "brecq": {"brecq": {"iterations": 16}},
    "adaround": {"adaround": {"iterations": 12}},
}


def killed_and_resumed(updates, folder, share, recipe):
    """Stop a run after a share of its updates and resume it: none is made again, the bytes are the same.

    Returns:
        How many updates a whole run makes.
    """
    quantize(folder / "whole", **recipe)
    total, updates.count = updates.count, 0
    updates.stop_at = int(share * total)
    with pytest.raises(updates.Stopped):
        quantize(folder / "out", **recipe)
    updates.stop_at = None
    quantize(folder / "out", resume=True, **recipe)
    assert total <= updates.count <= total + 1
    assert weights_of(folder / "out") == weights_of(folder / "whole")
    return total


@pytest.mark.parametrize("step", LEARNS)
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_run_killed_while_it_learns_makes_no_update_again(updates, tmp_path, step, share):
    recipe = {"step": [LEARNS[step], "bias-correction"], "blocks": "network-wise"}
    killed_and_resumed(updates, tmp_path, share, recipe)
    assert not (tmp_path / "out/.work").exists()


class LearnsFirst(Step):
    """Learns every layer's rounding, one after the other, before the first block is there."""

    name = "learns-first"
    stage = "quantize"

    def prepare(self, model, flow, run):
        self.learned = {path: self.learn(layer) for path, layer in model.named_children()}

    def learn(self, layer):
        weight = layer.weight.detach()
        observer = self.context.observer(self.context.quant.weights)
        observer.update(weight)
        start = QuantizedTensor.from_range(weight, *observer.range(), self.context.quant.weights.spec)
        rounding = LearnedRounding(weight, start)
        rows = torch.randn(6, weight.shape[1], generator=torch.Generator().manual_seed(3))
        problem = Problem(
            "a layer",
            range(6),
            lambda samples: [rows[list(samples)] @ rounding.weight.T],
            lambda samples: [rows[list(samples)] @ weight.T],
            [rounding],
            [],
            midway=next(self.context.midways),
        )
        generator = torch.Generator().manual_seed(self.context.seed)
        with torch.enable_grad():
            reconstruct(problem, Schedule(16, 2, 0.1, 0.0), generator)
        return rounding.hard()

    def block(self, block, calibration):
        for path in block.layers():
            self.quantize_layer(block, calibration, path, self.learned[path])


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_run_killed_while_it_learns_before_the_first_block_makes_no_update_again(
    updates, tmp_path, share
):
    recipe = {"step": "learns-first", "steps": {"learns-first": f"{__name__}:LearnsFirst"}, "quant": W3}
    assert killed_and_resumed(updates, tmp_path, share, recipe) > 20


def test_the_state_of_a_block_that_is_finished_is_removed(updates, tmp_path):
    updates.stop_at = 30
    recipe = {"step": {"qdrop": {"iterations": 24, "weights": "adaround"}}}
    with pytest.raises(updates.Stopped):
        quantize(tmp_path, **recipe)
    names = sorted(file.name for file in (tmp_path / ".work").glob("midway-*"))
    assert names == ["midway-0001-0000.safetensors"]
    updates.stop_at = 2
    updates.count = 0
    with pytest.raises(updates.Stopped):
        quantize(tmp_path, **recipe)  # without resume: all of it is gone
    names = sorted(file.name for file in (tmp_path / ".work").glob("midway-*"))
    assert names == ["midway-0000-0000.safetensors"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "a folder"])
def test_a_damaged_state_is_not_used(updates, tmp_path, damage):
    recipe = {"step": LEARNS["qdrop"], "blocks": "network-wise"}
    quantize(tmp_path / "whole", **recipe)
    total, updates.count = updates.count, 0
    updates.stop_at = 10
    with pytest.raises(updates.Stopped):
        quantize(tmp_path / "out", **recipe)
    file = tmp_path / "out/.work/midway-0000-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    else:
        file.write_bytes({"flipped": content, "cut": content[:-50], "empty": b""}[damage])
    updates.stop_at, updates.count = None, 0
    if damage == "a folder":
        with pytest.raises(ArtifactError, match="cannot write"):
            quantize(tmp_path / "out", resume=True, **recipe)
        return
    quantize(tmp_path / "out", resume=True, **recipe)
    assert updates.count == total
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
