"""A stand-in for `mmcv._ext`, the compiled operations of mmcv, where only `mmcv-lite` is installed.

PyPI has no wheel of mmcv with operations, and mmseg and mmdet import them; most networks call none.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ptqcore import ModelError

_NAME = "mmcv._ext"


def install() -> None:
    """Make `import mmcv._ext` work; the real operations are used where they are installed."""
    if _NAME not in sys.modules and find_spec(_NAME) is None:
        sys.modules[_NAME] = _Operations()


class _Operations(ModuleType):
    """The module itself: every operation is a function that refuses to run."""

    def __init__(self) -> None:
        super().__init__(_NAME, __doc__)
        # mmcv and torch look modules up by their spec; without one they raise.
        self.__spec__ = ModuleSpec(_NAME, None, origin="ptq-lane")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise ModelError(
                f"the network needs mmcv's compiled operation {name!r}, which mmcv-lite lacks: build mmcv "
                "from source, with MMCV_WITH_OPS=1 pip install --no-build-isolation 'mmcv==2.1.0'"
            )

        return refuse
