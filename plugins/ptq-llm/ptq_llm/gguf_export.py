"""The GGUF format: what llama.cpp runs, and transformers reads."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ptq_llm import gguf_blocks as blocks
from ptq_llm.checkpoint import difference
from ptq_llm.gguf_check import check_gguf
from ptq_llm.gguf_contents import (
    HELD,
    Source,
    cannot,
    contents,
    kind,
    not_linear,
    refuse_grid,
    refuse_ragged,
    row_bytes,
    shape,
    values,
)
from ptq_llm.gguf_model import Layout, add_metadata
from ptq_llm.gguf_reread import misread_settings, misread_text
from ptq_llm.gguf_tokenizer import add_vocabulary
from ptqcore import (
    Exporter,
    ExportError,
    QuantLinear,
    QuantSection,
    Task,
    Verification,
    one_sentence,
    track,
)

FILE = "model.gguf"

_FILE_TYPES = {
    blocks.BlockType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    blocks.BlockType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    blocks.BlockType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


class GGUF(Exporter):
    """Weights as blocks of 32 behind a float16 scale: Q4_0 (4 bits, symmetric; scales may be negative),
    Q4_1 (4 bits, asymmetric), Q8_0 (8 bits, symmetric). Larger groups repeat their scale.

    One file, `model.gguf`, holds weights, settings and vocabulary of a Llama, Mistral, Qwen2 or Qwen3.
    Everything that is not quantized is stored as it is.
    """

    name = "gguf"

    def check(self, quant: QuantSection) -> None:
        if quant.activations is not None:
            raise cannot("quant.activations: its weights meet floating-point inputs, set it to null")
        spec, bits = quant.weights.spec, quant.first_last_bits
        refuse_grid(spec)
        if bits is not None and blocks.block_type(spec.model_copy(update={"bits": bits})) is None:
            choice = "4 or 8" if spec.symmetric else "4"
            raise cannot(f"quant.first_last_bits {bits}: {HELD}, set it to {choice}")

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear):
                raise not_linear(name)
            refuse_ragged(name, layer.in_features, quant.weights.group_size)
            if quant.weights.scale_dtype is None and layer.weight.dtype != torch.float16:
                raise cannot(
                    f"quant.weights.scale_dtype null: it keeps scales as float16, and those of {name} "
                    f"would be {layer.weight.dtype}, set it to float16"
                )

    def check_model(self, model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> None:
        layout = Layout(model)
        for name in model.state_dict():
            layout.name(name)
        layout.rope_factors()
        _header(None, layout, task)

    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        layout = Layout(model)
        sources = contents(model, layout)
        writer = _header(folder / FILE, layout, task)
        writer.add_file_type(_file_type(sources))
        for name, source in sources.items():
            bytes_shape = blocks.byte_shape(shape(source), kind(source))
            size = math.prod(bytes_shape)
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), size, kind(source))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, source in track(sources.items(), "writing GGUF", len(sources)):
                order = layout.order(name, shape(source)[0])
                rows = row_bytes(source)
                writer.write_tensor_data(rows if order is None else rows[order])
        finally:
            writer.close()

    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        layout = Layout(model)
        sources = contents(model, layout)
        stored = _read(folder / FILE)
        if unknown := sorted(stored.keys() - sources.keys()):
            raise ExportError(f"tensor {unknown[0]} is in {FILE} but not in the model")
        largest = 0.0
        for name, source in track(sources.items(), "reading GGUF back", len(sources)):
            if name not in stored:
                raise ExportError(f"tensor {name} is missing in {FILE}")
            order = layout.order(name, shape(source)[0])
            expected = values(source)
            expected = expected if order is None else expected[order]
            largest = max(largest, _difference(stored[name], expected))
        notes = list(_notes(layout, sources))
        with one_sentence(f"{folder / FILE} cannot be read back by transformers", ExportError):
            notes += misread_settings(folder / FILE, layout.config)
            notes += misread_text(folder / FILE, _tokenizer(task))
        return Verification(largest, notes=tuple(notes))


def _header(path: Path | None, layout: Layout, task: Task) -> gguf.GGUFWriter:
    """A writer, of no file yet, that has the model's settings and the vocabulary.

    Raises:
        ExportError: if the format, or its readers, do not know them.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.arch])
    add_metadata(writer, layout)
    add_vocabulary(writer, _tokenizer(task), layout.vocabulary)
    return writer


def _file_type(sources: dict[str, Source]) -> gguf.LlamaFileType:
    """What the file calls itself: after the blocks that most weights are in."""
    count = dict.fromkeys(_FILE_TYPES, 0)
    for source in sources.values():
        if isinstance(source, QuantLinear):
            count[kind(source)] += math.prod(shape(source))
    return _FILE_TYPES[max(count, key=lambda held: count[held])]


def _tokenizer(task: Task) -> Any:
    """The tokenizer among the task's assets."""
    with TemporaryDirectory() as folder:
        task.save_assets(Path(folder))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read(file: Path) -> dict[str, gguf.ReaderTensor]:
    """The tensors of a file.

    Raises:
        ExportError: if it is not a GGUF file.
    """
    try:
        check_gguf(file)
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read back as a GGUF file: {error}") from error
    with one_sentence(f"{file} cannot be read back as a GGUF file", ExportError):
        return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def _difference(stored: gguf.ReaderTensor, expected: Tensor) -> float:
    """Largest difference between a tensor of the file, as the gguf package dequantizes it, and what is
    expected.

    Raises:
        ExportError: if it has another shape.
    """
    found = tuple(int(size) for size in reversed(stored.shape))
    if found != expected.shape:
        raise ExportError(
            f"tensor {stored.name} has shape {list(found)} in {FILE}, not {list(expected.shape)}"
        )
    return difference(gguf.quants.dequantize(np.asarray(stored.data), stored.tensor_type), expected)


def _notes(layout: Layout, sources: dict[str, Source]) -> Iterator[str]:
    """What a user of the file should know."""
    shift, steps = _largest_rounding(sources)
    if shift:
        yield (
            "Q4_1 keeps the value of code 0, -zero_point * scale, as float16: weights of the file differ "
            f"from the quantized model's by up to {shift:.2g}, {steps:.2%} of a step"
        )
    if layout.context < layout.config.max_position_embeddings:
        yield (
            f"the model attends to the last {layout.context} tokens, readers to all: the file states a "
            f"context of {layout.context}, within which both are the same"
        )
    if layout.arch == gguf.MODEL_ARCH.LLAMA and any(name.endswith(".bias") for name in sources):
        yield "transformers leaves out the biases of a Llama's file; llama.cpp adds them"


def _largest_rounding(sources: dict[str, Source]) -> tuple[float, float]:
    """By how much rounded minima shift weights at most: absolutely, and in steps of their grid."""
    shift = steps = 0.0
    for source in sources.values():
        if isinstance(source, QuantLinear) and source.weight_zero_point is not None:
            record = source.quantized_weight
            rounding = np.abs(blocks.rounding_of_minima(record))
            shift = max(shift, float(rounding.max()))
            steps = max(steps, float((rounding / np.abs(blocks.block_scales(record))).max()))
    return shift, steps
