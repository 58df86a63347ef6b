"""A key-value cache of integers, as KIVI means it (arXiv 2402.02750), for models of transformers.

Keys have few channels of large magnitude, the same for all tokens: their groups run along the tokens of
one channel. Values have none, and a token's share in the output is its own: their groups run along the
channels of one token. The newest tokens stay in full precision, and what was quantized once never is again.
"""

import inspect
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import AutoConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ptq_llm.state_store import StateStore
from ptqcore import (
    ArtifactError,
    ModelError,
    PtqError,
    check_config,
    one_line,
    read_bytes,
    read_json,
    read_weights,
)

SETTINGS_FILE = "kv_cache.json"


class KVCacheOptions(BaseModel):
    """Keys of `task.kv_cache`: how keys and values are kept while a model decodes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bits: int = Field(default=4, ge=2, le=8, description="bits of keys and values")
    values_bits: int | None = Field(default=None, ge=2, le=8, description="bits of values if not `bits`")
    group_size: int = Field(default=64, ge=1, description="numbers that share a scale and a minimum")
    residual: int = Field(default=128, ge=1, description="newest tokens in full precision")
    keys: Literal["channel", "token"] = Field(
        default="channel", description="groups of keys along the tokens of a channel, or as values are"
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.keys == "channel" and self.residual % self.group_size:
            raise ValueError(
                f"residual {self.residual} is not a multiple of group_size {self.group_size}: keys leave "
                "it in whole groups of tokens, choose another residual or group_size"
            )
        return self


class QuantizedKVLayer(CacheLayerMixin):
    """The cache of one attention layer.

    Keys are packed when `residual` of them are there, all at once; values one by one as they fall out of
    the newest `residual` (KIVI, algorithm 1). Which tokens are packed depends on how many were seen, not
    on the steps in which they came; but tokens that come in one step see each other in full precision.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, options: KVCacheOptions, sliding_window: int | None = None) -> None:
        """`sliding_window`: tokens that attention sees, the new one included; None for all."""
        super().__init__()
        self.options = options
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: what is held grows."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, tokens, channels]; those that the new tokens may see."""
        self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        keys, values = self.key_store.update(key_states), self.value_store.update(value_states)
        self.seen += new
        if self.sliding_window is None:
            return keys, values
        past = self.sliding_window - 1
        self.key_store.forget(past)
        self.value_store.forget(past)
        return keys[..., -(past + new) :, :], values[..., -(past + new) :, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next tokens see, and the position of the first."""
        past = self.seen if self.sliding_window is None else min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seen

    def get_max_length(self) -> int:
        """The sliding window; -1 for a layer without one."""
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        """Forget everything."""
        options, residual = self.options, self.options.residual
        self.key_store = StateStore(
            options.bits,
            options.group_size,
            per_channel=options.keys == "channel",
            due=lambda held: held - held % residual,
        )
        self.value_store = StateStore(
            options.values_bits or options.bits,
            options.group_size,
            per_channel=False,
            due=lambda held: max(held - residual, 0),
        )
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences for beam search; codes move, none is computed again."""
        self.key_store.reorder(beam_idx)
        self.value_store.reorder(beam_idx)

    def tensors(self) -> list[Tensor]:
        """What is held in memory."""
        return [*self.key_store.tensors(), *self.value_store.tensors()]


class QuantizedKVCache(Cache):
    """An empty cache for a model of that configuration: pass it as `past_key_values` to `generate`.

    Layers with a sliding window drop what fell out of it, as far as whole groups allow. The cache cannot
    be cropped: assisted decoding needs a full-precision one.

    Raises:
        ModelError: if a layer of the model keeps something else than keys and values.
    """

    def __init__(self, config: Any, options: KVCacheOptions) -> None:
        super().__init__(
            layers=[_quantized(layer, options) for layer in DynamicCache(config=config).layers]
        )


def _quantized(layer: Any, options: KVCacheOptions) -> Any:
    if type(layer) is DynamicLayer:
        return QuantizedKVLayer(options)
    if type(layer) is DynamicSlidingWindowLayer:
        return QuantizedKVLayer(options, layer.sliding_window)
    if type(layer) is DummyLayer:  # a layer that keeps nothing
        return layer
    raise ModelError(
        f"task.kv_cache: the model keeps a {type(layer).__name__} beside or instead of plain keys and "
        "values: set task.kv_cache to null"
    )


@torch.no_grad()
def check_decodes(model: Any, options: KVCacheOptions) -> None:
    """Let a causal language model read one token with a quantized cache.

    Raises:
        ModelError: if it does not put its keys and values there.
    """
    cache = QuantizedKVCache(model.config, options)
    if "past_key_values" in inspect.signature(model.forward).parameters:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, past_key_values=cache, use_cache=True)
    if cache.get_seq_length() != 1:
        raise ModelError(
            f"task.kv_cache: {type(model).__name__} does not decode with a cache of keys and values: "
            "set task.kv_cache to null"
        )


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache, quantized or not, with scales and minima."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(layer))


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, QuantizedKVLayer):
        return layer.tensors()
    return [tensor for tensor in (layer.keys, layer.values) if tensor is not None]


def new_cache(folder: str | Path) -> QuantizedKVCache:
    """An empty cache as the recipe of an artifact, or of one of its exports, asks for.

        model = ptqcore.load("out")
        model.generate(**inputs, past_key_values=ptq_llm.new_cache("out"))

    For other models: `QuantizedKVCache(model.config, KVCacheOptions(bits=4))`.

    Raises:
        ArtifactError: if the folder has no settings of a cache, or they cannot be read.
        ModelError: if the model keeps something else than keys and values.
    """
    folder = Path(folder)
    assets = folder / "assets" if (folder / "assets").is_dir() else folder
    file = assets / SETTINGS_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{folder} has no {SETTINGS_FILE}: give the folder of a run whose recipe has task.kv_cache"
        )
    try:
        options = KVCacheOptions.model_validate_json(read_bytes(file))
        check_config(read_json(assets / "config.json"), read_weights(folder).size)
        config = AutoConfig.from_pretrained(assets, local_files_only=True, trust_remote_code=False)
        return QuantizedKVCache(config, options)
    except PtqError:
        raise
    except Exception as error:  # transformers' configurations raise what they like
        raise ArtifactError(f"the KV cache of {folder} cannot be read: {one_line(error)}") from error
