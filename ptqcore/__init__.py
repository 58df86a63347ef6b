"""ptqcore: post-training quantization by task. The names in `__all__` are the public interface."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptqcore.version import __version__

if TYPE_CHECKING:
    from ptqcore import grid as grid
    from ptqcore.added_timesteps import add_timesteps as add_timesteps
    from ptqcore.artifact import load as load
    from ptqcore.attachments import Attachment as Attachment
    from ptqcore.attachments import attach as attach
    from ptqcore.attachments import attachments_of as attachments_of
    from ptqcore.attention import split_attention as split_attention
    from ptqcore.block_learner import BlockLearner as BlockLearner
    from ptqcore.block_learner import Phase as Phase
    from ptqcore.blocks import Block as Block
    from ptqcore.blocks import find_blocks as find_blocks
    from ptqcore.calibration import Calibration as Calibration
    from ptqcore.checkpoints import put_weights as put_weights
    from ptqcore.checkpoints import read_checkpoint as read_checkpoint
    from ptqcore.dataflow import Dataflow as Dataflow
    from ptqcore.dataflow import Op as Op
    from ptqcore.dataflow import tensors_in as tensors_in
    from ptqcore.dataflow import trace as trace
    from ptqcore.distributed import Share as Share
    from ptqcore.distributed import divided as divided
    from ptqcore.errors import ArtifactError as ArtifactError
    from ptqcore.errors import BugError as BugError
    from ptqcore.errors import DataError as DataError
    from ptqcore.errors import DistributedError as DistributedError
    from ptqcore.errors import ExportError as ExportError
    from ptqcore.errors import ModelError as ModelError
    from ptqcore.errors import OutOfMemoryError as OutOfMemoryError
    from ptqcore.errors import PluginError as PluginError
    from ptqcore.errors import PtqError as PtqError
    from ptqcore.errors import RecipeError as RecipeError
    from ptqcore.errors import SweepError as SweepError
    from ptqcore.errors import nearest as nearest
    from ptqcore.export.base import Exporter as Exporter
    from ptqcore.export.onnx_file import read_onnx_graph as read_onnx_graph
    from ptqcore.export.onnx_weight_only import OnnxProduct as OnnxProduct
    from ptqcore.export.onnx_weight_only import OnnxWeightOnly as OnnxWeightOnly
    from ptqcore.files import digest_files as digest_files
    from ptqcore.files import write_tensors as write_tensors
    from ptqcore.files import write_text as write_text
    from ptqcore.fingerprint import digest_of as digest_of
    from ptqcore.folding import relative_difference as relative_difference
    from ptqcore.learned_rounding import QDrop as QDrop
    from ptqcore.learned_rounding import QDropOptions as QDropOptions
    from ptqcore.learned_rounding import Reconstruct as Reconstruct
    from ptqcore.learned_rounding import ReconstructOptions as ReconstructOptions
    from ptqcore.memory_left import free_memory as free_memory
    from ptqcore.midway import Midway as Midway
    from ptqcore.mmengine_history import training_history as training_history
    from ptqcore.modules import QuantConv2d as QuantConv2d
    from ptqcore.modules import QuantLinear as QuantLinear
    from ptqcore.modules import QuantModule as QuantModule
    from ptqcore.modules import weight_rows as weight_rows
    from ptqcore.observers import MSE as MSE
    from ptqcore.observers import MinMax as MinMax
    from ptqcore.observers import MovingAverage as MovingAverage
    from ptqcore.observers import Observer as Observer
    from ptqcore.observers import ObserverOptions as ObserverOptions
    from ptqcore.observers import Percentile as Percentile
    from ptqcore.on_disk import as_type as as_type
    from ptqcore.on_disk import in_memory as in_memory
    from ptqcore.on_disk import is_on_disk as is_on_disk
    from ptqcore.on_disk import pieces as pieces
    from ptqcore.on_disk import storage_of as storage_of
    from ptqcore.on_disk import tensors_on_disk as tensors_on_disk
    from ptqcore.on_disk import without_memory as without_memory
    from ptqcore.packed import QuantizedTensor as QuantizedTensor
    from ptqcore.packed import pack_bits as pack_bits
    from ptqcore.packed import unpack_bits as unpack_bits
    from ptqcore.picture_size import stated_size as stated_size
    from ptqcore.placement import Edge as Edge
    from ptqcore.plan import find_recipe as find_recipe
    from ptqcore.plugin import Plugin as Plugin
    from ptqcore.problem import Objective as Objective
    from ptqcore.problem import Problem as Problem
    from ptqcore.problem import Schedule as Schedule
    from ptqcore.progress import say as say
    from ptqcore.progress import track as track
    from ptqcore.quantizers import FakeQuant as FakeQuant
    from ptqcore.quantizers import LearnedCodes as LearnedCodes
    from ptqcore.quantizers import LearnedRounding as LearnedRounding
    from ptqcore.quiet import quietly as quietly
    from ptqcore.reading import one_line as one_line
    from ptqcore.reading import one_sentence as one_sentence
    from ptqcore.reading import parse_json as parse_json
    from ptqcore.reading import read_bytes as read_bytes
    from ptqcore.reading import read_json as read_json
    from ptqcore.recipe import QuantSection as QuantSection
    from ptqcore.recipe import Recipe as Recipe
    from ptqcore.recipe import TensorQuant as TensorQuant
    from ptqcore.reconstruction import reconstruct as reconstruct
    from ptqcore.report.figures import Curves as Curves
    from ptqcore.report.figures import Pictures as Pictures
    from ptqcore.report.record import EngineRecord as EngineRecord
    from ptqcore.report.record import Verification as Verification
    from ptqcore.report.table_page import BarChart as BarChart
    from ptqcore.report.table_page import TablePage as TablePage
    from ptqcore.report.table_text import Spread as Spread
    from ptqcore.report.table_text import csv_table as csv_table
    from ptqcore.report.table_text import markdown_table as markdown_table
    from ptqcore.run import quantize as quantize
    from ptqcore.spec import QuantSpec as QuantSpec
    from ptqcore.statistics import Gram as Gram
    from ptqcore.step import Chain as Chain
    from ptqcore.step import Context as Context
    from ptqcore.step import Step as Step
    from ptqcore.step import StepOptions as StepOptions
    from ptqcore.step import check_globs as check_globs
    from ptqcore.store import Store as Store
    from ptqcore.structure import Structure as Structure
    from ptqcore.sweeps.specification import Sweep as Sweep
    from ptqcore.sweeps.specification import read_sweep as read_sweep
    from ptqcore.sweeps.sweep import sweep as sweep
    from ptqcore.tables import TimestepTable as TimestepTable
    from ptqcore.tables import packed_bytes as packed_bytes
    from ptqcore.tables import replace_by_table as replace_by_table
    from ptqcore.task import Task as Task
    from ptqcore.task import TaskOptions as TaskOptions
    from ptqcore.tensor_header import StoredTensor as StoredTensor
    from ptqcore.tensor_header import read_tensor_header as read_tensor_header
    from ptqcore.timesteps import Timesteps as Timesteps
    from ptqcore.timesteps import timesteps_of as timesteps_of
    from ptqcore.user_code import check_imported as check_imported
    from ptqcore.user_code import import_network as import_network
    from ptqcore.user_code import import_object as import_object
    from ptqcore.walk import BlockIO as BlockIO
    from ptqcore.weights import Weights as Weights
    from ptqcore.weights import check_config as check_config
    from ptqcore.weights import read_weights as read_weights

_HOME = {
    "Op": "dataflow",
    "tensors_in": "dataflow",
    "trace": "dataflow",
    "LearnedCodes": "quantizers",
    "LearnedRounding": "quantizers",
    "Objective": "problem",
    "Problem": "problem",
    "Midway": "midway",
    "Schedule": "problem",
    "reconstruct": "reconstruction",
    "Timesteps": "timesteps",
    "timesteps_of": "timesteps",
    "add_timesteps": "added_timesteps",
    "TimestepTable": "tables",
    "packed_bytes": "tables",
    "replace_by_table": "tables",
    "relative_difference": "folding",
    "Attachment": "attachments",
    "Chain": "step",
    "check_globs": "step",
    "attach": "attachments",
    "attachments_of": "attachments",
    "check_imported": "user_code",
    "import_network": "user_code",
    "import_object": "user_code",
    "Weights": "weights",
    "check_config": "weights",
    "read_weights": "weights",
    "one_line": "reading",
    "one_sentence": "reading",
    "parse_json": "reading",
    "read_bytes": "reading",
    "read_json": "reading",
    "read_tensor_header": "tensor_header",
    "stated_size": "picture_size",
    "StoredTensor": "tensor_header",
    "put_weights": "checkpoints",
    "read_checkpoint": "checkpoints",
    "weight_rows": "modules",
    "say": "progress",
    "load": "artifact",
    "Structure": "structure",
    "Block": "blocks",
    "find_blocks": "blocks",
    "BlockLearner": "block_learner",
    "Phase": "block_learner",
    "QDrop": "learned_rounding",
    "QDropOptions": "learned_rounding",
    "Reconstruct": "learned_rounding",
    "ReconstructOptions": "learned_rounding",
    "BlockIO": "walk",
    "Sweep": "sweeps.specification",
    "read_sweep": "sweeps.specification",
    "sweep": "sweeps.sweep",
    "SweepError": "errors",
    "Share": "distributed",
    "divided": "distributed",
    "DistributedError": "errors",
    "ArtifactError": "errors",
    "BugError": "errors",
    "OutOfMemoryError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "ModelError": "errors",
    "PluginError": "errors",
    "PtqError": "errors",
    "RecipeError": "errors",
    "nearest": "errors",
    "Exporter": "export.base",
    "OnnxProduct": "export.onnx_weight_only",
    "read_onnx_graph": "export.onnx_file",
    "OnnxWeightOnly": "export.onnx_weight_only",
    "QuantConv2d": "modules",
    "QuantLinear": "modules",
    "QuantModule": "modules",
    "MSE": "observers",
    "MinMax": "observers",
    "MovingAverage": "observers",
    "Percentile": "observers",
    "Observer": "observers",
    "ObserverOptions": "observers",
    "as_type": "on_disk",
    "in_memory": "on_disk",
    "pieces": "on_disk",
    "is_on_disk": "on_disk",
    "storage_of": "on_disk",
    "quietly": "quiet",
    "training_history": "mmengine_history",
    "Store": "store",
    "tensors_on_disk": "on_disk",
    "without_memory": "on_disk",
    "free_memory": "memory_left",
    "QuantizedTensor": "packed",
    "pack_bits": "packed",
    "unpack_bits": "packed",
    "Plugin": "plugin",
    "track": "progress",
    "FakeQuant": "quantizers",
    "QuantSection": "recipe",
    "Recipe": "recipe",
    "TensorQuant": "recipe",
    "Curves": "report.figures",
    "Pictures": "report.figures",
    "EngineRecord": "report.record",
    "Verification": "report.record",
    "quantize": "run",
    "QuantSpec": "spec",
    "split_attention": "attention",
    "Gram": "statistics",
    "digest_of": "fingerprint",
    "digest_files": "files",
    "write_tensors": "files",
    "write_text": "files",
    "Edge": "placement",
    "find_recipe": "plan",
    "BarChart": "report.table_page",
    "TablePage": "report.table_page",
    "Spread": "report.table_text",
    "csv_table": "report.table_text",
    "markdown_table": "report.table_text",
    "Calibration": "calibration",
    "Context": "step",
    "Dataflow": "dataflow",
    "Step": "step",
    "StepOptions": "step",
    "Task": "task",
    "TaskOptions": "task",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that the command line starts without torch."""
    if name == "grid":
        return import_module("ptqcore.grid")
    if name not in _HOME:
        raise AttributeError(f"module 'ptqcore' has no attribute {name!r}")
    return getattr(import_module(f"ptqcore.{_HOME[name]}"), name)
