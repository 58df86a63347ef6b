"""Which method can be exported to which format: every recipe here, in every format, is held or refused.

What is held is exported by a run, which reads it back bit for bit, and gives the artifact's logits in the
library that owns the format, or through an independent reader. What is refused is refused in one
sentence, before anything is quantized.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_llama
import tiny_lm
import torch
import zoo
from plain_loader import awq_weight, gptq_weight, load_plain
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import ptqcore
from ptq_llm.causal_lm import CausalLM
from ptq_llm.compressed_scheme import PACKED
from ptq_llm.rotate import Rotate
from ptqcore import ExportError

onnxruntime = pytest.importorskip("onnxruntime")

FORMATS = (
    "compressed-tensors",
    "gptq",
    "gptq-v2",
    "awq",
    "gguf",
    "onnx-matmulnbits",
    "onnx-qdq",
)
EXACT = 1e-4  # of the largest logit
ROUNDED_MINIMA = 1e-2  # Q4_1 keeps -zero_point * scale as float16, which the report says
BLOCKS = {"bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": "float16"}
W4, W4_ASYMMETRIC = {"weights": BLOCKS}, {"weights": BLOCKS | {"symmetric": False}}
TOKEN = {"granularity": "token", "dynamic": True}
W8A8 = {"weights": {"granularity": "channel"}, "activations": TOKEN}
W8A8_STATIC = {"weights": {"granularity": "channel"}, "activations": {"symmetric": False}}
W6A6 = {
    "weights": {"bits": 6, "granularity": "channel", "symmetric": False},
    "activations": TOKEN | {"bits": 6, "symmetric": False},
}
W4A4 = {"weights": {"bits": 4, "granularity": "channel"}, "activations": TOKEN | {"bits": 4}}
FP8 = {
    "weights": {"dtype": "e4m3", "granularity": "channel"},
    "activations": {"dtype": "e4m3", **TOKEN},
}

NO_INPUTS = {
    "gptq": r"cannot hold quant\.activations .* stores weights alone, set quant\.activations to null",
    "gptq-v2": r"cannot hold quant\.activations .* stores weights alone, set quant\.activations to null",
    "awq": r"cannot hold quant\.activations .* stores weights alone, set quant\.activations to null",
    "gguf": r"cannot hold quant\.activations: .* set it to null",
    "onnx-matmulnbits": r"keeps activations in floating point: set quant\.activations to null",
}
DYNAMIC = NO_INPUTS | {
    "onnx-qdq": r"static ranges, and quant\.activations\.dynamic is true: set it to false"
}


def attached(what):
    """Refused by every format but those that hold any graph."""
    sentence = rf"cannot hold what the step {what}"
    return {name: sentence for name in FORMATS if not name.startswith("onnx")}


class Row(NamedTuple):
    """A recipe, and the formats that cannot hold it → the sentence that says so."""

    quant: dict[str, Any]
    steps: list[Any]
    refused: dict[str, str]

    @property
    def asymmetric(self) -> bool:
        return not self.quant["weights"].get("symmetric", True)


ROWS = {
    "round": Row(W4, ["round"], {}),
    "asymmetric": Row(W4_ASYMMETRIC, ["round"], {}),
    "clip-gptq": Row(W4, ["clip", "gptq"], {}),
    "hqq": Row(W4_ASYMMETRIC, ["hqq", "round"], {}),
    "awq": Row(W4, ["awq", "round"], {}),
    "low-rank": Row(W4, [{"low-rank": {"epochs": 1}}], {}),
    "rotate-offline": Row(W4, [{"rotate": {"online": False}}, "round"], {}),
    "rotate-online": Row(W4, ["rotate", "round"], attached(r"rotate .*online Hadamard")),
    "reassemble": Row(W4, ["reassemble", "round"], attached(r"reassemble .*gathered at run time")),
    "os-plus-shift": Row(W4, [{"os-plus": {"shift": True}}, "round"], attached("os-plus .*biases")),
    "mixed-bits": Row(
        W4,
        [{"mixed-bits": {"bits": [2, 8], "average": 5.5}}, "round"],
        {
            "awq": r"quant\.weights\.bits (2|8): set it to 4 \(model\.layers\..* gets (2|8) bits\)",
            "gguf": r"quant\.weights\.bits 2: .*set it to 4 or 8 \(model\.layers\..* gets 2 bits\)",
        },
    ),
    "mixed-bits-asymmetric": Row(
        W4_ASYMMETRIC,
        [{"mixed-bits": {"bits": [2, 8], "average": 6.0}}, "round"],
        {
            "compressed-tensors": r"symmetric false where model\..* and model\..* have different grids",
            "awq": r"gets (2|8) bits",
            "gguf": r"gets (2|8) bits",
        },
    ),
    "smoothquant-w8a8": Row(W8A8, ["smoothquant", "round"], DYNAMIC),
    "smoothquant-w8a8-static": Row(W8A8_STATIC, ["smoothquant", "round"], NO_INPUTS),
    "os-plus-w6a6": Row(W6A6, ["os-plus", "round"], DYNAMIC),
    "rotate-offline-gptq-w4a4": Row(W4A4, [{"rotate": {"online": False}}, "gptq"], DYNAMIC),
    "fp8": Row(
        FP8, ["round"], DYNAMIC | {"onnx-qdq": r"holds integers, and quant\.weights\.dtype is e4m3: set it"}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


def run(row, formats, folder, tmp_path):
    recipe = tiny_lm.recipe(folder, tmp_path, row.quant, row.steps, formats)
    return ptqcore.quantize(recipe, "llm", tmp_path / "out")


# What is held


@pytest.mark.parametrize("name", ROWS)
def test_what_is_held_is_read_back_and_gives_the_artifacts_logits(name, folder, tmp_path):
    row = ROWS[name]
    held = [exporter for exporter in FORMATS if exporter not in row.refused]
    record = run(row, held, folder, tmp_path)
    artifact = ptqcore.load(tmp_path / "out")
    expected = zoo.logits(artifact)
    assert set(record.exports) == set(held)
    for exporter in held:
        assert record.exports[exporter].verified
        assert record.exports[exporter].largest_difference == 0.0
        found = READERS[exporter](tmp_path / "out/exports" / exporter, artifact)
        tolerance = ROUNDED_MINIMA if exporter == "gguf" and row.asymmetric else EXACT
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), exporter


def read_compressed(folder, artifact):
    packed = json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == PACKED
    asymmetric = any(
        getattr(module, "weight_zero_point", None) is not None for module in artifact.modules()
    )
    dequantize = packed and asymmetric  # the compressed mode does not take packed zero points
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return zoo.logits(tiny_llama.load(folder, **options))


def read_gguf(folder, artifact):
    return zoo.logits(AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval())


def read_gptq(version, folder, artifact):
    def weight(tensors, name):
        return gptq_weight(tensors, name, artifact.get_submodule(name).weight_spec.bits, version)

    return zoo.logits(load_plain(folder, weight))


def read_awq(folder, artifact):
    return zoo.logits(load_plain(folder, partial(awq_weight, group_size=32)))


def read_onnx(folder, artifact):
    options = onnxruntime.SessionOptions()
    # Else it would round the float inputs of layers with narrow weights.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    tokens = zoo.tokens(artifact, 3, 40, seed=3)  # those of `zoo.logits`
    (found,) = session.run(None, {"input_ids": tokens.numpy()})
    return torch.from_numpy(found)


READERS = {
    "compressed-tensors": read_compressed,
    "gptq": partial(read_gptq, 1),
    "gptq-v2": partial(read_gptq, 2),
    "awq": read_awq,
    "gguf": read_gguf,
    "onnx-matmulnbits": read_onnx,
    "onnx-qdq": read_onnx,
}


# What is refused


@pytest.mark.parametrize(
    ("name", "exporter"), [(name, exporter) for name, row in ROWS.items() for exporter in row.refused]
)
def test_what_is_refused_is_refused_in_one_sentence_before_anything_is_quantized(
    name, exporter, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(CausalLM, "evaluate", lambda *_: {})
    monkeypatch.setattr("ptqcore.quantization.Walk", lambda *_: pytest.fail("blocks are walked"))
    with pytest.raises(ExportError, match=f"^export {exporter}.*{ROWS[name].refused[exporter]}") as caught:
        run(ROWS[name], [exporter], folder, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_step_attaches_without_saying_so_is_refused_by_name(folder, tmp_path, monkeypatch):
    silent = property(lambda _: "", lambda *_: None)
    monkeypatch.setattr(Rotate, "attaches", silent)
    with pytest.raises(
        ExportError, match=r"compressed-tensors cannot hold llm:hadamard, .* model\.layers\.0"
    ):
        run(ROWS["rotate-online"], ["compressed-tensors"], folder, tmp_path)


# What the README says


def test_the_table_of_the_readme_is_this_one():
    readme = (Path(__file__).parents[2] / "plugins/ptq-llm/README.md").read_text(encoding="utf-8")
    lines = [
        f"| {' | '.join(['method', *(f'`{name}`' for name in FORMATS)])} |",
        f"|---{'|---' * len(FORMATS)}|",
    ]
    for row in ROWS.values():
        held = ["no" if name in row.refused else "yes" for name in FORMATS]
        lines.append(f"| {' | '.join([described(row), *held])} |")
    assert "\n".join(lines) in readme, "\n".join(lines)


def described(row):
    weights, inputs = row.quant["weights"], row.quant.get("activations")
    text = f"W{width(weights)}"
    if inputs:
        text += f" A{width(inputs)} {'dynamic' if inputs.get('dynamic') else 'static'}"
    if row.asymmetric:
        text += " asymmetric"
    return f"{text}: {', '.join(map(step_text, row.steps))}"


def width(grid):
    return f" {grid['dtype']}" if "dtype" in grid else grid.get("bits", 8)


def step_text(step):
    if isinstance(step, str):
        return f"`{step}`"
    ((name, options),) = step.items()
    shown = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items() if key != "epochs")
    return f"`{name}`{f' ({shown})' if shown else ''}"
