"""What GGUF says about a model: its architecture, the names and row order of its tensors, its metadata."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from numpy.typing import NDArray
from torch import Tensor, nn

from ptqcore import ExportError, storage_of

_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up", "ffn_down")
# What llama.cpp adds where a file has it; any other bias it would refuse or leave out.
_BIASES: dict[MODEL_ARCH, tuple[str, ...]] = {
    MODEL_ARCH.LLAMA: (*_ATTENTION, "attn_output", *_MLP),
    MODEL_ARCH.QWEN2: _ATTENTION,
    MODEL_ARCH.QWEN3: (),
}
# model_type in transformers → architecture of the file. Mistral is a Llama with a sliding window.
_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}


def interleaved(rows: int, heads: int) -> NDArray[np.int64]:
    """The order in which a Llama file has the rows of q and k: stored row i is row `order[i]` of the model.

    transformers rotates the halves of a head against each other (i with i + d/2), ggml neighbours (2i
    with 2i + 1): rows 0, d/2, 1, d/2 + 1, … of every head.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def head_dim(config: Any) -> int:
    """Channels of one head, under a configuration of transformers."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Layout:
    """How the tensors of one model are named and ordered in a file."""

    model: nn.Module

    @property
    def config(self) -> Any:
        """The configuration of transformers."""
        return self.model.config

    @property
    def arch(self) -> MODEL_ARCH:
        """The file's architecture.

        Raises:
            ExportError: if the format, or its readers, have none for this model.
        """
        kind = getattr(getattr(self.model, "config", None), "model_type", None)
        if kind not in _ARCHITECTURES:
            raise ExportError(
                f"export gguf cannot hold a model of model_type {kind!r}: it writes "
                f"{', '.join(_ARCHITECTURES)}, remove the export or choose another format"
            )
        return _ARCHITECTURES[kind]

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        return gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)

    def name(self, path: str) -> str:
        """The file's name of a parameter.

        Raises:
            ExportError: if it has none, or readers would not use it.
        """
        stem, _, kind = path.rpartition(".")
        name = self._names.get_name(stem)
        known = kind == "weight" or (kind == "bias" and str(name).split(".")[-1] in _BIASES[self.arch])
        if name is None or not known:
            raise ExportError(
                f"export gguf: readers of architecture {self.config.model_type} have no place for "
                f"{path}: leave out the step that added it, or the export"
            )
        return f"{name}.{kind}"

    def order(self, name: str, rows: int) -> NDArray[np.int64] | None:
        """The order of a tensor's rows, as `interleaved` gives it; None if it is the model's."""
        if self.arch != MODEL_ARCH.LLAMA:
            return None
        config = self.config
        if ".attn_q." in name:
            return interleaved(rows, config.num_attention_heads)
        return interleaved(rows, config.num_key_value_heads) if ".attn_k." in name else None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        rows: int = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return rows

    def is_tied_output(self, path: str) -> bool:
        """Whether a parameter is the output layer's, and the embedding itself."""
        if self.name(path) != "output.weight":
            return False
        embedding: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return bool(storage_of(self.model.get_parameter(path)) == storage_of(embedding))

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return head_dim(self.config)

    @property
    def context(self) -> int:
        """Positions within which readers, which attend to everything, compute what the model computes."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ()
        slides = window and (config.model_type == "mistral" or "sliding_attention" in kinds)
        return min(config.max_position_embeddings, window) if slides else config.max_position_embeddings

    def rope_factors(self) -> Tensor | None:
        """What ggml divides the rotary frequencies by [head_dim / 2]; None where the model does not
        scale them.

        Raises:
            ExportError: if the file cannot say how the model scales them.
        """
        rope = self.config.rope_parameters
        kind = rope.get("rope_type", "default")
        supported = ("default", "linear", "llama3") if self.arch == MODEL_ARCH.LLAMA else ("default",)
        frequencies = self._frequencies()
        if kind not in supported or len(frequencies) != self.head_dim // 2:
            raise ExportError(
                f"export gguf cannot hold rope_parameters {rope} of a {self.config.model_type} model: it "
                f"writes rope_type {' and '.join(supported)} over whole heads, remove the export"
            )
        if kind == "default":
            return None
        exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
        return (rope["rope_theta"] ** -exponents / frequencies.double()).float()

    def _frequencies(self) -> Tensor:
        """The model's own rotary frequencies [head_dim / 2]."""
        found = (getattr(module, "inv_freq", None) for module in self.model.modules())
        return next(frequencies for frequencies in found if isinstance(frequencies, Tensor))


def add_metadata(writer: gguf.GGUFWriter, layout: Layout) -> None:
    """Write the keys that readers rebuild a model's structure from.

    Raises:
        ExportError: if the model computes something that readers do not.
    """
    config = layout.config
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"export gguf cannot hold hidden_act {config.hidden_act}: readers of architecture "
            f"{config.model_type} compute silu, remove the export"
        )
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(layout.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(layout.vocabulary)
