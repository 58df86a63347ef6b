"""Run an ONNX file in a real engine, in another process, and say what ran in integer arithmetic."""

from ptqcore.engines.execution import ENGINES, ExecutedNode, Execution, execute
from ptqcore.engines.fallback import fallback_reasons

__all__ = ["ENGINES", "ExecutedNode", "Execution", "execute", "fallback_reasons"]
