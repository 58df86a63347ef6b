"""The sweep: what is not done yet goes to worker processes, and the table is written after every run.

OUTPUT/sweep.md, sweep.csv, sweep.json, sweep.html    the table
OUTPUT/RECIPE-MODEL-sSEED/                            the artifact, the report and `run.log` of each run
"""

import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ptqcore import files
from ptqcore.artifact import read_manifest
from ptqcore.errors import PtqError
from ptqcore.fingerprint import versions
from ptqcore.plugin import discover
from ptqcore.progress import duration, say, track
from ptqcore.run import WORK
from ptqcore.sweeps.cluster import Cluster, connected
from ptqcore.sweeps.job import Job, Outcome
from ptqcore.sweeps.runs import Run, make_runs
from ptqcore.sweeps.specification import Sweep
from ptqcore.sweeps.table import Row, write_tables
from ptqcore.version import __version__


def sweep(
    wanted: Sweep,
    output: Path,
    address: str | None = None,
    workers: int | None = None,
    retries: int = 3,
    resume: bool = False,
) -> list[Row]:
    """Run every recipe on every model with every seed, and write one table of them all.

    Args:
        wanted: what to run; see `read_sweep`.
        output: folder for everything; with an `address`, on storage that all nodes share.
        address: of a Ray cluster, as `ray.init` takes it; None to start Ray on this machine.
        workers: runs at a time, each with its share of the cores; None for one for each core.
        retries: how often a run is gone on with after its worker process died.
        resume: whether to keep the runs in `output` that are whole and were made by the same recipe and
            the same version of ptqcore, and to go on with interrupted ones. What did not succeed is tried
            again.

    Returns:
        A row for each run. What did not succeed has a reason, and did not stop the others.

    Raises:
        PtqError: before anything runs, if a run is not possible, the folder cannot be written, or Ray
            is not there.
    """
    registry = discover()
    runs = make_runs(wanted, output, registry)
    used = versions(registry.versions())
    files.check_writable(output)
    with files.locked(output):
        rows = {run.name: Row(run, _kept(run, wanted.plugin) if resume else None) for run in runs}
        pending = [row.run for row in rows.values() if row.outcome is None]
        if len(pending) < len(runs):
            say(f"sweep: {len(runs) - len(pending)} of {len(runs)} runs are finished already")
        write_tables(list(rows.values()), wanted.plugin, output)
        if pending:
            with connected(address, workers, len(pending)) as cluster:
                tasks = _Tasks(cluster, wanted.plugin, used, retries, resume)
                for ended in track(tasks.carry_out(pending), "sweep", len(pending)):
                    rows[ended.run.name] = ended
                    write_tables(list(rows.values()), wanted.plugin, output)
    return list(rows.values())


def _kept(run: Run, plugin: str) -> Outcome | None:
    """The outcome of an earlier run that made the same, as its folder has it; None if there was none."""
    folder = run.folder
    if (folder / WORK).exists():
        return None
    try:
        if read_manifest(folder).core != __version__:
            return None
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        same = recipe == run.recipe.to_yaml() and metrics["plugin"] == plugin
        return Outcome(metrics=metrics) if same else None
    except (PtqError, OSError, ValueError, KeyError, TypeError):
        return None


class _Tasks:
    """Hands runs to a cluster, as many at a time as it has workers."""

    def __init__(
        self, cluster: Cluster, plugin: str, used: Mapping[str, str], retries: int, resume: bool
    ) -> None:
        self.cluster, self.plugin, self.used = cluster, plugin, dict(used)
        self.retries, self.resume = retries, resume
        self.deaths: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.began: dict[str, float] = {}

    def carry_out(self, runs: Sequence[Run]) -> Iterator[Row]:
        """Yield every run as soon as it has ended, however it did."""
        by_name = {run.name: run for run in runs}
        waiting = deque(runs)
        workers, threads = self.cluster.workers, self.cluster.threads
        say(f"sweep: {len(runs)} runs, {workers} at a time, OMP_NUM_THREADS={threads}")
        while waiting or self.cluster.running:
            if waiting and self.cluster.running < self.cluster.workers:
                run = waiting.popleft()
                outcome = self._start(run)
            else:
                name, outcome = self.cluster.next_ended()
                run = by_name[name]
                if outcome is None:
                    outcome = self._died(run)
                    if outcome is None:
                        waiting.appendleft(run)
            if outcome is not None:
                row = Row(run, outcome)
                self._tell(row, len(waiting))
                yield row

    def _start(self, run: Run) -> Outcome | None:
        """Hand over a run; it goes on with what its folder has of it, unless that is not wanted.

        Returns:
            Why it cannot begin.
        """
        self.began.setdefault(run.name, time.monotonic())
        try:
            files.folder(run.folder)
            if not self.resume and not self.deaths[run.name]:
                with files.locked(run.folder):
                    files.folder(run.folder / WORK, empty=True)
        except PtqError as error:
            return Outcome(reason=str(error), refused=True)
        recipe, here = run.recipe.model_dump(), str(Path.cwd())
        job = Job(self.plugin, recipe, str(run.folder), here, self.cluster.threads, self.used)
        self.cluster.start(run.name, job)
        return None

    def _died(self, run: Run) -> Outcome | None:
        """What to make of a run whose process died: None to go on with it."""
        self.deaths[run.name] += 1
        count = self.deaths[run.name]
        if count > self.retries:
            return Outcome(
                reason=f"its worker process died {count} times (out of memory?): try fewer --workers"
            )
        say(
            f"sweep: {run.name}: its worker process died, it goes on behind its last finished block (retry "
            f"{count} of {self.retries})"
        )
        return None

    def _tell(self, row: Row, waiting: int) -> None:
        self.states[row.state] += 1
        counts = [f"{count} {state}" for state, count in self.states.items()]
        counts += [f"{self.cluster.running} running", f"{waiting} waiting"]
        took = duration(time.monotonic() - self.began[row.run.name])
        why = f": {row.reason}" if row.reason else ""
        say(f"sweep: {row.run.name} {row.state} in {took} ({', '.join(counts)}){why}")
