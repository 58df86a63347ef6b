"""What the command line prints."""

from pathlib import Path

from ptqcore.plugin import BUILT_IN, KINDS, Plugin, Registry
from ptqcore.progress import duration
from ptqcore.report import engines
from ptqcore.report.record import RunRecord


def summarize(record: RunRecord, folder: Path) -> str:
    """The figures of a finished run, and where everything lies."""
    before, after = record.size_bytes["before"], record.size_bytes["after"]
    lines = [
        f"{record.plugin} / {record.recipe}: {duration(record.seconds)}, "
        f"peak memory {record.peak_memory_bytes / 1e9:.2f} GB, "
        f"{len(record.layers)} layers quantized ({record.coverage:.0%} of the weights inside the blocks), "
        f"{len(record.skipped)} left in full precision",
        *(_row(name, _metric(record, name)) for name in record.after),
        _row("size", f"{_size(before)} -> {_size(after)} ({before / after:.2f}x smaller)"),
        _row("artifact", str(folder)),
        _row("report", str(folder / "report.html")),
    ]
    for name, export in record.exports.items():
        lines.append(_row("export", f"{name} in {export.path}, read back and equal"))
        for engine in export.engines:
            lines.append(_row("", engines.sentence(engine)))
            if warning := engines.warning(engine):
                lines.append(_row("", f"warning: {warning}"))
        lines += [_row("", note) for note in export.notes]
    return "\n".join(lines)


def _metric(record: RunRecord, name: str) -> str:
    text = f"{record.before[name]:.5g} -> {record.after[name]:.5g}"
    return f"{text} (naive baseline {record.baseline[name]:.5g})" if record.baseline else text


def _row(name: str, text: str) -> str:
    return f"  {name:<15} {text}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def describe_plugins(registry: Registry) -> str:
    """Every plugin with its distribution, version and what it brings, broken ones with the reason."""
    lines = [f"core: {_brings(BUILT_IN)}"]
    for entry in registry.installed:
        place = f"{entry.name} ({entry.distribution} {entry.version})"
        if entry.plugin is None:
            lines.append(f"{place}: BROKEN: {entry.reason}")
        else:
            lines.append(f"{place}: {_brings(entry.plugin)}")
    if not registry.installed:
        lines.append("no plugin is installed; for example: pip install ptq-llm")
    return "\n".join(lines)


def _brings(plugin: Plugin) -> str:
    tables = {kind: list(getattr(plugin, kind)) for kind in KINDS}
    tables["commands"] = [] if plugin.commands is None else [f"ptq {plugin.name}"]
    tables["recipes"] = list(plugin.recipe_files)
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in tables.items() if names)
