"""Token windows and lines: from a user's text file, or written by the model itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcore import DataError, track


def read_tokens(path: str, key: str, tokenizer: Any) -> Tensor:
    """All tokens [n] of a UTF-8 text file, in order.

    Raises:
        DataError: naming the recipe key, if the file cannot be read.
    """
    return torch.tensor(tokenizer(_read(path, key))["input_ids"], dtype=torch.int64)


def read_lines(path: str, key: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank.

    Raises:
        DataError: naming the recipe key, if the file cannot be read or has no such line.
    """
    lines = [line.strip() for line in _read(path, key).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{key} {path!r} holds no line of text")
    return lines


def _read(path: str, key: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{key} {path!r} cannot be read as UTF-8 text: {reason}") from error


def windows(tokens: Tensor, length: int, most: int | None, source: str) -> Tensor:
    """The first `most` non-overlapping windows [count, length] of tokens [n]; a shorter rest is dropped.

    Raises:
        DataError: naming the source, if there is not even one window.
    """
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"{source} holds {len(tokens)} tokens, fewer than one window of {length}: "
            "give a longer text, or a smaller window"
        )
    count = count if most is None else min(count, most)
    return tokens[: count * length].view(count, length)


def spread_windows(tokens: Tensor, length: int, count: int, source: str) -> Tensor:
    """`count` windows [count, length] spread evenly over tokens [n]; all of them if there are fewer."""
    every = windows(tokens, length, None, source)
    return every[spread(len(every), count)]


def spread(available: int, count: int) -> list[int]:
    """`count` numbers below `available`, spread evenly; all of them if there are fewer."""
    if available <= count:
        return list(range(available))
    return torch.linspace(0, available - 1, count).round().long().tolist()


@torch.no_grad()
def write(model: Any, special: list[int], count: int, length: int, seed: int) -> Tensor:
    """Token windows [count, length] that the model writes itself.

    Each starts with one random ordinary token; the others are sampled from the model's own
    distribution at temperature 1, special tokens left out (data-free calibration as in LLM-QAT,
    Liu et al., arXiv 2305.17888, section 3.1). The same model, seed and machine give the same tokens.

    Args:
        model: a causal language model of transformers.
        special: ids of tokens that are never written.
        count: number of windows; they are written side by side, as one batch.
        length: tokens per window.
        seed: of the sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    allowed = torch.ones(vocabulary)
    allowed[[token for token in special if token < vocabulary]] = 0
    tokens = torch.multinomial(allowed, count, replacement=True, generator=generator)[:, None]
    cache = None
    for _ in track(range(length - 1), f"the model writes {count} windows of text"):
        output = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        logits[:, allowed[: logits.shape[-1]] == 0] = -torch.inf
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens
