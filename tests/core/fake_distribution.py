"""Distributions as an installer would leave them on the path, written by hand: one module each."""

from pathlib import Path


def write_distribution(
    folder: Path,
    name: str,
    entry: str,
    code: str,
    version: str = "0.1",
    target: str | None = None,
    requires: str = "ptqcore",
) -> None:
    """Write a distribution with one module and one entry point of the group `ptqcore.plugins`.

    Args:
        folder: where it lies; put it on the path.
        name: the distribution.
        entry: the entry point.
        code: source of the module, which is named after the distribution.
        version: the distribution's.
        target: what the entry point points at; by default `plugin` in the module.
        requires: what it needs.
    """
    module = name.replace("-", "_")
    metadata = folder / f"{module}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n"
    )
    (metadata / "entry_points.txt").write_text(
        f"[ptqcore.plugins]\n{entry} = {target or f'{module}:plugin'}\n"
    )
