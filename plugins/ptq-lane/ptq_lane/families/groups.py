"""Groups of outputs by name."""

from typing import Any

from torch import Tensor

from ptqcore import ModelError


def named_groups(outputs: Any, family: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The groups of a dict of outputs that a family reads.

    Raises:
        ModelError: if the outputs are no dict, or lack one of them.
    """
    if not isinstance(outputs, dict) or any(name not in outputs for name in names):
        returned = list(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ModelError(
            f"models of the family {family} return a dict with {', '.join(names)}, this one {returned}: "
            "wrap the model so that it does"
        )
    return {name: outputs[name] for name in names}
