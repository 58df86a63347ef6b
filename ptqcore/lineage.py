"""Where tensors come from: the layers of a network, and the functions that join what they return."""

from dataclasses import dataclass

from ptqcore.dataflow import Dataflow, Op
from ptqcore.placement import LAYERS


@dataclass(frozen=True)
class Item:
    """A source of tensors: a layer, an embedding, a function that joins tensors, or an input (`op` is
    None).

    reads: (tensor, number of the item that it comes from) for each tensor that flows in.
    """

    op: Op | None
    reads: tuple[tuple[int, int], ...] = ()


class Lineage:
    """Every floating tensor that depends on the model's input comes from exactly one item.

    All other functions (activation functions, norms, those that move values) hand on the item of what
    they read: whatever they read, it comes from one and the same.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.items = [Item(None) for _ in flow.inputs]
        self.source = {number: index for index, number in enumerate(flow.inputs)}
        for op in flow.ops:
            reads = tuple((n, self.source[n]) for n in dict.fromkeys(op.inputs) if n in self.source)
            if not reads:
                continue
            joined = {item for number, item in reads if number in flow.floating}
            embeds = not joined and not flow.floating.isdisjoint(op.outputs)
            if op.name in LAYERS or len(joined) > 1 or embeds:
                self.items.append(Item(op, reads))
                item = len(self.items) - 1
            else:
                item = joined.pop() if joined else reads[0][1]
            self.source.update(dict.fromkeys(op.outputs, item))

    def name(self, item: int) -> str:
        """The path of a layer, the site of another function, or `input`."""
        op = self.items[item].op
        if op is None:
            return "input"
        return op.site.owner if op.name in LAYERS else str(op.site)

    def is_residual(self, item: int) -> bool:
        """Whether an item joins something and what was computed from it, itself or after one layer."""
        first, *others = [source for _, source in self.items[item].reads]
        return any(self._skips(first, other) or self._skips(other, first) for other in others)

    def _skips(self, short: int, long: int) -> bool:
        """Whether `long` was computed from `short`, or from what the one layer `short` reads."""
        if short in self._before(long):
            return True
        starts, ends = self._parents(short), self._parents(long)
        return any(start in self._before(end) for start in starts for end in ends)

    def _parents(self, item: int) -> set[int]:
        return {source for _, source in self.items[item].reads}

    def _before(self, item: int) -> set[int]:
        """All items that an item was computed from."""
        found: set[int] = set()
        left = [item]
        while left:
            new = self._parents(left.pop()) - found
            found |= new
            left.extend(new)
        return found
