"""Nothing lost: the state of every finished block on disk, so that a killed run can go on."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ptqcore import distributed, files
from ptqcore.artifact import load_tensors, unique_tensors
from ptqcore.attachments import AttachmentEntry, FindAttachment, build_attachments, describe_attachments
from ptqcore.blocks import Block
from ptqcore.errors import ArtifactError, PtqError
from ptqcore.fingerprint import differences, digest_of
from ptqcore.memory_limit import limited_memory
from ptqcore.midway import Midway, forget, forget_all, midways
from ptqcore.on_disk import tensors_on_disk
from ptqcore.reading import one_line, plain_size, read_json
from ptqcore.report.record import ActivationRecord, BlockRecord, LayerRecord
from ptqcore.structure import LayerEntry, build_layers, build_tables, describe_layers, describe_tables
from ptqcore.tensor_header import read_tensor_header

_RANGE = "activation quantizer "
_MOST_NAMED = 4


@dataclass(frozen=True)
class BlockResult:
    """What a finished block adds to the record of the run."""

    block: BlockRecord
    layers: list[LayerRecord]
    activations: list[ActivationRecord] = field(default_factory=list)


class Journal:
    """Finished blocks of one run, under a fingerprint of everything that decides the result.

    Of several processes the first alone writes; all of them read.
    """

    def __init__(
        self, folder: Path, fingerprint: dict[str, str], resume: bool, find: FindAttachment
    ) -> None:
        """Open the journal; without `resume`, or if there is none, start an empty one.

        Args:
            folder: where it lies.
            fingerprint: of recipe, model, samples and versions.
            resume: whether to go on where an earlier run stopped.
            find: the class of an attachment, by its name.

        Raises:
            ArtifactError: if the earlier run was another one; the message names what differs.
        """
        self._folder, self._find = folder, find
        if not distributed.is_first():
            return
        header = folder / "journal.json"
        if resume and header.is_file():
            self._require_same(header, fingerprint)
        else:
            with files.writing(folder):
                for file in folder.glob("block-*"):
                    file.unlink()
                forget_all(folder)
            files.write_json(header, fingerprint)

    def _require_same(self, header: Path, fingerprint: dict[str, str]) -> None:
        try:
            earlier = read_json(header)
        except (OSError, ValueError):
            earlier = None
        if not isinstance(earlier, dict):
            raise ArtifactError(f"the journal in {self._folder} is damaged: run again without --resume")
        changed = differences(earlier, fingerprint)
        if changed:
            more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
            raise ArtifactError(
                f"--resume: the run interrupted in {self._folder.parent} had another "
                f"{', another '.join(changed[:_MOST_NAMED])}{more}; restore that, or run again without "
                "--resume"
            )

    def save(self, index: int, block: Block, result: BlockResult, ranges: dict[str, Tensor]) -> None:
        """Write a finished block; the description comes last and makes it valid.

        `ranges` are the scales and zero points of its activation quantizers, by name.
        """
        tensors = block.module.state_dict
        distributed.check_same(f"weights for block {block.path!r}", lambda: digest_of(dict(tensors())))
        if distributed.is_first():
            self._save(index, block, result, ranges)
        distributed.wait()

    def _save(self, index: int, block: Block, result: BlockResult, ranges: dict[str, Tensor]) -> None:
        tensors, tied = unique_tensors(block.module)
        ranges = {f"{_RANGE}{name}": tensor for name, tensor in ranges.items()}
        files.write_tensors(self._tensors(index), tensors | ranges)
        attached = describe_attachments(block.module, block.path)
        entry = {
            "path": block.path,
            "sha256": files.digest(self._tensors(index)),
            "tied": tied,
            "quantized": {
                path: layer.model_dump()
                for path, layer in describe_layers(block.module, block.path).items()
            },
            "tables": describe_tables(block.module, block.path),
            "attachments": [one.model_dump() for one in attached],
            "result": asdict(result),
        }
        files.write_json(self._entry(index), entry)
        with files.writing(self._folder):
            forget(self._folder, index)

    def leave_on_disk(self, index: int, block: Block) -> None:
        """Let a finished block keep its tensors in the journal's file, and no longer in memory.

        Raises:
            ArtifactError: if the file cannot be read.
        """
        try:
            tied = dict(read_json(self._entry(index))["tied"])
            tensors = tensors_on_disk(self._tensors(index))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self._tensors(index)} cannot be read: {error}; run again with --resume"
            ) from error
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RANGE)}
        load_tensors(block.module, own, tied)
        block.module.requires_grad_(False)

    def midways(self, index: int | None) -> Iterator[Midway]:
        """Where states of what a block learns are written, until it is finished; None: of what steps learn
        before the first block, which every resumed run does again."""
        return midways(self._folder, index)

    def has(self, index: int, block: Block) -> bool:
        """Whether this block was finished, and its files are whole; the first process decides."""
        found = distributed.is_first() and self._read(index, block) is not None
        return distributed.everywhere(found)[0]

    def restore(self, index: int, block: Block) -> tuple[BlockResult, dict[str, Tensor]]:
        """Put a finished block back into the model.

        Returns:
            What was saved: its figures, and the ranges of its activation quantizers.

        Raises:
            ArtifactError: if the block is not in the journal, or does not fit the model.
        """
        saved = self._read(index, block)
        if saved is None:
            raise ArtifactError(f"the journal in {self._folder} lacks block {block.path!r}")
        tensors = {name: value for name, value in saved.tensors.items() if not name.startswith(_RANGE)}
        numbers = sum(parameter.numel() for parameter in block.module.parameters())
        try:
            with limited_memory(numbers, len(tensors), f"the journal in {self._folder}"):
                build_layers(block.model, saved.layers)
                build_tables(block.model, saved.tables)
                build_attachments(block.model, saved.attachments, self._find)
            load_tensors(block.module, tensors, saved.tied)
        except PtqError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"the journal in {self._folder} does not fit block {block.path!r}: run again without "
                f"--resume ({one_line(error)})"
            ) from error
        block.module.requires_grad_(False)
        names = saved.tensors.keys() - tensors.keys()
        return saved.result, {name[len(_RANGE) :]: saved.tensors[name] for name in names}

    def _read(self, index: int, block: Block) -> "_Saved | None":
        """What is on disk for a block; None if it was not finished, or is damaged."""
        try:
            entry: dict[str, Any] = read_json(self._entry(index))
            if entry["path"] != block.path or not plain_size(self._tensors(index)):
                return None
            if files.digest(self._tensors(index)) != entry["sha256"]:
                return None
            read_tensor_header(self._tensors(index))
            figures = entry["result"]
            return _Saved(
                tensors=load_file(self._tensors(index)),
                tied=dict(entry["tied"]),
                layers={
                    path: LayerEntry.model_validate(layer) for path, layer in entry["quantized"].items()
                },
                tables={path: tuple(shape) for path, shape in entry["tables"].items()},
                attachments=[AttachmentEntry.model_validate(one) for one in entry["attachments"]],
                result=BlockResult(
                    BlockRecord(**_tuples(figures["block"])),
                    [LayerRecord(**_tuples(layer)) for layer in figures["layers"]],
                    [ActivationRecord(**_tuples(one)) for one in figures["activations"]],
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return None

    def _tensors(self, index: int) -> Path:
        return self._folder / f"block-{index:04d}.safetensors"

    def _entry(self, index: int) -> Path:
        return self._folder / f"block-{index:04d}.json"


@dataclass(frozen=True)
class _Saved:
    tensors: dict[str, Tensor]
    tied: dict[str, str]
    layers: dict[str, LayerEntry]
    tables: dict[str, tuple[int, ...]]
    attachments: list[AttachmentEntry]
    result: BlockResult


def _tuples(data: dict[str, Any]) -> Any:
    """JSON has lists where the records have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
