"""What engines make of an exported file, for people."""

import math
from dataclasses import dataclass

from markupsafe import Markup

from ptqcore.report import charts
from ptqcore.report.record import EngineRecord, RunRecord

# From this share of outputs within one step on, an engine computes what the simulation computed.
PARITY = 0.999
_NOISE = 0.01


@dataclass(frozen=True)
class EngineSection:
    """One engine on the page: where it belongs, what to say, the differences drawn, its layers."""

    name: str
    sentence: str
    warning: str
    chart: str
    layers: dict[str, str | None]


def sections(record: RunRecord) -> list[EngineSection]:
    """The engines of all exports that were asked."""
    return [
        EngineSection(
            name=f"{name}: {engine.engine}",
            sentence=sentence(engine),
            warning=warning(engine),
            chart=_chart(engine),
            layers=engine.layers,
        )
        for name, export in record.exports.items()
        for engine in export.engines
    ]


def sentence(engine: EngineRecord) -> str:
    """How many layers run in integers, and how near the outputs are to the simulation."""
    if engine.problem:
        return f"{engine.engine}: not compared: {engine.problem}"
    parts = [f"{engine.engine}: {engine.in_integer} of {len(engine.layers)} layers in integers"]
    if engine.histogram:
        floor = f" ({percent(engine.control)} of the simulation's own)" if engine.control < PARITY else ""
        parts.append(f"{percent(engine.within_one_step)} of outputs within one step{floor}")
    if engine.agreement is not None:
        parts.append(f"top-1 agreement {percent(engine.agreement)}")
    return ", ".join(("; ".join(parts[:2]), *parts[2:]))


def warning(engine: EngineRecord) -> str:
    """What is wrong with an engine's outputs; empty if nothing is.

    Where the simulation does not repeat its own outputs in another order of summation, an engine is
    not asked for more than that.
    """
    expected = PARITY if engine.control >= PARITY else engine.control - _NOISE
    if engine.problem or not engine.histogram or engine.within_one_step >= expected:
        return ""
    return (
        f"{engine.engine} differs from the simulation by up to {engine.largest_steps:.3g} steps, and "
        f"{percent(engine.within_one_step)} of its outputs are within one: {percent(expected)} are expected"
    )


def percent(share: float) -> str:
    """A share with two decimals, rounded down: only all of it is 100 %."""
    return f"{math.floor(share * 1e4) / 100:g} %"


def _chart(engine: EngineRecord) -> str:
    if not engine.histogram:
        return ""
    shares = [100 * share for share in engine.histogram.values()]
    title = "share of outputs by their difference in steps"
    return Markup(charts.bars(list(engine.histogram), shares, title=title, unit="%"))
