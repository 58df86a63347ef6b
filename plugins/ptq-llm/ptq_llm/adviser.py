"""What to calibrate on: how close a corpus is to the user's text, and whether it has tokens enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ptq_llm import models
from ptq_llm.experts import has_experts, split_experts
from ptq_llm.text import read_tokens
from ptqcore import DataError

UNIFORM_SHARE = 0.01
"""λ of `distribution`: what the tokens that a text lacks share."""

GPTQ_TOKENS_PER_CHANNEL = 4
"""Below about as many, GPTQ fits its calibration text instead of the model (see `too_few_tokens`)."""

_EACH = " of each expert"
_EXPERTS = "an expert sees only those tokens that its router sends to it"


def distribution(tokens: Tensor, vocabulary: int, uniform_share: float = UNIFORM_SHARE) -> Tensor:
    """How often each token occurs: p [vocabulary], float64, all positive.

    Smoothed by interpolation with the uniform distribution (Jelinek and Mercer, 1980):
    pᵢ = (1 − λ) nᵢ / N + λ / V, with N tokens, of which nᵢ are token i, V tokens in the vocabulary, and
    λ = `uniform_share`. Unlike added counts, this does not depend on N: a text repeated is the same.

    Args:
        tokens: ids [n], n ≥ 1, each below `vocabulary`.
    """
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    return (1 - uniform_share) * counts / counts.sum() + uniform_share / vocabulary


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) = Σ pᵢ ln(pᵢ / qᵢ) in nats, of distributions [vocabulary] without zeros."""
    return float((p * (p / q).log()).sum())


@dataclass(frozen=True)
class Corpus:
    """A candidate for calibration.

    divergence: KL(text ‖ corpus) in nats. tokens: how many it has. unseen: share of the text's tokens
    that never occur in it.
    """

    name: str
    divergence: float
    tokens: int
    unseen: float


def rank(text: Tensor, corpora: Mapping[str, Tensor], vocabulary: int) -> list[Corpus]:
    """Corpora by the divergence of their token distribution from the text's, the closest first.

    Calibration does best on tokens distributed like those that the model will read (Gong et al., LLMC,
    arXiv 2405.06001, on calibration data). KL(text ‖ corpus) is large where the corpus lacks what the
    text has; what it has beside that costs little.

    Args:
        text: ids [n] of the user's text.
        corpora: name → ids [n].
        vocabulary: number of tokens.
    """
    wanted = distribution(text, vocabulary)
    ranked = [
        Corpus(
            name,
            kl_divergence(wanted, distribution(tokens, vocabulary)),
            len(tokens),
            float((~torch.isin(text, tokens)).double().mean()),
        )
        for name, tokens in corpora.items()
    ]
    return sorted(ranked, key=lambda corpus: corpus.divergence)


def input_channels(config: Any) -> dict[int, list[str]]:
    """Input channels → kinds of linear layers (by the names of their paths) that have as many.

    Args:
        config: a configuration of transformers; the model is built without memory for weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for module in list(model.modules()):
        if has_experts(module):
            split_experts(module)
    found: dict[int, set[str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.nx
            found.setdefault(channels, set()).add(_kind(path))
    return {channels: sorted(found[channels]) for channels in sorted(found)}


def _kind(path: str) -> str:
    """The name of a layer; an expert's is that of its bank."""
    name = next(part for part in reversed(path.split(".")) if not part.isdecimal())
    return name if path.endswith(name) else f"{name}{_EACH}"


def calibration_tokens(windows: int, window: int, available: int | None) -> int:
    """How many tokens calibration reads.

    Args:
        windows: `task.calibration_samples`.
        window: `task.calibration_window`.
        available: tokens of the calibration text; None if the model writes as much as it needs.
    """
    return window * (windows if available is None else min(windows, available // window))


def too_few_tokens(tokens: int, channels: int) -> str | None:
    """A sentence where the calibration is too short for a method that solves for weights; None if not.

    GPTQ minimises tr(ΔW G ΔWᵀ) with the Gram G = XᵀX of `tokens` inputs. With fewer tokens than
    channels G is singular; below about four a channel its solution over-fits the calibration text, and
    at 2 bits can be worse than rounding on any other. Methods that search a scale, a threshold or a
    range have few unknowns and need no more than a fair sample.

    Args:
        tokens: calibration tokens.
        channels: input channels of the layer.
    """
    if tokens >= GPTQ_TOKENS_PER_CHANNEL * channels:
        return None
    singular = ", and the Gram of its inputs is singular" if tokens < channels else ""
    return (
        f"{tokens} calibration tokens are {tokens / channels:.2g} for each of {channels} input channels: "
        f"below about {GPTQ_TOKENS_PER_CHANNEL} GPTQ over-fits{singular}; raise task.calibration_samples "
        f"or task.calibration_window to {GPTQ_TOKENS_PER_CHANNEL * channels} tokens or more"
    )


def advise(model: str, text: str, corpora: Sequence[str], windows: int, window: int) -> str:
    """What `ptq llm advise` prints: the ranking, the tokens per input channel, and warnings.

    Args:
        model: as `task.model`; its configuration and tokenizer are read, its weights are not.
        text: file of the user's text.
        corpora: files of the candidates.
        windows: `task.calibration_samples`.
        window: `task.calibration_window`.

    Raises:
        PtqError: if a file cannot be read, or holds no tokens.
    """
    outline = models.outline(model)
    vocabulary = max(outline.tokenizer.get_vocab().values()) + 1
    tokens = {corpus: _read(corpus, "--corpus", outline.tokenizer) for corpus in corpora}
    ranked = rank(_read(text, "--text", outline.tokenizer), tokens, vocabulary)
    count = calibration_tokens(windows, window, ranked[0].tokens)
    return "\n".join([*_ranking(ranked), *_supply(ranked[0].name, count, input_channels(outline.config))])


def _read(path: str, option: str, tokenizer: Any) -> Tensor:
    tokens = read_tokens(path, option, tokenizer)
    if not len(tokens):
        raise DataError(f"{option} {path!r} holds no tokens")
    return tokens


def _ranking(ranked: Sequence[Corpus]) -> list[str]:
    width = max(len(corpus.name) for corpus in ranked)
    rows = [
        f"  {one.name:<{width}}  {one.divergence:>9.4f}  {100 * one.unseen:>6.1f} %  {one.tokens}"
        for one in ranked
    ]
    return [
        "corpora by KL(text || corpus) of their token distributions, the closest first:",
        f"  {'corpus':<{width}}  {'KL (nats)':>9}  {'unseen':>8}  tokens",
        *rows,
        "unseen is the share of the text's tokens that never occur in the corpus",
    ]


def _supply(corpus: str, tokens: int, channels: Mapping[int, Sequence[str]]) -> list[str]:
    warnings = [sentence for count in channels if (sentence := too_few_tokens(tokens, count)) is not None]
    return [
        f"on {corpus}, calibration reads {tokens} tokens:",
        *(
            f"  {tokens / count:.3g} for each of {count} input channels of {', '.join(kinds)}"
            for count, kinds in channels.items()
        ),
        *([_EXPERTS] if any(_EACH in kind for kinds in channels.values() for kind in kinds) else []),
        *(f"warning: {sentence}" for sentence in warnings),
    ]
