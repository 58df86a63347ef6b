"""One recipe on one model: what its process is told, and the files that it leaves its figures in."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ptqcore import read_json, write_text

Kind = Literal["text", "task"]


@dataclass(frozen=True)
class Cost:
    """What a run cost, and what came out.

    tokens_per_second: calibration tokens divided by the seconds that all blocks took together, with
    their calibration and every step in them; not loading, tracing, measuring and saving.
    seconds: of the run, without measuring the model before and after. Of a run that was interrupted, the
    blocks finished before are counted, what was repeated is not.
    peak_memory_bytes: largest resident memory of the run's process, measuring included.
    size_before_bytes, size_after_bytes: of the full-precision tensors, and of the artifact's.
    """

    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    size_before_bytes: int
    size_after_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What a model is worth on a text or a task: metrics by name, of the full-precision model and of the
    quantized one; or why there are none."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Exam:
    """A text, or a file of a zero-shot task, that a model is judged on.

    file: where the verdict is kept; its name tells everything that decides what is in it.
    """

    kind: Kind
    source: str
    file: str

    def read(self) -> Verdict | None:
        """The verdict; None as long as there is none."""
        found = _read(self.file)
        return None if found is None else Verdict(**found)

    def write(self, verdict: Verdict) -> None:
        """Keep the verdict."""
        write_text(Path(self.file), json.dumps(asdict(verdict), indent=2) + "\n")

    def fail(self, reason: str) -> None:
        """Keep a reason in its place."""
        self.write(Verdict(reason=reason))


@dataclass(frozen=True)
class Job:
    """A recipe on a model, to be quantized once and judged on every exam.

    recipe: the recipe's name. sections: the recipe itself, `task.model` and `task.shared` set; its
    `task.text` is each text in turn. folder: of the artifact. cost: file of the `Cost`.
    resume: whether to go on with an interrupted run.
    """

    recipe: str
    model: str
    sections: dict[str, Any]
    folder: str
    cost: str
    exams: list[Exam]
    resume: bool = False

    def read_cost(self) -> Cost | None:
        """What the run cost; None as long as there is no artifact."""
        found = _read(self.cost) if (Path(self.folder) / "manifest.json").is_file() else None
        return None if found is None else Cost(**found)

    def write_cost(self, cost: Cost) -> None:
        """Keep what the run cost."""
        write_text(Path(self.cost), json.dumps(asdict(cost), indent=2) + "\n")

    def open_exams(self) -> list[Exam]:
        """Those without a verdict."""
        return [exam for exam in self.exams if exam.read() is None]

    def fail(self, reason: str) -> None:
        """Give every exam without a verdict a reason."""
        for exam in self.open_exams():
            exam.fail(reason)

    def forget(self, failures_only: bool) -> None:
        """Remove what an earlier bench found; with `failures_only`, only what failed."""
        for exam in self.exams:
            verdict = exam.read()
            if verdict is not None and (verdict.reason or not failures_only):
                Path(exam.file).unlink()
        if not failures_only:
            Path(self.cost).unlink(missing_ok=True)

    def to_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """What `to_json` wrote."""
        data = json.loads(text)
        return cls(**data | {"exams": [Exam(**exam) for exam in data["exams"]]})


def _read(file: str) -> dict[str, Any] | None:
    """What a file holds; None if it is not there, or is damaged."""
    try:
        found = read_json(Path(file))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
