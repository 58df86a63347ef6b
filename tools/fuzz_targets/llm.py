"""Models, GGUF files and quantized checkpoints of ptq-llm."""

import json
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fuzz_targets.core import mend_artifact, quantize_layer
from fuzz_targets.target import Target
from ptq_llm import models as language_models
from ptq_llm.awq_format import AWQ
from ptq_llm.compressed_tensors import CompressedTensors
from ptq_llm.gguf_check import check_gguf
from ptq_llm.gguf_export import FILE, GGUF
from ptq_llm.gptq_format import GPTQ
from ptq_llm.kv_cache import KVCacheOptions, new_cache
from ptqcore import Exporter, ModelError, QuantLinear, QuantSpec, artifact, load

_GRID: Any = {"bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": "float16"}


# transformers imports every configuration that it has once a name is unknown: no reader is to blame.
with suppress(ValueError):
    AutoConfig.for_model("unknown")


@cache
def _tokenizer() -> Any:
    """Every byte is a token."""
    tokens = {character: at for at, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=backend, eos_token="<end>")


def _model() -> Any:
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 257}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    made: Any = AutoModelForCausalLM
    return made.from_config(LlamaConfig(**shape, **heads, eos_token_id=256), dtype=torch.float32).eval()


@cache
def _quantized(symmetric: bool) -> Any:
    model = _model()
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "layers" in path:
            quantize_layer(model, path, layer, QuantSpec(**_GRID, symmetric=symmetric), None)
            quantized = model.get_submodule(path)
            assert isinstance(quantized, QuantLinear)
            quantized.weight_scale = quantized.weight_scale.half().float()
    return model


def _task(model: Any) -> Any:
    def save_assets(folder: Path) -> None:
        model.config.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)

    return SimpleNamespace(save_assets=save_assets)


def write_folder(folder: Path) -> None:
    """Weights in two files, so that there is an index."""
    _model().save_pretrained(folder, max_shard_size="40KB")
    _tokenizer().save_pretrained(folder)


def read_folder(folder: Path) -> None:
    language_models.load(str(folder), torch.float32)


def read_streamed(folder: Path) -> None:
    """Weights stay on disk, and are read as the model computes."""
    loaded = language_models.load(str(folder), torch.float32, stream=True)
    loaded.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)


def write_assets(folder: Path) -> None:
    (folder / "assets").mkdir()
    (folder / "assets/kv_cache.json").write_text(KVCacheOptions(bits=4).model_dump_json())
    model = _model()
    model.config.save_pretrained(folder / "assets")
    artifact.save(model, folder, "llm", "causal-lm", "0")


def read_assets(folder: Path) -> None:
    new_cache(folder)
    load(folder)


def write_export(kind: type[Exporter], symmetric: bool, folder: Path) -> None:
    model = _quantized(symmetric)
    kind().export(model, _task(model), [], folder)


def read_export(kind: type[Exporter], symmetric: bool, folder: Path) -> None:
    model = _quantized(symmetric)
    kind().verify(model, _task(model), [], folder)


def read_gguf(folder: Path) -> None:
    language_models.load(str(folder / FILE), torch.float32)


def read_gguf_header(folder: Path) -> None:
    """As every reader of GGUF files begins."""
    try:
        check_gguf(folder / FILE)
    except (OSError, ValueError) as error:
        raise ModelError(" ".join(str(error).split())) from error


def write_dynamic(folder: Path) -> None:
    """A GPTQ checkpoint with patterns that name layers."""
    write_export(GPTQ, False, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:model\.layers\.0\.mlp\.[^.]+$": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))


_gptq = partial(read_export, GPTQ, False)
TARGETS = (
    Target("hf-folder", write_folder, read_folder),
    Target("hf-folder-streamed", write_folder, read_streamed),
    Target("llm-artifact", write_assets, read_assets, mend_artifact),
    Target("gguf", partial(write_export, GGUF, False), read_gguf),
    Target("gguf-header", partial(write_export, GGUF, False), read_gguf_header),
    Target("gguf-export", partial(write_export, GGUF, True), partial(read_export, GGUF, True)),
    Target("gptq", write_dynamic, _gptq),
    Target("awq", partial(write_export, AWQ, False), partial(read_export, AWQ, False)),
    Target(
        "compressed-tensors",
        partial(write_export, CompressedTensors, False),
        partial(read_export, CompressedTensors, False),
    ),
)
