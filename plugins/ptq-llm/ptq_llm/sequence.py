"""Which layers of a block come before which: in a Llama block q, k, v, then o, then gate, up, then down."""

from collections import defaultdict
from collections.abc import Iterable

from ptq_llm.flow_questions import within
from ptqcore import Block, Dataflow


def in_sequence(flow: Dataflow, block: Block, layers: Iterable[str]) -> list[list[str]]:
    """Some layers of a block, by how many of them lie on the longest way to their input.

    Layers that the traced sample did not reach come last.

    Args:
        flow: one traced forward pass of the model.
        block: the block.
        layers: their paths.
    """
    wanted = dict.fromkeys(layers)
    behind: dict[int, int] = {}  # tensor → layers on the longest way to it
    places: dict[str, int] = {}
    for op in flow.ops:
        owner = op.site.owner
        if not within(owner, block.path):
            continue
        depth = max((behind.get(number, 0) for number in op.inputs), default=0)
        if owner in wanted:
            places[owner] = max(depth, places.get(owner, 0))
            depth += 1
        behind.update(dict.fromkeys(op.outputs, depth))
    rows: dict[int, list[str]] = defaultdict(list)
    last = max(places.values(), default=0) + 1
    for path in wanted:
        rows[places.get(path, last)].append(path)
    return [rows[place] for place in sorted(rows)]
