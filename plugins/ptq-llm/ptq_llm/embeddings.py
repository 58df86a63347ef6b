"""How well embeddings of sentences are kept: their direction, and which sentences are alike."""

from typing import Any

import torch
from torch import Tensor

from ptqcore import track


class EmbeddingJudge:
    """Measures encoders on the same batches of lines; the first encoder is the reference.

    The embedding of a line is the mean of the last hidden states of its tokens (Reimers and Gurevych,
    arXiv 1908.10084, section 3: MEAN).
    cosine: mean cosine between a line's embedding and the reference's.
    spearman: rank correlation of the cosines between any two lines with the reference's.
    """

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        """Args:
        batches: keywords of the encoder, `attention_mask` [lines, tokens] among them.
        """
        self._batches = batches
        self._reference: Tensor | None = None

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Metrics of an encoder of transformers."""
        label = "measuring full precision" if self._reference is None else "measuring the quantized model"
        parts = []
        for batch in track(self._batches, label):
            states = model(**batch).last_hidden_state.double()
            parts.append(mean_of_tokens(states, batch["attention_mask"]))
        found = torch.nn.functional.normalize(torch.cat(parts), dim=1)
        if self._reference is None:
            self._reference = found
        return {
            "cosine": float((found * self._reference).sum(1).mean()),
            "spearman": rank_correlation(_similarities(found), _similarities(self._reference)),
        }


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Mean [lines, channels] of states [lines, tokens, channels] where the mask [lines, tokens] is 1."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share the mean of their ranks.

    NaN if all values of one are equal.
    """
    return float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def _similarities(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of unit vectors [lines, channels]."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[first, second]
