"""Ranges for each timestep in a graph: looked up once, and kept outside of what engines do in integers.

Engines compute in integers only with constant scales. So a tensor that lies on the grid of its timestep,
with scale s and zero point z, goes into a product as its codes q, on a grid of scale 1 and zero point 0,
and the product is corrected behind: Σ w · s (q − z) = s · (Σ w q − z Σ w).
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from ptqcore.errors import ExportError
from ptqcore.export.onnx_edit import OnnxEditor, attribute, moves
from ptqcore.quantizers import FakeQuant
from ptqcore.timesteps import Timesteps

_LARGEST = 255


def look_up(editor: OnnxEditor, timesteps: Timesteps) -> "TimedTensors":
    """Put the search for the row of the timestep in the place of the nodes `Moment`.

    Raises:
        ExportError: if the graph has no input of that name, or one of two dimensions.
    """
    lookup = Lookup(editor, timesteps)
    for node in editor.nodes("Moment"):
        editor.redirect(node.outputs[0], lookup.index)
    return TimedTensors(editor, lookup)


class Lookup:
    """Entries of tables [timesteps, …] in a graph, for the timestep that it is given as an input.

    The row is that of the nearest timestep; of two that are as near, that of the larger one.
    """

    def __init__(self, editor: OnnxEditor, timesteps: Timesteps) -> None:
        """Raises:
        ExportError: if the graph has no input of that name, or one of two dimensions.
        """
        self.editor, self.values = editor, timesteps.values.cpu().numpy().astype(np.float32)
        given = next((value for value in editor.graph.inputs if value.name == timesteps.argument), None)
        if given is None:
            raise ExportError(
                f"export to ONNX: the model is given {timesteps.argument} as a number, and a graph takes "
                "tensors: call it with a tensor"
            )
        if given.shape is None or len(given.shape) > 1:
            raise ExportError(
                f"export to ONNX: {timesteps.argument} has {given.shape} as its shape: ranges for each "
                "timestep need one for the whole batch or one for each of its rows"
            )
        self._given, self._others = given, dict[str, ir.Value]()
        self._batch = given.shape[0] if len(given.shape) else None

    @cached_property
    def index(self) -> ir.Value:
        """The row [] or [batch]."""
        add, constant = self.editor.add, self.editor.constant
        wanted = add("Cast", [self._given], "timesteps.wanted", to=ir.DataType.FLOAT)
        last = constant("last_dimension", np.asarray([-1], np.int64))
        column = add("Unsqueeze", [wanted, last], "timesteps.column")
        apart = add("Sub", [column, constant("timesteps.values", self.values)], "timesteps.apart")
        distance = add("Abs", [apart], "timesteps.distance")
        return add("ArgMin", [distance], "timesteps.index", axis=-1, keepdims=0, select_last_index=1)

    def entry(self, name: str, table: np.ndarray, like: ir.Value) -> ir.Value:
        """The entry of a table [timesteps], shaped to be multiplied with a tensor: [rows, 1, …]."""
        assert like.shape is not None
        index, ones = self._index_for(like), (1,) * (len(like.shape) - 1)
        name = f"{name}.{len(like.shape)}" if ones else name
        label = name if index is self.index else f"{name}.{like.shape[0]}_rows"
        known = self.editor.made(label)
        if known is not None:
            return known
        held = self.editor.constant(f"{name}.table", table.astype(np.float32).reshape(-1, *ones))
        return self.editor.add("Gather", [held, index], label, axis=0)

    def _index_for(self, like: ir.Value) -> ir.Value:
        """A row for each row of a tensor: where these are more than timesteps (heads folded into the
        batch), each is that of as many rows in a row; what has no rows of the batch gets the first."""
        assert like.shape is not None
        if not self.for_rows or like.shape[0] == self._batch:
            return self.index
        rows = str(like.shape[0])
        if rows not in self._others:
            each = self._share(like.shape[0])
            self._others[rows] = self._repeated(each) if each else self._first()
        return self._others[rows]

    def _share(self, rows: int | ir.SymbolicDim) -> int:
        """How many of so many rows each timestep has; 0 if they have nothing to do with the batch.

        Raises:
            ExportError: if that is no number.
        """
        if isinstance(rows, int):
            fits = isinstance(self._batch, int) and rows % self._batch == 0
            return rows // int(str(self._batch)) if fits else 0
        multiple = re.fullmatch(rf"(\d+)\*{self._batch}|{self._batch}\*(\d+)", str(rows))
        if multiple is None:
            raise ExportError(
                f"export to ONNX: a tensor with a range for each timestep has {rows} rows, for a batch of "
                f"{self._batch}: each timestep needs the same number of them"
            )
        return int(multiple[1] or multiple[2])

    def _first(self) -> ir.Value:
        """The row of the first timestep [1]."""
        constant = self.editor.constant
        begin, end = (constant(f"place_{place}", np.asarray([place], np.int64)) for place in (0, 1))
        return self.editor.add("Slice", [self.index, begin, end], "timesteps.first")

    def _repeated(self, each: int) -> ir.Value:
        """Every row so many times in a row."""
        add, constant, name = self.editor.add, self.editor.constant, f"timesteps.{each}_times"
        last = constant("last_dimension", np.asarray([-1], np.int64))
        sizes = constant(f"{name}.sizes", np.asarray([1, each], np.int64))
        column = add("Unsqueeze", [self.index, last], f"{name}.column")
        return add("Reshape", [add("Expand", [column, sizes], f"{name}.repeated"), last], f"{name}.index")

    @property
    def for_rows(self) -> bool:
        """Whether every row of a batch has a timestep of its own."""
        return self._batch is not None


@dataclass(frozen=True)
class TimedGrid:
    """scale, zero_point [timesteps]: the grid of a tensor at each; levels: its largest code."""

    label: str
    scale: np.ndarray
    zero_point: np.ndarray
    levels: int

    @classmethod
    def of(cls, label: str, quantizer: FakeQuant) -> "TimedGrid":
        """That of a quantizer with a range for each timestep."""
        spec, scale = quantizer.spec, quantizer.scale
        assert scale is not None
        zero_point = quantizer.zero_point
        zeros = np.full(len(scale), spec.middle) if zero_point is None else zero_point.cpu().numpy()
        return cls(label, scale.cpu().numpy(), zeros, spec.levels)


class TimedTensors:
    """The tensors of a graph that lie on grids of their timestep."""

    def __init__(self, editor: OnnxEditor, lookup: Lookup) -> None:
        self.editor, self.lookup = editor, lookup
        self._grids: dict[ir.Value, TimedGrid] = {}
        self._steps: dict[ir.Value, ir.Value] = {}

    def quantized(self, value: ir.Value, grid: TimedGrid) -> ir.Value:
        """A value rounded to the grid of its timestep and back."""
        editor, name = self.editor, grid.label
        steps = editor.add("Div", [value, self.scale(grid, value)], f"{name}.divide")
        steps = _like(editor.add("Round", [steps], f"{name}.round"), value)
        codes = self.codes(steps, grid)
        offset = [whole(editor, codes, f"{name}.dequantize"), self.zero_point(grid, value)]
        minus = editor.add("Sub", offset, f"{name}.minus_zero")
        result = _like(editor.add("Mul", [minus, self.scale(grid, value)], f"{name}.dequantized"), value)
        self._grids[result], self._steps[result] = grid, steps
        return result

    def scale(self, grid: TimedGrid, like: ir.Value) -> ir.Value:
        """Of the timestep, shaped to be multiplied with a tensor."""
        return self.lookup.entry(f"{grid.label}.scale", grid.scale, like)

    def zero_point(self, grid: TimedGrid, like: ir.Value, middle: int = 0) -> ir.Value:
        """Of the timestep, shaped to be added to a tensor; counted from `middle`."""
        name = f"{grid.label}.zero_point" + (f".from_{middle}" if middle else "")
        return self.lookup.entry(name, grid.zero_point - middle, like)

    def codes(self, steps: ir.Value, grid: TimedGrid, middle: int = 0) -> ir.Value:
        """The codes of a tensor that is given in whole steps; counted from `middle`, 0 or 128."""
        maker = steps.producer()
        assert maker is not None
        add, name = self.editor.add, f"{maker.name}.{steps.index()}" + (".signed" if middle else "")
        known = self.editor.made(f"{name}.quantize")
        if known is not None:
            return known
        codes = add("Add", [steps, self.zero_point(grid, steps, middle)], f"{name}.plus_zero")
        if grid.levels < _LARGEST:
            largest = grid.levels - middle
            bound = self.editor.constant(f"at_most_{largest}", np.asarray(largest, np.float32))
            codes = add("Min", [codes, bound], f"{name}.clip")
        return add("QuantizeLinear", [codes, *_unit_grid(self.editor, bool(middle))], f"{name}.quantize")

    def grid(self, value: ir.Value | None) -> TimedGrid | None:
        """The grid of a tensor, which may have been moved or clipped at zero since it was rounded."""
        found = self._rounded(value)
        return None if found is None else self._grids[found]

    def _rounded(self, value: ir.Value | None) -> ir.Value | None:
        while value is not None and value not in self._grids:
            node = value.producer()
            if node is None or not self._keeps_rows(node):
                return None
            value = node.inputs[0]
        return value

    def steps(self, value: ir.Value) -> ir.Value:
        """A tensor that has a grid in whole steps of it, zero at zero."""
        if value in self._steps:
            return self._steps[value]
        node = value.producer()
        assert node is not None
        before = node.inputs[0]
        assert before is not None
        inputs, name = [self.steps(before), *node.inputs[1:]], f"{node.name}.steps"
        attributes = {key: one.value for key, one in node.attributes.items()}
        moved = ir.node(node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
        self.editor.graph.append(moved)
        for old, new in zip(node.outputs, moved.outputs, strict=True):
            new.name = f"{name}.{old.index()}"
            self._steps[old] = _like(new, old)
        return self._steps[value]

    def _keeps_rows(self, node: ir.Node) -> bool:
        """Whether a node only moves or clips values, and leaves each with the timestep that it has."""
        if node.op_type != "Relu" and not moves(node):
            return False
        if not self.lookup.for_rows:
            return True
        before, after = (value.shape for value in (node.inputs[0], node.outputs[0]) if value is not None)
        if not before or not after:
            return False
        if node.op_type == "Transpose" and attribute(node, "perm", [None])[0] != 0:
            return False
        if node.op_type == "Reshape" and not isinstance(after[0], int):
            return True
        return bool(before[0] == after[0])


def whole(editor: OnnxEditor, codes: ir.Value, name: str, signed: bool = False) -> ir.Value:
    """Codes as whole numbers in floating point: on a constant grid of scale 1."""
    return editor.add("DequantizeLinear", [codes, *_unit_grid(editor, signed)], name)


def _unit_grid(editor: OnnxEditor, signed: bool) -> list[ir.Value]:
    zero = np.asarray(0, np.int8 if signed else np.uint8)
    return [
        editor.constant("one_step", np.asarray(1, np.float32)),
        editor.constant("code_0_signed" if signed else "code_0", zero),
    ]


def _like(value: ir.Value, other: ir.Value) -> ir.Value:
    value.shape, value.type = other.shape, other.type
    return value
