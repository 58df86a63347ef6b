"""Perplexity, and agreement with the full-precision model."""

from typing import Any

import torch
from torch import Tensor

from ptqcore import track

_MOST_KEPT_VALUES = 100_000_000


class Judge:
    """Measures models on the same token windows [count, length]; the first model is the reference.

    perplexity: exp of the mean negative log-likelihood of all tokens but the first of each window,
    windows not overlapping and independent of each other.
    top1_agreement: share of those positions where the most likely token is the reference's.
    kl_divergence: mean KL(reference ‖ model) in nats, over as many evenly spaced positions as fit
    100 million kept log-probabilities (about 2,000 for a vocabulary of 49,152).
    """

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows
        self._reference_best: Tensor | None = None
        self._reference_log: list[Tensor] = []

    @torch.no_grad()
    def measure(self, model: Any, label: str) -> dict[str, float]:
        """Metrics of a causal language model of transformers."""
        is_reference = self._reference_best is None
        loss = divergence = 0.0
        compared = 0
        best: list[Tensor] = []
        for index, window in enumerate(track(self._windows, label)):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            log_probs = logits.log_softmax(-1)
            loss -= float(log_probs.gather(1, window[1:, None]).sum(dtype=torch.float64))
            best.append(logits.argmax(-1))
            kept = log_probs[self._kept_positions(log_probs.shape[-1], index)]
            if is_reference:
                self._reference_log.append(kept.clone())
            else:
                reference = self._reference_log[index]
                terms = reference.exp() * (reference - kept)
                divergence += float(terms.sum(dtype=torch.float64))
            compared += len(kept)
        found = torch.cat(best)
        if self._reference_best is None:
            self._reference_best = found
        positions = self._windows.numel() - len(self._windows)
        return {
            "perplexity": float(torch.tensor(loss / positions, dtype=torch.float64).exp()),
            "kl_divergence": divergence / compared,
            "top1_agreement": float((found == self._reference_best).double().mean()),
        }

    def _kept_positions(self, vocabulary: int, index: int) -> slice:
        """Positions of window `index` whose log-probabilities are kept: every n-th of all windows'."""
        length = self._windows.shape[1] - 1
        stride = -(-length * len(self._windows) * vocabulary // _MOST_KEPT_VALUES)
        return slice(-index * length % stride, None, stride)
