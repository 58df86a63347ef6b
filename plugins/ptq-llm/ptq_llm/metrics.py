"""Perplexity, and agreement with the full-precision model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore import Store, is_on_disk, track

_MOST_KEPT_VALUES = 100_000_000
_MOST_LOGITS = 2**24  # of windows side by side

Predictions = Iterator[tuple[Tensor, Tensor]]
"""Logits [n, vocabulary] and the tokens [n] that follow, part by part."""


class Judge:
    """Measures models on the same token windows [count, length]; the first model is the reference.

    perplexity: exp of the mean negative log-likelihood of all tokens but the first of each window,
    windows not overlapping and independent of each other.
    top1_agreement: share of those positions where the most likely token is the reference's.
    kl_divergence: mean KL(reference ‖ model) in nats, over as many evenly spaced positions as fit
    100 million kept log-probabilities (about 2,000 for a vocabulary of 49,152).
    """

    def __init__(self, windows: Tensor, store: Store | None = None) -> None:
        """Args:
        windows: of tokens.
        store: keeps what is kept of the reference; by default memory does.
        """
        self._windows, self._store = windows, store
        self._reference_best: Tensor | None = None
        self._reference_log: list[Tensor] = []

    @property
    def reference(self) -> dict[str, Tensor]:
        """What is kept of the reference: the most likely tokens, and log-probabilities part by part."""
        if self._reference_best is None:
            return {}
        parts = {f"log_probs.{index:06}": part for index, part in enumerate(self._reference_log)}
        return {"best": self._reference_best} | parts

    @reference.setter
    def reference(self, kept: dict[str, Tensor]) -> None:
        """Take another judge's reference, of the same windows."""
        self._reference_best = kept["best"]
        self._reference_log = [kept[name] for name in sorted(kept) if name != "best"]

    @torch.no_grad()
    def measure(self, model: Any, label: str, cache: Any = None) -> dict[str, float]:
        """Metrics of a causal language model of transformers.

        Without a cache, a window is read at once. With one (empty; afterwards it holds all windows but
        their last tokens), all windows are decoded side by side, token by token. A judge does one or the
        other: the reference must come in the same order.
        """
        windows = self._windows
        parts = read(model, windows, label) if cache is None else decode(model, windows, label, cache)
        is_reference = self._reference_best is None
        loss = divergence = 0.0
        compared = seen = 0
        best: list[Tensor] = []
        for index, (logits, following) in enumerate(parts):
            log_probs = logits.float().log_softmax(-1)
            loss -= float(log_probs.gather(1, following[:, None]).sum(dtype=torch.float64))
            best.append(logits.argmax(-1))
            kept = log_probs[self._kept_positions(log_probs.shape[-1], seen)]
            if is_reference:
                copied = kept.clone()
                self._reference_log.append(copied if self._store is None else self._store.keep(copied))
            else:
                reference = self._reference_log[index]
                terms = reference.exp() * (reference - kept)
                divergence += float(terms.sum(dtype=torch.float64))
            compared += len(kept)
            seen += len(following)
        found = torch.cat(best)
        if self._reference_best is None:
            self._reference_best = found
        return {
            "perplexity": float(torch.tensor(loss / seen, dtype=torch.float64).exp()),
            "kl_divergence": divergence / compared,
            "top1_agreement": float((found == self._reference_best).double().mean()),
        }

    def _kept_positions(self, vocabulary: int, seen: int) -> slice:
        """Which positions after the `seen` ones are kept: every n-th of all."""
        positions = self._windows.numel() - len(self._windows)
        stride = -(-positions * vocabulary // _MOST_KEPT_VALUES)
        return slice(-seen % stride, None, stride)


def read(model: Any, windows: Tensor, label: str) -> Predictions:
    """Predictions window by window, each read at once; of a model that lies on disk several side by side,
    so that its weights are read less often."""
    together = 1
    if isinstance(model, nn.Module) and is_on_disk(model):
        vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        together = max(1, _MOST_LOGITS // (windows.shape[1] * vocabulary))
    for part in track(windows.split(together), label):
        found = model(input_ids=part, use_cache=False).logits
        for window, predicted in zip(part, found, strict=True):
            yield predicted[:-1], window[1:]


def decode(model: Any, windows: Tensor, label: str, cache: Any) -> Predictions:
    """Predictions position by position of all windows, each token seeing the past through the cache.

    Longer steps would be faster but another thing: tokens that come together see each other's keys and
    values in full precision, even those that would be quantized by then.
    """
    for position in track(range(windows.shape[1] - 1), label):
        tokens = windows[:, position : position + 1]
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        yield output.logits[:, -1], windows[:, position + 1]
