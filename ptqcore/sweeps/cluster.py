"""Worker processes: Ray on this machine or on a cluster. The only file that imports Ray."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ptqcore.errors import SweepError
from ptqcore.sweeps.job import Job, Outcome, carry_out

_STORE_BYTES = 100 * 2**20  # what goes through Ray's store are a few lines a run
_SECONDS_TO_CONNECT = 5


@contextmanager
def connected(address: str | None, workers: int | None, runs: int) -> Iterator["Cluster"]:
    """Start Ray on this machine, or connect to a cluster; afterwards it is stopped, or left.

    Args:
        address: of the cluster, as `ray.init` takes it; None for this machine.
        workers: runs at a time; None for one for each core.
        runs: how many there are.

    Raises:
        SweepError: if Ray is not installed, cannot be started, or is not there.
    """
    if address is not None:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # by default Ray tries for many minutes
        _check_port(address)
    ray = _import_ray()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(workers or cores, runs)
    threads = _threads(cores, wanted)
    settings: dict[str, Any] = {"address": address}
    if address is None:
        settings = {"address": "local", "num_cpus": wanted * threads, "include_dashboard": False}
        settings["object_store_memory"] = _STORE_BYTES
    try:
        ray.init(**settings, log_to_driver=False, logging_level=logging.CRITICAL)
        if address is not None:
            sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            sizes = [size for size in sizes if size] or [1]
            wanted = min(workers or sum(sizes), runs)
            threads = min(_threads(sum(sizes), wanted), *sizes)
    except Exception as error:  # Ray raises whatever its parts do
        ray.shutdown()
        raise SweepError(_no_ray(address, error)) from error
    try:
        yield Cluster(ray, wanted, threads)
    finally:
        ray.shutdown()


class Cluster:
    """Runs jobs, each in a process of its own. workers: how many at a time. threads: of each."""

    def __init__(self, ray: Any, workers: int, threads: int) -> None:
        self._ray, self.workers, self.threads = ray, workers, threads
        # A process of its own for each run: memory is what the run took, and nothing is left over from
        # another. Ray itself retries nothing, as the sweep counts and says it.
        options = {"num_cpus": threads, "max_calls": 1, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._carry_out = ray.remote(**options)(carry_out)
        self._names: dict[Any, str] = {}

    @property
    def running(self) -> int:
        """How many jobs have been started and not ended."""
        return len(self._names)

    def start(self, name: str, job: Job) -> None:
        """Start a job."""
        self._names[self._carry_out.remote(job)] = name

    def next_ended(self) -> tuple[str, Outcome | None]:
        """Wait until one of the jobs has ended.

        Returns:
            Its name, and how it ended; None if its process died.
        """
        (ended,), _ = self._ray.wait(list(self._names), num_returns=1)
        name = self._names.pop(ended)
        try:
            return name, self._ray.get(ended)
        except self._ray.exceptions.RayTaskError as error:  # it cannot even be begun there
            return name, Outcome(reason=f"its worker cannot run it: {_last_line(error)}")
        except self._ray.exceptions.RayError:
            return name, None


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise SweepError(
            "ptq sweep needs Ray, which is not installed: pip install 'ptqcore[sweep]'"
        ) from error
    return ray


def _threads(cores: int, workers: int) -> int:
    """OMP_NUM_THREADS where it is set, as in any other run; else so many that no core has two."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdecimal() and int(chosen) else max(1, cores // workers)


def _check_port(address: str) -> None:
    """Make sure, at once, that something listens at an address.

    Raises:
        SweepError: if nothing listens there.
    """
    parts = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if parts is None:
        return
    try:
        socket.create_connection((parts[1], int(parts[2])), _SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise SweepError(_no_ray(address, error)) from error


def _no_ray(address: str | None, error: Exception) -> str:
    if address is None:
        return f"Ray cannot be started on this machine: {_last_line(error)}"
    return (
        f"--address {address!r}: no Ray cluster can be reached there ({_last_line(error)}); start one with "
        "ray start --head, or go without --address to run on this machine"
    )


def _last_line(error: Exception) -> str:
    """Ray puts whole tracebacks into messages; what happened comes last."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
