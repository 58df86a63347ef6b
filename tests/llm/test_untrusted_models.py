"""Folders, GGUF files and quantized checkpoints of strangers: one sentence each, and no code of theirs."""

import json
import struct
from functools import partial
from pathlib import Path

import pytest
import tiny_gguf
import tiny_llama
import tiny_lm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptq_llm import models
from ptq_llm.awq_format import AWQ
from ptq_llm.causal_lm import CausalLM
from ptq_llm.compressed_tensors import CompressedTensors
from ptq_llm.gguf_check import check_gguf
from ptq_llm.gptq_format import GPTQ
from ptq_llm.kv_cache import new_cache
from ptq_llm.rotation import Hadamard
from ptqcore import ArtifactError, ExportError, ModelError, PtqError, QuantSpec

GRID = QuantSpec(bits=4, granularity="group", group_size=32, scale_dtype="float16", symmetric=False)


@pytest.fixture
def folder(tmp_path):
    """A good model folder."""
    return tiny_lm.save(tmp_path / "model")


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture
def refused(ptq, tmp_path):
    """The sentence of `ptq quantize` for a model, with an artifact that must stay as it is."""

    def refused(model: Path) -> str:
        output = tmp_path / "out"
        output.mkdir(exist_ok=True)
        (output / "manifest.json").write_text("an earlier result")
        sets = [f"--set=task.model={model}", "--set=export=[]"]
        code, _, stderr = ptq("quantize", "--plugin", "llm", "--recipe", "w8a8", *sets, "--output", output)
        (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
        assert code == 2
        assert "Traceback" not in stderr
        assert (output / "manifest.json").read_text() == "an earlier result"
        return line

    return refused


# Folders


def test_code_beside_a_model_is_not_run(refused, folder):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    automatic = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(folder / "config.json", model_type="evil", auto_map=automatic)
    assert "its configuration or tokenizer: " in refused(folder)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_an_index_that_leads_out_of_the_folder(refused, folder, place):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert f"names {place!r}: weights lie right inside the folder" in refused(folder)


def test_a_folder_that_leads_to_another_model(refused, folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')
    assert "adapter_config.json leads to another model: merge the adapter into that" in refused(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**5), ("hidden_size", 10**12), ("vocab_size", 2**62)]
)
def test_a_configuration_of_a_model_that_is_not_there(refused, folder, key, value):
    change(folder / "config.json", **{key: value})
    assert f"the configuration has {key} {value}, but the weights have " in refused(folder)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 4000}, {"hidden_size": 2**20, "head_dim": 2**18}]
)
def test_a_model_far_larger_than_its_weights_is_not_built(refused, folder, changes):
    change(folder / "config.json", **changes)
    assert "describes far " in refused(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 5000, '{"model_type": 3}', '{"model_type": "llama", "head_dim": "x"}']
)
def test_configurations_that_are_none(refused, folder, text):
    (folder / "config.json").write_text(text)
    assert "its configuration or tokenizer: " in refused(folder)


def test_weights_that_claim_more_than_they_hold(refused, folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [10**12]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    assert "tensor 'model.norm.weight' of shape [1000000000000] needs 4000000000000 bytes" in refused(
        folder
    )


# What an artifact keeps


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"hidden_size": "x"}, {"model_type": "evil"}]
)
def test_assets_that_describe_another_model(folder, changes):
    change(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=r"^the model of .* cannot be built: "):
        CausalLM.build(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[" * 5000, '{"bits": 0}', '{"bits": 4, "residual": -1}', '{"bits": 4, "group_size": 1e999}'],
)
def test_settings_of_a_cache(folder, text):
    (folder / "kv_cache.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"^the KV cache of .* cannot be read: ") as caught:
        new_cache(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -4, 2**17 + 1, 10**18 + 9])
def test_rotations_that_there_are_not(size):
    with pytest.raises(ValueError, match="rotates 1 to 131072 channels"):
        Hadamard(size)


# GGUF files

STRING, ARRAY, U8, U32 = 8, 9, 0, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = "a", sides: tuple[int, ...] = (4, 2), kind: int = 0, place: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, place)


def gguf(
    *tensors: bytes, keys: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, data: int = 64
) -> bytes:
    """A GGUF file of version 3."""
    counts = counts or (len(tensors), len(keys))
    head = struct.pack("<4sIQQ", b"GGUF", 3, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def test_a_good_file_is_read(tmp_path):
    file = tmp_path / "good.gguf"
    array = struct.pack("<IQ", STRING, 2) + text("a") + text("b")
    file.write_bytes(gguf(tensor(), keys=(key("n", U32, b"\x07\0\0\0"), key("t", ARRAY, array))))
    found = check_gguf(file)
    assert (found.numbers, found.tensors) == ({"n": 7}, {"a": (4, 2)})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b"GGUF", "ends in the middle of its header"),
        (b"GGML" + bytes(40), "does not begin as GGUF files of version 2 or 3 do"),
        (gguf(counts=(2**60, 0), data=0), "ends in the middle of its header"),
        (gguf(counts=(0, 2**60), data=0), "ends in the middle of its header"),
        (gguf(keys=(struct.pack("<Q", 2**60),)), "has 1152921504606846976 bytes, more than are left"),
        (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", U8, 2**60)),)), "more than are left"),
        (
            gguf(keys=(key("a", ARRAY, struct.pack("<IQ", STRING, 2**60)),)),
            "ends in the middle of its header",
        ),
        (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9),)), "not known or nested too deeply"),
        (gguf(keys=(key("a", 77, b""),)), "a value of the type 77"),
        (gguf(keys=(key("a", U8, b"1"), key("a", U8, b"1"))), "has the key 'a' twice"),
        (
            gguf(keys=(key("general.alignment", U32, b"\0\0\0\0"),)),
            "alignment is 0, which is no power of two",
        ),
        (
            gguf(keys=(key("general.alignment", U32, b"\x03\0\0\0"),)),
            "alignment is 3, which is no power of two",
        ),
        (gguf(tensor(sides=(2**31, 2**31))), "which lie outside of the file"),
        (gguf(tensor(place=2**40)), "which lie outside of the file"),
        (gguf(tensor(sides=(4, 0))), "does not fill blocks of 1"),
        (gguf(tensor(sides=(33,), kind=2)), "does not fill blocks of 32"),
        (gguf(tensor(sides=(1,) * 9)), "tensor 'a' has 9 sides"),
        (gguf(tensor(kind=99)), "tensor 'a' has the type 99, which is not known"),
        (gguf(tensor(), tensor("a", place=32)), "has two tensors of one name"),
        (gguf(tensor(), tensor("b", place=28)), "tensors 'a' and 'b' share bytes"),
    ],
)
def test_gguf_files_that_claim_more_than_they_hold(refused, tmp_path, content, sentence):
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        check_gguf(file)
    with pytest.raises(ModelError, match=sentence):
        models.outline(str(file))


def test_a_gguf_file_on_the_command_line(refused, tmp_path):
    file = tmp_path / "bad.gguf"
    file.write_bytes(gguf(tensor(sides=(2**31, 2**31))))
    assert f"task.model {str(file)!r} cannot be loaded: tensor 'a' of sides" in refused(file)


@given(st.binary(max_size=120))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_gguf_file_or_a_sentence(tmp_path, rest):
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0" + rest)
    try:
        check_gguf(file)
    except ValueError:
        return


def test_a_gguf_file_of_more_layers_than_tensors(tmp_path):
    model = tiny_gguf.quantized()
    tiny_gguf.export(model, tmp_path)
    file = tmp_path / tiny_gguf.FILE
    name, layers = text("llama.block_count") + struct.pack("<I", U32), struct.pack("<I", 3)
    content = file.read_bytes()
    assert name + layers in content
    file.write_bytes(content.replace(name + layers, name + struct.pack("<I", 2**31)))
    with pytest.raises(
        ModelError, match=r"the configuration has llama\.block_count 2147483648, but the weights"
    ):
        models.load(str(file), torch.float32)


# Quantized checkpoints, as our exports are read back

KINDS = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": CompressedTensors}


def export(folder: Path, name: str) -> partial:
    """A quantized model in a folder; returns how it is read back."""
    model = tiny_llama.quantize(tiny_llama.tiny_llama(), GRID)
    tiny_llama.export(model, folder, KINDS[name])
    return partial(tiny_llama.verify, model, folder, KINDS[name])


@pytest.fixture(params=KINDS)
def exported(request, tmp_path):
    """A folder of each format, and how it is read back."""
    return tmp_path, export(tmp_path, request.param)


@pytest.mark.parametrize("value", [0, -2, 2**40, 1.5, "4", []])
@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("name", KINDS)
def test_grids_that_there_are_not(tmp_path, name, key, value):
    verify = export(tmp_path, name)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    (place,) = _weights_of(config["quantization_config"]) or [config["quantization_config"]]
    key = "num_bits" if key == "bits" and key not in place else key
    assert key in place
    place[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=rf"config\.json has {key} .*: it must be a number from "):
        verify()


def _weights_of(config: dict) -> list[dict]:
    return [group["weights"] for group in config.get("config_groups", {}).values()]


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 5000, "{}", '{"quantization_config": 3}', '{"quantization_config": {}}']
)
def test_configurations_that_say_nothing(exported, text):
    folder, verify = exported
    (folder / "config.json").write_text(text)
    with pytest.raises(ExportError, match=r"config\.json|cannot be read back"):
        verify()


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, struct.pack("<Q", 2**62), struct.pack("<Q", 2) + b"{}"]
)
def test_weights_that_are_none(exported, content):
    folder, verify = exported
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ExportError, match=r"cannot be read back as a safetensors file|is missing in the file"
    ):
        verify()


@pytest.mark.parametrize(
    "pattern", ["+:(a+)+$", "+:.*.*.*.*=", "-:(?=x)*", "+:[^.]+[^.]+[^.]+x", "+:\\1", "+:a{9999}"]
)
def test_patterns_that_take_forever_are_not_matched(tmp_path, pattern):
    model = tiny_llama.quantize(tiny_llama.tiny_llama(), GRID)
    tiny_llama.export(model, tmp_path, GPTQ)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {pattern: {"bits": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PtqError, match=r"has the pattern .*, which names no layers|cannot be read back"):
        tiny_llama.verify(model, tmp_path, GPTQ)
