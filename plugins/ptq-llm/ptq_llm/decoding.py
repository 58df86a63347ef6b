"""What a quantized key-value cache costs: models measured by decoding with it."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from ptq_llm.kv_cache import KVCacheOptions, QuantizedKVCache, cache_bytes
from ptq_llm.metrics import Judge


class DecodingJudge:
    """Measures models by decoding token windows [count, length] token by token.

    The first model is the reference: it decodes with a full-precision cache, all others with a quantized
    one. `decode_perplexity`, `decode_kl_divergence` and `decode_top1_agreement` are what `Judge` says;
    `kv_cache_bytes_per_token` is what the cache holds at the end of a window, divided by its tokens.
    """

    def __init__(self, windows: Tensor, config: Any, options: KVCacheOptions) -> None:
        """`config`: of the model, as transformers has it."""
        self._judge = Judge(windows)
        self._tokens = windows.numel() - len(windows)
        self._config = config
        self._options = options
        self._has_reference = False

    @property
    def reference(self) -> dict[str, Tensor]:
        """What is kept of the reference; see `Judge`."""
        return self._judge.reference

    @reference.setter
    def reference(self, kept: dict[str, Tensor]) -> None:
        """Take another judge's reference, of the same windows."""
        self._judge.reference = kept
        self._has_reference = True

    def measure(self, model: Any, label: str) -> dict[str, float]:
        """The metrics of a causal language model of transformers."""
        cache: Any = DynamicCache(config=self._config)
        if self._has_reference:
            cache = QuantizedKVCache(self._config, self._options)
        self._has_reference = True
        found = self._judge.measure(model, label, cache)
        metrics = {f"decode_{name}": value for name, value in found.items()}
        return metrics | {"kv_cache_bytes_per_token": cache_bytes(cache) / self._tokens}
