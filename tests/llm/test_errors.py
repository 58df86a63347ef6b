"""What goes wrong through no fault of the code: one sentence, exit code 2, and nothing half written."""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import ptqcore
from ptq_llm.causal_lm import CausalLM
from ptqcore import cli, files
from ptqcore.rounding import Round
from ptqcore.tensor_file import tensor_file

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = re.compile(r".+: \d+(/\d+)? (done )?in \d+ .*")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model and a text that are good, and an artifact made of them."""
    base = tmp_path_factory.mktemp("base")
    tiny_lm.save(base / "model")
    tiny_lm.write_text(base / "text.txt", 400)
    subprocess.run(command(base, base / "artifact"), check=True, capture_output=True)
    return base


@pytest.fixture
def model(base, tmp_path):
    """A copy of the good model, to be damaged."""
    return shutil.copytree(base / "model", tmp_path / "model")


def command(base, output, *sets, model=None, recipe="w8a8", extra=()):
    texts = [f"task.{key}={base / 'text.txt'}" for key in ("text", "calibration")]
    sizes = ["task.window=16", "task.calibration_window=16", "task.max_windows=3", "steps=[round]"]
    overrides = [f"task.model={model or base / 'model'}", *texts, *sizes, *sets]
    return [
        *(sys.executable, str(ROOT / "tools/quantize.py"), "--plugin", "llm", "--recipe", recipe),
        *(f"--set={override}" for override in overrides),
        *("--output", str(output), *extra),
    ]


def snapshot(folder):
    """Every file of a folder and its bytes, but for what interrupted work has left."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name.parts[0] != ".work"}


def the_error(stderr):
    """The one line that is no progress."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command in this process: its exit code and what it wrote to standard error."""

    def run(arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ptq", "quantize", *arguments[2:]])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def fail(base, tmp_path, run):
    """The sentence of a run that must fail, into an empty folder and onto an artifact."""

    def fail(*sets, **options):
        fresh, used = tmp_path / "fresh", tmp_path / "used"
        if not used.exists():
            shutil.copytree(base / "artifact", used)
        before = snapshot(used)
        sentences = []
        for output in (fresh, used):
            code, stderr = run(command(base, output, *sets, **options))
            sentences.append(the_error(stderr))
            assert code == 2
        assert sentences[0].replace("fresh", "used") == sentences[1].replace("fresh", "used")
        assert not fresh.exists() or snapshot(fresh) == {}
        assert snapshot(used) == before
        return sentences[0]

    return fail


def test_a_good_command_runs(base, run, tmp_path):
    code, stderr = run(command(base, tmp_path / "out"))
    assert code == 0, stderr
    assert snapshot(tmp_path / "out").keys() == snapshot(base / "artifact").keys()


# In a process of its own, as the user sees it


def in_a_process(arguments, cwd):
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    return the_error(result.stderr)


def test_a_misspelt_key_in_a_process(base, tmp_path):
    sentence = in_a_process(command(base, tmp_path / "out", "quant.weights.bitss=4"), tmp_path)
    assert "'quant.weights.bitss' is unknown; did you mean 'bits'?" in sentence
    assert not (tmp_path / "out").exists()


def test_a_cut_weights_file_in_a_process(base, model, tmp_path):
    os.truncate(model / "model.safetensors", 300_000)
    sentence = in_a_process(command(base, tmp_path / "out", model=model), tmp_path)
    assert f"task.model '{model}': its weights cannot be loaded" in sentence
    assert snapshot(tmp_path / "out") == {}


def test_a_damaged_gguf_file_in_a_process(base, tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    os.truncate(file, file.stat().st_size - 1000)
    sentence = in_a_process(command(base, tmp_path / "out", model=file), tmp_path)
    assert f"task.model '{file}' cannot be loaded" in sentence


# The recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("quant.weights.bits=9", "'quant.weights.bits' is 9: .*less than or equal to 8"),
        ("quant.weights.bits=1", "'quant.weights.bits' is 1: .*greater than or equal to 2"),
        ("quant.weights.bits=four", "'quant.weights.bits' is 'four': "),
        ("task.windw=4", "'task.windw' is unknown; did you mean 'window'?"),
        ("task.window=1", "'task.window' is 1: "),
        ("task.kind=causal-ml", "'causal-ml' is unknown; did you mean 'causal-lm'?"),
        ("steps=[rond]", "'rond' is unknown; did you mean 'round'?"),
        ("export=[ggml]", "'ggml' is unknown"),
        ("quant.weights.observer=mean", "'mean' is unknown"),
        ("quant.weights.observer={mse: {norn: 2}}", "norn' is unknown; did you mean 'norm'?"),
        ("seed=-1", "'seed' is -1"),
        ("noequalsign", "'noequalsign' is not of the form KEY=VALUE"),
    ],
)
def test_a_wrong_recipe(fail, override, sentence):
    assert re.search(sentence.replace("?", r"\?"), fail(override))


@pytest.mark.parametrize("size", [0, -32])
def test_a_group_size_below_one(fail, size):
    sentence = fail(f"quant.weights.group_size={size}", recipe="w4a16")
    assert f"'quant.weights.group_size' is {size}" in sentence


def test_a_group_size_that_the_export_cannot_hold(fail):
    sentence = fail("quant.weights.group_size=48", recipe="w4a16")
    assert "its 64 inputs are not a multiple of quant.weights.group_size 48" in sentence


@pytest.mark.parametrize("name", ["w5a5", "/no/such/recipe.yaml"])
def test_a_missing_recipe(fail, name):
    assert name in fail(recipe=name)


@pytest.mark.parametrize("glob", ["model.layers.*.nothing", "model.layers"])
def test_blocks_that_do_not_exist_or_are_never_called(fail, glob):
    assert f"'blocks' is '{glob}'" in fail(f"blocks={glob}")


def test_nothing_left_to_quantize(fail):
    assert "the model has no layer to quantize" in fail("quant.ignore=['*']")


# The model


def test_a_missing_model_folder(fail, tmp_path):
    assert f"task.model '{tmp_path / 'none'}' does not exist" in fail(model=tmp_path / "none")


def test_a_folder_without_config(fail, model):
    (model / "config.json").unlink()
    assert "has no config.json" in fail(model=model)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "{}", '{"model_type": "no-such"}', '{"model_type": "vit"}']
)
def test_a_folder_with_a_wrong_config(fail, model, content):
    (model / "config.json").write_text(content)
    assert f"task.model '{model}'" in fail(model=model)


def test_a_model_that_is_quantized_already(fail, model):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    assert "is quantized already" in fail(model=model)


def test_our_own_export_is_a_quantized_model(base, fail):
    assert "is quantized already" in fail(model=base / "artifact/exports/compressed-tensors")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_with_a_damaged_tokenizer(fail, model, name):
    (model / name).write_text("{")
    assert f"task.model '{model}'" in fail(model=model)


def test_a_folder_without_tokenizer(fail, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert f"task.model '{model}'" in fail(model=model)


def test_a_tokenizer_of_another_model(fail, model):
    """Its tokens are beyond the model's vocabulary."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 900
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = fail(model=model)
    assert "token" in sentence
    assert "257" in sentence


DAMAGED = {
    "empty": b"",
    "a garbage length": b"\xff" * 1000,
    "a garbage header": struct.pack("<Q", 40) + b"this is not JSON, however long it goes on",
    "a header without tensors": struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_weights_file(fail, model, content):
    (model / "model.safetensors").write_bytes(content)
    assert f"task.model '{model}'" in fail(model=model)


def change_weights(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(fail, model):
    change_weights(model, lambda tensors: tensors.pop(WEIGHT))
    assert WEIGHT in fail(model=model)


def test_a_tensor_of_a_wrong_shape_is_named(fail, model):
    change_weights(model, lambda tensors: tensors.update({WEIGHT: torch.zeros(3, 4)}))
    assert WEIGHT in fail(model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(fail, model, value):
    change_weights(model, lambda tensors: tensors[WEIGHT][3, 4:5].fill_(value))
    sentence = fail(model=model)
    assert f"tensor '{WEIGHT}' of the model holds NaN or infinite values" in sentence


def test_weights_that_are_only_there_as_a_pickle(fail, model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "no file named model.safetensors" in fail(model=model)


def test_a_folder_without_weights(fail, model):
    (model / "model.safetensors").unlink()
    assert "no file named model.safetensors" in fail(model=model)


def test_a_missing_shard(fail, model):
    tiny_lm.build().save_pretrained(model, max_shard_size="200KB")
    (model / "model.safetensors").unlink()
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert f"task.model '{model}'" in fail(model=model)


def test_a_file_that_is_no_gguf(base, fail):
    assert "is a file but not a .gguf one" in fail(model=base / "text.txt")


def write_gguf(path):
    """A Llama with one layer and no tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "head_count": 2,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": 64,
    }.items():
        getattr(writer, f"add_{key}")(value)
    shapes = {"token_embd": (64, 32), "output": (64, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{kind}": (32, 32) for kind in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{kind}_norm": (32,) for kind in ("attn", "ffn")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BAD_GGUF = {
    "empty": lambda whole: b"",
    "garbage": lambda whole: bytes(range(256)) * 8,
    "only a magic word": lambda whole: b"GGUF",
    "impossible counts": lambda whole: b"GGUF\x03\0\0\0" + b"\xff" * 200,
    "cut in the header": lambda whole: whole[:200],
    "cut in the weights": lambda whole: whole[:-5000],
    "no tokenizer": lambda whole: whole,
}


@pytest.mark.parametrize("kind", BAD_GGUF)
def test_a_damaged_gguf_file(fail, tmp_path, kind):
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(BAD_GGUF[kind](file.read_bytes()))
    assert f"task.model '{file}' cannot be loaded" in fail(model=file)


# The texts


KEYS = pytest.mark.parametrize("key", ["task.text", "task.calibration"])


@KEYS
def test_a_text_of_three_tokens(fail, tmp_path, key):
    (tmp_path / "short.txt").write_text("abc")
    sentence = fail(f"{key}={tmp_path / 'short.txt'}")
    assert f"{key} '{tmp_path / 'short.txt'}' holds 3 tokens, fewer than one window of 16" in sentence


@KEYS
def test_a_missing_text(fail, tmp_path, key):
    sentence = fail(f"{key}={tmp_path / 'none.txt'}")
    assert f"{key} '{tmp_path / 'none.txt'}' cannot be read" in sentence
    assert "No such file" in sentence


@KEYS
def test_a_text_that_is_not_utf8(fail, tmp_path, key):
    (tmp_path / "latin.txt").write_bytes("né à l'été ".encode("latin-1") * 100)
    assert f"{key} '{tmp_path / 'latin.txt'}' cannot be read as UTF-8" in fail(
        f"{key}={tmp_path / 'latin.txt'}"
    )


@KEYS
def test_a_text_that_is_a_folder(fail, tmp_path, key):
    assert f"{key} '{tmp_path}' cannot be read" in fail(f"{key}={tmp_path}")


@pytest.mark.parametrize("key", ["task.window", "task.calibration_window"])
def test_windows_longer_than_the_model_has_positions(fail, key):
    assert f"{key} is 1000, but the model has 256 positions" in fail(f"{key}=1000")


# The output


def test_an_output_below_a_file(base, run):
    code, stderr = run(command(base, base / "text.txt/out"))
    assert code == 2
    assert f"cannot write {base / 'text.txt/out'}: Not a directory; choose another" in the_error(stderr)


def test_an_output_that_is_a_file(base, run):
    code, stderr = run(command(base, base / "text.txt"))
    assert code == 2
    assert f"cannot write {base / 'text.txt'}" in the_error(stderr)
    assert len((base / "text.txt").read_text()) == 400


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
def test_an_output_that_the_system_refuses(base, run):
    code, stderr = run(command(base, "/proc/x"))
    assert code == 2
    assert "cannot write /proc/x" in the_error(stderr)


def test_an_output_that_another_run_is_writing_to(base, run, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, stderr = run(command(base, tmp_path / "out"))
    assert code == 2
    assert "another run is writing to" in the_error(stderr)


FULL = "the disk is full; free some space"


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many kB."""
    mounted = []

    def mount(kilobytes):
        place = tmp_path / "disk"
        place.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(["mount", *options], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [60, 140, 240, 400, 520, 640])
def test_a_disk_that_is_too_small(base, run, small_disk, kilobytes):
    """It fills in the journal, in the artifact, in the export: wherever its size says."""
    disk = small_disk(kilobytes)
    code, stderr = run(command(base, disk / "out"))
    assert code == 2
    sentence = the_error(stderr)
    assert FULL in sentence
    assert str(disk) in sentence
    assert snapshot(disk / "out") == {}


def test_a_disk_that_is_full_leaves_the_earlier_artifact_and_goes_on_when_there_is_space(
    base, run, small_disk
):
    disk = small_disk(3000)
    shutil.copytree(base / "artifact", disk / "out")
    before = snapshot(disk / "out")
    filler = disk / "filler"
    filler.write_bytes(bytes((os.statvfs(disk).f_bavail - 80) * os.statvfs(disk).f_frsize))
    code, stderr = run(command(base, disk / "out", recipe="fp8"))
    assert code == 2
    assert FULL in the_error(stderr)
    assert snapshot(disk / "out") == before
    filler.unlink()
    code, stderr = run(command(base, disk / "out", recipe="fp8", extra=["--resume"]))
    assert code == 0, stderr
    ptqcore.load(disk / "out")
    assert snapshot(disk / "out") != before


@pytest.fixture
def full_at(monkeypatch):
    """Makes the n-th safetensors file of a run find the disk full."""

    def full_at(number):
        count = 0

        def failing(tensors, metadata):
            nonlocal count
            count += 1
            for part in tensor_file(tensors, metadata):
                yield part
                if count == number:
                    raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "tensor_file", failing)

    return full_at


@pytest.mark.parametrize("number", range(1, 8))
def test_a_disk_that_fills_while_tensors_are_saved(base, run, full_at, tmp_path, monkeypatch, number):
    """What full precision predicts, three blocks in the journal, metrics, the artifact, and the export."""
    used = shutil.copytree(base / "artifact", tmp_path / "used")
    before = snapshot(used)
    full_at(number)
    code, stderr = run(command(base, used, recipe="fp8"))
    assert code == 2
    assert FULL in the_error(stderr)
    assert snapshot(used) == before
    assert not list(used.rglob("*.partial"))

    quantized, original = [], Round.block
    monkeypatch.setattr(Round, "block", lambda *args: (quantized.append(args[1].path), original(*args)))
    code, stderr = run(command(base, used, recipe="fp8", extra=["--resume"]))
    assert code == 0, stderr
    assert quantized == [f"model.layers.{i}" for i in range(3)][min(max(number - 2, 0), 3) :]
    fresh = tmp_path / "fresh"
    assert run(command(base, fresh, recipe="fp8"))[0] == 0
    assert (used / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()
    assert ptqcore.load(used).config.num_hidden_layers == 3


def test_a_disk_that_fills_while_text_is_written(base, fail, monkeypatch):
    def fsync(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert FULL in fail()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_fills_while_the_tokenizer_is_written(fail, monkeypatch):
    """The tokenizers library raises a bare Exception."""

    def save_assets(self, folder):
        self._tokenizer.backend_tokenizer.save("/dev/full")

    monkeypatch.setattr(CausalLM, "save_assets", save_assets)
    assert FULL in fail()


# Interruptions


def test_an_interruption_says_how_to_go_on(base, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def block(*_):
            raise KeyboardInterrupt

        patch.setattr(Round, "block", block)
        code, stderr = run(command(base, tmp_path / "out"))
    assert code == 130
    assert "Traceback" not in stderr
    assert "--resume" in stderr
    assert snapshot(tmp_path / "out") == {}
    assert run(command(base, tmp_path / "out", extra=["--resume"]))[0] == 0


def test_resuming_with_another_recipe(base, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def block(*_):
            raise KeyboardInterrupt

        patch.setattr(Round, "block", block)
        run(command(base, tmp_path / "out"))
    code, stderr = run(command(base, tmp_path / "out", recipe="fp8", extra=["--resume"]))
    assert code == 2
    assert "had another recipe key 'description' (" in (sentence := the_error(stderr))
    assert sentence.endswith("; restore that, or run again without --resume")
