"""What full precision predicts, shared by runs: the same figures, measured once."""

import pytest
import tiny_lm

import ptqcore
from ptq_llm.awq import AWQ
from ptq_llm.compressed_tensors import CompressedTensors
from ptq_llm.metrics import Judge
from ptqcore import DataError, find_recipe

DECODING = ("task.kv_cache={bits: 4, group_size: 4, residual: 4}", "task.decode_windows=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def quantize(model, tmp_path):
    """Run a small recipe that calibrates on text of the model's own; its record."""
    small = [f"task.model={model}", "task.window=24", "task.max_windows=3", "task.calibration_window=24"]
    small += ["task.calibration_samples=2", "export=[]"]

    def run(*changes, resume=False):
        chosen = find_recipe("w8a8", "llm", [*small, *changes])
        return ptqcore.quantize(chosen, "llm", tmp_path / "out", resume)

    return run


@pytest.fixture
def measured(monkeypatch):
    """What has been measured since the last look."""
    labels, measure = [], Judge.measure

    def watched(judge, model, label, *rest):
        labels.append(label)
        return measure(judge, model, label, *rest)

    monkeypatch.setattr(Judge, "measure", watched)

    def look():
        seen, labels[:] = [*labels], []
        return seen

    return look


@pytest.mark.parametrize("changes", [(), DECODING], ids=["read", "decoded"])
def test_a_second_run_has_the_metrics_of_a_first_without_measuring_full_precision(
    quantize, measured, tmp_path, changes
):
    shared = f"task.shared={tmp_path / 'shared'}"
    alone, first, second = quantize(*changes), quantize(*changes, shared), quantize(*changes, shared)
    for record in (first, second):
        assert list(record.before.items()) == list(alone.before.items())
        assert list(record.after.items()) == list(alone.after.items())
    parts = 1 + bool(changes)
    assert len(measured()) == 3 * 2 * parts - parts


@pytest.mark.parametrize(
    "change", ["task.window=23", "task.max_windows=2", "seed=1", "task.dtype=bfloat16", "task.text={other}"]
)
def test_another_text_or_model_is_measured_anew(quantize, measured, tmp_path, change):
    shared = f"task.shared={tmp_path / 'shared'}"
    quantize(shared)
    measured()
    other = tiny_lm.write_text(tmp_path / "other.txt", 100)
    record = quantize(shared, change.format(other=other))
    assert measured() == ["measuring full precision", "measuring the quantized model"]
    assert record.before == quantize(change.format(other=other)).before


def test_a_folder_that_cannot_be_made_is_one_sentence(quantize, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"task\.shared '.*file/shared' cannot be made: Not a directory"):
        quantize(f"task.shared={tmp_path / 'file' / 'shared'}")


def test_a_damaged_file_of_figures_is_one_sentence(quantize, tmp_path):
    shared = tmp_path / "shared"
    quantize(f"task.shared={shared}")
    (file,) = shared.glob("reference-*.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=r"reference-.*, kept by an earlier run, is damaged: remove it \(its header"
    ):
        quantize(f"task.shared={shared}")
    assert file.read_bytes() == b"damaged"


class Stopped(BaseException):
    """The end of a run, from within."""


@pytest.mark.parametrize(
    ("owner", "method", "left"), [(AWQ, "search", 1), (CompressedTensors, "export", 0)]
)
@pytest.mark.parametrize("changes", [(), DECODING], ids=["read", "decoded"])
def test_a_run_that_is_resumed_measures_nothing_again(
    quantize, measured, monkeypatch, changes, owner, method, left
):
    changes = (*changes, "evaluate.baseline=true", "export=[compressed-tensors]")
    whole = quantize(*changes)
    parts = 1 + bool(changes[:-2])
    assert len(measured()) == 3 * parts

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(Stopped):
            quantize(*changes)
    assert len(measured()) == (3 - left) * parts
    resumed = quantize(*changes, resume=True)
    assert len(measured()) == left * parts
    for found, wanted in (
        (resumed.before, whole.before),
        (resumed.baseline, whole.baseline),
        (resumed.after, whole.after),
    ):
        assert list(found.items()) == list(wanted.items())


def test_another_text_is_measured_by_a_run_that_is_resumed(quantize, measured, monkeypatch, tmp_path):
    text = tiny_lm.write_text(tmp_path / "text.txt", 100)
    changes = (f"task.text={text}", "evaluate.baseline=true")

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(AWQ, "search", stop)
        with pytest.raises(Stopped):
            quantize(*changes)
    measured()
    text.write_text("another text, " * 100)
    quantize(*changes, resume=True)
    assert len(measured()) == 3
