"""Tables in the place of layers that compute of the timestep alone, one row for each timestep.

For the timesteps of a schedule, what such a layer returns is known beforehand: the table is exact, and
neither the layer's weights nor those that only fed it are needed any more.

Source: the cache of temporal features in the journal version of TFMQ-DM (Huang et al., TPAMI 2025,
arXiv 2407.19547).
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from ptqcore.attachments import carry_over
from ptqcore.errors import ModelError
from ptqcore.modules import QUANTIZED_BY, quantized_class, replace_module, state_bytes, weight_rows
from ptqcore.spec import QuantSpec
from ptqcore.timesteps import current


class TimestepTable(nn.Module):
    """Returns, for every row of a batch, the row of a table that is of its timestep.

    Buffer `table` [timesteps, …]: what the layer that it replaces gives one row of a batch, at each of the
    model's `Timesteps`. Other timesteps get what these say: the nearest row, or one in between. A table
    without rows is of a layer that nothing needs any more: it returns zeros.
    """

    table: Tensor

    def __init__(self, layer: nn.Module, table: Tensor) -> None:
        """Args:
        layer: the float layer that is replaced.
        table: [timesteps, …], or [0, …] where nothing reads it.

        Raises:
            ModelError: if the layer is no linear layer or convolution.
        """
        super().__init__()
        kind = quantized_class(layer)
        if kind is None:
            raise ModelError(
                f"a {type(layer).__name__} has no kind of table: linear layers and convolutions have"
            )
        self.function = kind.function
        self.weight_shape = tuple(weight_rows(layer).shape)
        self.replaced_bytes = state_bytes(layer)
        self.register_buffer("table", table.detach())

    @property
    def is_vacant(self) -> bool:
        """Whether nothing needs what it returns."""
        return not len(self.table)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, …], of which the number of rows and the dtype count; returns [batch, …].

        Raises:
            ModelError: if no timestep is known, or x has not a whole number of rows for each timestep.
        """
        return _NAMED[self.function](x, self)

    def rows_for(self, x: Tensor) -> Tensor:
        """The row of each row of x."""
        shape = self.table.shape[1:]
        if self.is_vacant:
            return x.new_zeros(x.shape[0], *shape)
        rows = current().of(self.table).reshape(-1, *shape)
        count = rows.shape[0]  # len(rows) would be a number to tracers, who leave the batch open
        if x.shape[0] % count:
            raise ModelError(f"a table was asked for {x.shape[0]} rows, with {count} timesteps for them")
        return rows.repeat_interleave(x.shape[0] // count, 0).to(x.dtype)

    def extra_repr(self) -> str:
        return str(list(self.table.shape))


def _named(name: str) -> Callable[[Tensor, TimestepTable], Tensor]:
    """A torch function of the replaced layer's name, so that its edges are found where the layer's were."""

    def function(x: Tensor, table: TimestepTable) -> Tensor:
        if has_torch_function_unary(x):
            result: Tensor = handle_torch_function(function, (x,), x, table)
            return result
        return table.rows_for(x)

    function.__name__ = name
    return function


_NAMED = {kind.function: _named(kind.function) for kind in QUANTIZED_BY.values()}


def replace_by_table(model: nn.Module, path: str, table: Tensor) -> TimestepTable:
    """Put a table in the place of the float layer at `path`, with what is attached to that.

    Args:
        model: changed in place.
        path: of the layer.
        table: [timesteps, …], in the order of the model's `Timesteps`; [0, …] where nothing reads it.

    Raises:
        ModelError: if the layer is no linear layer or convolution.
    """
    layer = model.get_submodule(path)
    new = TimestepTable(layer, table).train(layer.training)
    carry_over(layer, new)
    replace_module(model, path, new)
    return new


def tables_in(module: nn.Module, prefix: str = "") -> dict[str, TimestepTable]:
    """The tables inside a module, by path."""
    named = module.named_modules(prefix=prefix)
    return {path: one for path, one in named if isinstance(one, TimestepTable)}


def packed_bytes(layer: nn.Module, spec: QuantSpec) -> int:
    """Bytes of a float layer once its weight is packed with this grid, its bias included.

    Raises:
        ModelError: if the layer is no linear layer or convolution.
    """
    kind = quantized_class(layer)
    if kind is None:
        raise ModelError(f"a {type(layer).__name__} has no quantized kind")
    return state_bytes(kind(layer, spec, None))


def table_sizes(model: nn.Module) -> dict[str, int]:
    """For the report: bytes of a model's tables, and of the float weights that they replace."""
    tables = tables_in(model).values()
    if not tables:
        return {}
    return {
        "tables": sum(one.table.nbytes for one in tables),
        "float weights replaced by tables": sum(one.replaced_bytes for one in tables),
    }
