"""Which grid every weight and activation of one model gets, from a recipe and the dataflow map."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from ptqcore.dataflow import Dataflow, Op
from ptqcore.placement import LAYERS, PRODUCTS, Edge, find_edges, moves
from ptqcore.recipe import Entry, QuantSection, TensorQuant

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Grids:
    """edges: the grid of every rounded tensor between functions, in the scope `dataflow`; ends: the
    first and last layers, which `quant.first_last_bits` is for; bits: layers to whose weights a step
    has given another width; timesteps: those that the calibration samples are of, in rising order;
    by_timestep: modules whose inputs a step has given a range for each of them, those in of_timestep as
    functions of the timestep alone; tables: layers that a step replaces by tables with a row for each of
    them (`ptqcore.TimestepTable`), and those that only such layers read; readers: the modules that multiply
    what is at an edge, or add or join it where none does."""

    quant: QuantSection
    ends: frozenset[str] = frozenset()
    edges: dict[Edge, TensorQuant] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    by_timestep: set[str] = field(default_factory=set)
    of_timestep: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    readers: dict[Edge, frozenset[str]] = field(default_factory=dict)

    def weights(self, path: str) -> TensorQuant:
        """The grid of the weight of the layer at `path`."""
        if path in self.bits:
            return self.quant.weights.model_copy(update={"bits": self.bits[path]})
        return self._at(path in self.ends, self.quant.weights)

    def inputs(self, path: str) -> TensorQuant | None:
        """The grid of the input of the layer at `path`, in the scope `layers`."""
        if self.quant.activations is None or self.quant.scope == "dataflow":
            return None
        found = self._at(path in self.ends, self.quant.activations)
        return self._for_each_timestep(found, {path}) if path in self.by_timestep else found

    def exceptions(self, paths: Iterable[str]) -> dict[str, str]:
        """Those of some layers whose width is not that of the recipe, and why: path → text."""
        quant, at_ends = self.quant, self.quant.first_last_bits
        usual = {one.bits for one in (quant.weights, quant.activations) if one is not None}
        found = {}
        for path in paths:
            if self.bits.get(path, quant.weights.bits) != quant.weights.bits:
                found[path] = f"weights of {self.bits[path]} bits, as a step chose"
            elif path in self.ends and at_ends is not None and usual != {at_ends}:
                found[path] = f"{at_ends} bits, as a first or last layer (quant.first_last_bits)"
        return found

    def range_for_each_timestep(self, paths: Iterable[str], of_timestep: Iterable[str] = ()) -> None:
        """Give what flows into these layers a range for each timestep, in the scope `dataflow` wherever
        that is rounded, and what other modules multiply or add; dynamic grids stay as they are.

        What is a function of the timestep alone takes one value for each: its range is that of the value,
        whatever observer the recipe names.

        Args:
            paths: of the modules.
            of_timestep: those of them whose inputs are functions of the timestep alone.

        Raises:
            ValueError: if the calibration samples have no timesteps.
        """
        if not self.timesteps:
            raise ValueError("the calibration samples have no timesteps")
        self.by_timestep.update(paths)
        self.of_timestep.update(of_timestep)
        for edge, quant in self.edges.items():
            if not self.by_timestep.isdisjoint(self.readers[edge]):
                self.edges[edge] = self._for_each_timestep(quant, self.readers[edge])

    def _for_each_timestep(self, quant: TensorQuant, readers: Collection[str]) -> TensorQuant:
        if quant.dynamic:
            return quant
        changed: dict[str, object] = {"granularity": "timestep", "timesteps": len(self.timesteps)}
        if self.of_timestep.issuperset(readers):
            changed |= {"of_timestep": True, "observer": Entry(name="minmax")}
        return quant.model_copy(update=changed)

    def _at(self, end: bool, quant: TensorQuant) -> TensorQuant:
        bits = self.quant.first_last_bits
        return quant.model_copy(update={"bits": bits}) if end and bits is not None else quant


def make_grids(
    quant: QuantSection, flow: Dataflow, targets: set[str], timesteps: Iterable[float] = ()
) -> Grids:
    """The grids of one model.

    Activations have the recipe's width where a layer or a product of two activations reads them;
    tensors that only sums, concatenations or pooling read have 8 bits, as engines give them.

    Args:
        quant: the recipe's section.
        flow: one traced forward pass.
        targets: paths of the layers that will be quantized.
        timesteps: of the calibration samples, where models have such.
    """
    ends = _ends(flow, targets)
    grids = Grids(quant, frozenset(ends), timesteps=tuple(timesteps))
    if quant.scope == "layers" or quant.activations is None:
        return grids
    readers, ops = flow.consumers(), {op.site: op for op in flow.ops}
    for edge in find_edges(flow, targets):
        op = ops[edge.site]
        number = (op.inputs if edge.side == "input" else op.outputs)[edge.index]
        multiplied = [reader for reader in _behind_moves(number, readers) if _multiplies(reader, targets)]
        owners = {op.site.owner, *(reader.site.owner for reader in multiplied)}
        at_end = edge.side == "input" or not owners.isdisjoint(ends)
        own = grids._at(at_end, quant.activations)
        grids.edges[edge] = own if multiplied else own.model_copy(update={"bits": 8})
        reads = multiplied if edge.side == "output" and multiplied else [op]
        grids.readers[edge] = frozenset(reader.site.owner for reader in reads)
    return grids


def _behind_moves(number: int, readers: dict[int, list[Op]]) -> Iterator[Op]:
    """The functions that read a tensor, directly or behind others that only move its values."""
    for reader in readers.get(number, []):
        yield reader
        if moves(reader) or reader.name == "relu":
            for output in reader.outputs:
                yield from _behind_moves(output, readers)


def _multiplies(op: Op, targets: set[str]) -> bool:
    return op.name in PRODUCTS or (op.name in LAYERS and op.site.owner in targets)


def _ends(flow: Dataflow, targets: set[str]) -> set[str]:
    """Layers whose input comes from no other layer, and layers whose output goes into none."""
    forward = [(op, op.inputs, op.outputs) for op in flow.ops]
    backward = [(op, op.outputs, op.inputs) for op in reversed(flow.ops)]
    return _met_first(forward, targets) | _met_first(backward, targets)


def _met_first(steps: Iterable[tuple[Op, Numbers, Numbers]], targets: set[str]) -> set[str]:
    """The target layers that no way through (op, tensors it is reached by, tensors it leads to) meets
    behind another."""
    behind: set[int] = set()
    first = set()
    for op, entered_by, leads_to in steps:
        reached = not behind.isdisjoint(entered_by)
        is_layer = op.name in LAYERS and op.site.owner in targets
        if is_layer and not reached:
            first.add(op.site.owner)
        if is_layer or reached:
            behind.update(leads_to)
    return first
