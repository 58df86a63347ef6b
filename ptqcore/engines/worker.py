"""The process that an engine runs in: `python -m ptqcore.engines.worker FOLDER`."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ptqcore.engines.execution import Arrays, ExecutedNode, Execution, read_samples, write_result

_WARM_UPS = 3
_PROFILED_RUNS = 3
_PLACE = "Exception from src/"


class Session(Protocol):
    """A model loaded in an engine."""

    def run(self, sample: Arrays) -> Arrays:
        """The outputs by name for one sample."""
        ...

    def nodes(self) -> list[ExecutedNode]:
        """What ran, if the session was opened to be profiled; the session is not used afterwards."""
        ...


def work(folder: Path) -> None:
    """Do what the request in `folder` asks and write the result there."""
    request = json.loads((folder / "request.json").read_text())
    samples = read_samples(folder / "inputs.npz", request["inputs"])
    engine = import_module(f"ptqcore.engines.{request['engine']}_cpu")
    session: Session = engine.open_session(Path(request["model"]), request["threads"], None)
    outputs = [session.run(sample) for sample in samples]
    milliseconds = _time(session, samples[0], request["repeats"]) if request["repeats"] else []
    nodes = _profile(engine, request, samples[0], folder) if request["profile"] else []
    write_result(folder, Execution(request["engine"], outputs, milliseconds, nodes))


def _time(session: Session, sample: Arrays, repeats: int) -> list[float]:
    for _ in range(_WARM_UPS):
        session.run(sample)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        session.run(sample)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _profile(engine: Any, request: dict[str, Any], sample: Arrays, folder: Path) -> list[ExecutedNode]:
    session: Session = engine.open_session(Path(request["model"]), request["threads"], folder)
    for _ in range(_PROFILED_RUNS):
        session.run(sample)
    return session.nodes()


def main() -> int:
    """Exit code 1 and one line on stderr for whatever the engine raises."""
    try:
        work(Path(sys.argv[1]))
    except Exception as error:
        print(_one_line(error), file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    """The message without the places in the engine's source that OpenVINO puts before it."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(_PLACE)) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
