"""The keys or the values of one layer while a model decodes: old tokens packed, new ones as they came."""

from collections.abc import Callable

import torch
from torch import Tensor

from ptq_llm.packed_states import PackedStates, state_spec


class StateStore:
    """Grows by states [batch, heads, tokens, channels]; what was packed once stays as it is."""

    def __init__(self, bits: int, group_size: int, per_channel: bool, due: Callable[[int], int]) -> None:
        """Args:
        bits, group_size: the grid.
        per_channel: groups along the tokens of a channel rather than along the channels of a token.
        due: how many tokens to pack, when so many are held in full precision.
        """
        self.spec = state_spec(bits, group_size)
        self.packed: PackedStates | None = None
        self.residual: Tensor | None = None
        self._per_channel = per_channel
        self._due = due

    @property
    def tokens_per_row(self) -> int:
        """Tokens in one row of the packed states: a group, or one."""
        return (self.spec.group_size or 1) if self._per_channel else 1

    def update(self, states: Tensor) -> Tensor:
        """Add states [batch, heads, tokens, channels]; all held ones, for the attention of the new tokens.

        The new ones are returned as they came; only then are those that are due packed.
        """
        recent = states if self.residual is None else torch.cat([self.residual, states], dim=-2)
        held = recent if self.packed is None else torch.cat([self._unpacked(), recent], dim=-2)
        due = self._due(recent.shape[-2])
        if due:
            later = PackedStates.encode(self._rows(recent[..., :due, :]), self.spec)
            self.packed = later if self.packed is None else self.packed.extended(later)
            recent = recent[..., due:, :].clone()
        self.residual = recent
        return held

    def forget(self, keep: int) -> None:
        """Drop packed rows that only hold tokens older than the last `keep`."""
        if self.packed is None or self.residual is None:
            return
        rows = self.packed.words.shape[2]
        surplus = rows * self.tokens_per_row + self.residual.shape[-2] - keep
        gone = max(surplus, 0) // self.tokens_per_row
        if gone:
            self.packed = self.packed.without_first(gone) if gone < rows else None

    def reorder(self, batch: Tensor) -> None:
        """Pick sequences of the batch by their indices."""
        if self.packed is not None:
            self.packed = self.packed.reordered(batch)
        if self.residual is not None:
            self.residual = self.residual.index_select(0, batch.to(self.residual.device))

    def tensors(self) -> list[Tensor]:
        """What is held in memory."""
        packed = [] if self.packed is None else list(self.packed.tensors())
        return packed if self.residual is None else [*packed, self.residual]

    def _rows(self, states: Tensor) -> Tensor:
        """States [batch, heads, tokens, channels] with the dimension of the groups last.

        Per channel: [batch, heads, tokens / group_size, channels, group_size].
        """
        if not self._per_channel:
            return states
        return states.unflatten(2, (-1, self.tokens_per_row)).transpose(-1, -2)

    def _unpacked(self) -> Tensor:
        assert self.packed is not None
        states = self.packed.decode()
        return states.transpose(-1, -2).flatten(2, 3) if self._per_channel else states
