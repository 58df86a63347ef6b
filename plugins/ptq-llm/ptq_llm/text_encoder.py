"""The task `text-encoder`: a model that turns a line of text into a vector (BERT, RoBERTa, MiniLM)."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from ptq_llm import models, text
from ptq_llm.embeddings import EmbeddingJudge
from ptqcore import DataError, Task, TaskOptions

RANDOM = "random"
_LEAST_LINES = 3  # fewer have no two pairs whose similarities could be ranked
_RANDOM_LINES, _RANDOM_LENGTHS = 256, (4, 32)


class TextEncoderOptions(TaskOptions):
    """Keys of `task` for encoders. Texts are UTF-8 files, a sentence a line, or `random`: lines of random
    tokens, which only show that everything runs."""

    model: str = Field(
        default=models.EMBEDDED_ENCODER, description="folder in Hugging Face format, or minilm"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    text: str = Field(default=RANDOM, description="lines to evaluate on")
    max_lines: int | None = Field(default=256, ge=_LEAST_LINES, description="lines at most; null for all")
    window: int = Field(default=128, ge=3, description="tokens of a line at most, the rest is cut off")
    calibration: str = Field(default=RANDOM, description="lines to calibrate on")
    calibration_samples: int = Field(default=64, ge=1, description="lines to calibrate on at most")
    batch: int = Field(default=8, ge=1, description="lines of one sample, padded to the longest")


class TextEncoder(Task):
    """Mean-pooled embeddings; `EmbeddingJudge` says what the metrics are."""

    name = "text-encoder"
    Options = TextEncoderOptions
    options: TextEncoderOptions

    def load_model(self) -> nn.Module:
        """The model; texts are read and cut too, so that a wrong one is known before the work begins."""
        options = self.options
        loaded = models.load(options.model, getattr(torch, options.dtype), AutoModel)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._check_window()
        self._calibration = self._batches("calibration", options.calibration_samples)
        evaluated = self._batches("text", options.max_lines)
        if sum(len(batch["input_ids"]) for batch in evaluated) < _LEAST_LINES:
            raise DataError(
                f"task.text {options.text!r} has fewer than {_LEAST_LINES} lines, too few to rank their "
                "similarities: give more"
            )
        self._judge = EmbeddingJudge(evaluated)
        return self._model

    def samples(self, model: nn.Module) -> list[dict[str, Any]]:
        """Batches of calibration lines: `{"input_ids", "attention_mask"}`, both [lines, tokens]."""
        return self._calibration

    def mask(self, sample: Any) -> Tensor:
        """What is no padding."""
        return sample["attention_mask"].bool()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """cosine and spearman, see `EmbeddingJudge`."""
        return self._judge.measure(model)

    def excluded(self, model: nn.Module) -> dict[str, str]:
        """The pooler, which no mean of tokens reads."""
        return {
            path: "pooler"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path.startswith(models.POOLER)
        }

    def save_assets(self, folder: Path) -> None:
        """Configuration and tokenizer, as transformers reads them."""
        config = self._model.config
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        """The structure that `save_assets` described."""
        return models.build(folder, AutoModel)

    def _check_window(self) -> None:
        positions = getattr(self._model.config, "max_position_embeddings", None)
        limit = min(positions or self.options.window, self._tokenizer.model_max_length)
        if self.options.window > limit:
            raise DataError(
                f"task.window is {self.options.window}, but the model has {limit} positions: set at most "
                "that"
            )

    def _batches(self, key: Literal["text", "calibration"], count: int | None) -> list[dict[str, Tensor]]:
        """Lines of a text, tokenized and padded in batches."""
        source = getattr(self.options, key)
        lines = self._random_lines(key, count) if source == RANDOM else self._read(source, key)
        chosen = text.spread(len(lines), count or len(lines))
        tokens = [self._tokens(lines[index], key) for index in chosen]
        starts = range(0, len(tokens), self.options.batch)
        return [self._padded(tokens[start : start + self.options.batch]) for start in starts]

    def _read(self, source: str, key: str) -> list[str]:
        if source == "self":
            raise DataError(
                f"task.{key} is 'self', but an encoder writes no text: give a file, or {RANDOM!r}"
            )
        return text.read_lines(source, f"task.{key}")

    def _tokens(self, line: str, key: str) -> Tensor:
        cut = self._tokenizer(line, truncation=True, max_length=self.options.window)["input_ids"]
        known = self._model.get_input_embeddings().num_embeddings
        if max(cut) >= known:
            raise DataError(
                f"task.{key} holds token {max(cut)}, but the model knows {known} tokens: its folder has "
                "the tokenizer of another model"
            )
        return torch.tensor(cut)

    def _random_lines(self, key: str, count: int | None) -> list[str]:
        """Lines of ordinary tokens drawn at random; other ones for each key."""
        generator = torch.Generator().manual_seed(2 * self.seed + (key == "text"))
        special = set(self._tokenizer.all_special_ids)
        ordinary = [token for token in range(len(self._tokenizer)) if token not in special]
        lines = []
        for _ in range(count or _RANDOM_LINES):
            length = int(torch.randint(*_RANDOM_LENGTHS, (1,), generator=generator))
            drawn = torch.randint(len(ordinary), (length,), generator=generator)
            lines.append(self._tokenizer.decode([ordinary[index] for index in drawn]))
        return lines

    def _padded(self, tokens: list[Tensor]) -> dict[str, Tensor]:
        """One batch of lines, each followed by padding that the mask leaves out."""
        ids = pad_sequence(tokens, batch_first=True, padding_value=self._tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(line) for line in tokens], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}
