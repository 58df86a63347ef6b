"""What transformers makes of a GGUF file: sentences for the report wherever it is not the model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ptq_llm.gguf_model import head_dim
from ptq_llm.gguf_tokenizer import PROBE

_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
)


def misread_settings(file: Path, config: Any) -> Iterator[str]:
    """One sentence for every setting that transformers reads otherwise than the model has it."""
    read = AutoConfig.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    settings = {key: (getattr(config, key), getattr(read, key)) for key in _SETTINGS}
    settings["head_dim"] = (head_dim(config), head_dim(read))
    for key, (ours, theirs) in settings.items():
        if not _same(ours, theirs):
            yield (
                f"transformers reads {key} {theirs} where the model has {ours}: give it the model's own "
                "configuration, from_pretrained(folder, gguf_file=…, config=…)"
            )


def misread_text(file: Path, tokenizer: Any) -> Iterator[str]:
    """Sentences if readers make other tokens of a text than the tokenizer does."""
    if "NFC" in repr(tokenizer.backend_tokenizer.normalizer):
        yield "the model's tokenizer composes characters (Unicode NFC), which readers of the file do not"
    read = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    if read(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        yield (
            "the tokenizer that transformers rebuilds from the file makes other tokens of some texts: use "
            "the model's own with it"
        )


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two settings are equal, up to the float32 that the file keeps."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) or isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)
