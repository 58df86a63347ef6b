"""The task `causal-lm`: a language model, its calibration text, and how well it still predicts."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ptq_llm import kv_cache, models, text
from ptq_llm.decoding import DecodingJudge
from ptq_llm.kv_cache import KVCacheOptions
from ptq_llm.metrics import Judge
from ptq_llm.reference import measure_reference, measured_once, read_kept
from ptqcore import (
    DataError,
    Recipe,
    RecipeError,
    Store,
    Task,
    TaskOptions,
    digest_of,
    free_memory,
    in_memory,
    is_on_disk,
    write_tensors,
)

SELF = "self"
_WRITTEN_FOR_EVALUATION = 8


class CausalLMOptions(TaskOptions):
    """Keys of `task` for language models. Texts are UTF-8 files, or `self`: written by the model."""

    model: str = Field(
        default=models.EMBEDDED, description="folder in Hugging Face format, GGUF file, or smollm2-135m"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    stream: bool | None = Field(
        default=None,
        description="leave the weights of a folder on disk, only a block of them in memory; null: where "
        "they would take more than half of the free memory",
    )
    text: str = Field(default=SELF, description="text to evaluate on")
    window: int = Field(default=512, ge=2, description="tokens per evaluated window")
    max_windows: int | None = Field(default=32, ge=1, description="windows evaluated at most; null for all")
    calibration: str = Field(default=SELF, description="text to calibrate on")
    calibration_samples: int = Field(default=8, ge=1, description="windows to calibrate on")
    calibration_window: int = Field(default=512, ge=2, description="tokens per calibration window")
    kv_cache: KVCacheOptions | None = Field(default=None, description="quantized cache to decode with")
    decode_windows: int = Field(default=8, ge=1, description="windows decoded with it at most")
    shared: str | None = Field(
        default=None, description="folder for what full precision writes and predicts, shared by runs"
    )


def options_of(recipe: Recipe) -> CausalLMOptions:
    """The task options of a resolved recipe.

    Raises:
        RecipeError: if its task is another one.
    """
    if recipe.task.kind.rpartition(":")[2] != CausalLM.name:
        raise RecipeError(
            f"recipe {recipe.name!r} has task.kind {recipe.task.kind!r}: this is for {CausalLM.name!r}"
        )
    return CausalLMOptions(**recipe.task.options)


class CausalLM(Task):
    """Next-token prediction; `Judge` says what the metrics are."""

    name = "causal-lm"
    Options = CausalLMOptions
    least_coverage = 0.95
    min_tokens = 16
    options: CausalLMOptions
    open_dimensions: ClassVar[dict[str, dict[int, str]]] = {"input_ids": {1: "sequence"}}
    class_dimension = -1

    def load_model(self) -> nn.Module:
        """The model; texts are read and cut too, so that a wrong one is known before the work begins."""
        options = self.options
        return self.use(models.load(options.model, getattr(torch, options.dtype), stream=options.stream))

    def use(self, loaded: models.LanguageModel) -> nn.Module:
        """Take a model that is loaded already; for the rest as `load_model`."""
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._check_windows()
        self._check_written()
        if self.options.kv_cache is not None:
            kv_cache.check_decodes(self._model, self.options.kv_cache)
        self._written: Tensor | None = None
        self._calibration, self._evaluation = self._calibration_windows(), self._evaluation_windows()
        return self._model

    def samples(self, model: nn.Module) -> list[dict[str, Any]]:
        """Calibration windows, one a sample: `{"input_ids": [1, window], "use_cache": False}`."""
        if self._calibration is None:
            written = self._write()[: self.options.calibration_samples]
            self._calibration = written[:, : self.options.calibration_window]
        return [{"input_ids": window[None], "use_cache": False} for window in self._calibration]

    def example(self, model: nn.Module) -> dict[str, Any]:
        """A calibration window; of any tokens where the model has not written them yet."""
        if self._calibration is not None:
            return self.samples(model)[0]
        known = self._model.get_input_embeddings().num_embeddings
        tokens = torch.arange(self.options.calibration_window)[None] % known
        return {"input_ids": tokens, "use_cache": False}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """perplexity, kl_divergence and top1_agreement, without KV cache: see `Judge`.

        With `kv_cache` also what `DecodingJudge` finds on the first `decode_windows`.
        """
        if not hasattr(self, "_judge"):
            if self._evaluation is None:
                self._evaluation = self._write()[self._count_for_calibration() :, : self.options.window]
            self._judge = Judge(self._evaluation, Store(free_memory() // 4, self.workspace))
            if self.options.kv_cache is not None:
                windows = self._evaluation[: self.options.decode_windows]
                self._decoding_judge = DecodingJudge(windows, self._model.config, self.options.kv_cache)
            return self._measure_reference(model)
        if self.judged == "full precision":  # another model, outside of a run: nobody said which it is
            return self._measure(model)
        assert self._evaluation is not None
        mark = digest_of(self._evaluation)
        file = self.workspace / f"{self.judged.replace(' ', '-')}-{mark[:16]}.safetensors"
        return measured_once(file, partial(self._measure, model))

    def _measure(self, model: nn.Module) -> dict[str, float]:
        metrics = self._judge.measure(model, "measuring the quantized model")
        if self.options.kv_cache is not None:
            metrics |= self._decoding_judge.measure(model, "decoding with the quantized model")
        return metrics

    def _measure_reference(self, model: nn.Module) -> dict[str, float]:
        """The metrics of full precision, measured once for a run and what resumes it; with `shared`, once
        for all runs."""
        assert self._evaluation is not None
        file = self._reference_file(model, "read", self._evaluation)
        metrics = measure_reference(self._judge, model, "measuring full precision", file)
        if self.options.kv_cache is not None:
            file = self._reference_file(model, "decoded", self._evaluation[: self.options.decode_windows])
            metrics |= measure_reference(self._decoding_judge, model, "decoding with full precision", file)
        return metrics

    def _reference_file(self, model: nn.Module, how: str, windows: Tensor) -> Path:
        """Where it is kept what a model predicts on windows."""
        mark = digest_of([dict(model.state_dict()), how, windows])
        return self._slow / f"reference-{mark[:16]}.safetensors"

    @property
    def _slow(self) -> Path:
        """The folder for what is slow to compute again."""
        if self.options.shared is None:
            return self.workspace
        folder = Path(self.options.shared).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"task.shared {str(folder)!r} cannot be made: {error.strerror}") from error
        return folder

    def excluded(self, model: nn.Module) -> dict[str, str]:
        """The output head stays as it is: it decides the token, and shares the embedding in many models.

        All that stands outside the base model belongs to it.
        """
        head, body = self._model.get_output_embeddings(), set(self._model.base_model.modules())
        return {
            path: "output head"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and (module is head or module not in body)
        }

    def save_assets(self, folder: Path) -> None:
        """Configuration, generation configuration and tokenizer, as transformers reads them; `kv_cache`."""
        config = self._model.config
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(folder)
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        if self.options.kv_cache is not None:
            settings = self.options.kv_cache.model_dump_json(indent=2) + "\n"
            (folder / kv_cache.SETTINGS_FILE).write_text(settings, encoding="utf-8")

    @classmethod
    def build(cls, folder: Path) -> nn.Module:
        """The structure that `save_assets` described."""
        return models.build(folder)

    def _check_windows(self) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        for key in ("window", "calibration_window"):
            length = getattr(self.options, key)
            if limit is not None and length > limit:
                raise DataError(
                    f"task.{key} is {length}, but the model has {limit} positions: set at most that"
                )
        cache, window = self.options.kv_cache, self.options.window
        if cache is not None and window < cache.residual + 2:
            raise DataError(
                f"task.window is {window}, but task.kv_cache.residual keeps the newest {cache.residual} "
                "tokens in full precision, so that nothing would be quantized: set window to "
                f"{cache.residual + 2} or more, or residual lower"
            )

    def _check_written(self) -> None:
        """A model on disk would be read whole for every token that it writes."""
        for key in ("text", "calibration"):
            if getattr(self.options, key) == SELF and is_on_disk(self._model):
                raise DataError(
                    f"task.{key} is 'self', but the weights of the model lie on disk (task.stream), and "
                    "would be read again for every token that it writes: give a text file"
                )

    def _calibration_windows(self) -> Tensor | None:
        source = self.options.calibration
        if source == SELF:
            return None
        tokens = self._read(source, "task.calibration")
        label = f"task.calibration {source!r}"
        return text.spread_windows(
            tokens, self.options.calibration_window, self.options.calibration_samples, label
        )

    def _evaluation_windows(self) -> Tensor | None:
        source = self.options.text
        if source == SELF:
            return None
        tokens = self._read(source, "task.text")
        return text.windows(tokens, self.options.window, self.options.max_windows, f"task.text {source!r}")

    def _read(self, path: str, key: str) -> Tensor:
        tokens = text.read_tokens(path, key, self._tokenizer)
        known = self._model.get_input_embeddings().num_embeddings
        if len(tokens) and int(tokens.max()) >= known:
            raise DataError(
                f"{key} {path!r} holds token {int(tokens.max())}, but the model knows {known} tokens: "
                "its folder has the tokenizer of another model"
            )
        return tokens

    def _count_for_calibration(self) -> int:
        return self.options.calibration_samples if self.options.calibration == SELF else 0

    def _write(self) -> Tensor:
        """Windows that the full-precision model writes, for calibration first; kept for later."""
        if self._written is None:
            options = self.options
            held_out = min(options.max_windows or _WRITTEN_FOR_EVALUATION, _WRITTEN_FOR_EVALUATION)
            count = self._count_for_calibration() + (held_out if options.text == SELF else 0)
            length = max(options.window, options.calibration_window)
            model = digest_of(dict(self._model.state_dict()))[:16]
            file = self._slow / f"written-{model}-{count}x{length}-seed{self.seed}.safetensors"
            if not file.is_file():
                special = list(self._tokenizer.all_special_ids)
                write_tensors(file, {"tokens": text.write(self._model, special, count, length, self.seed)})
            self._written = in_memory(read_kept(file)["tokens"])
        return self._written
