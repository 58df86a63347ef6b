"""Whether a distribution is made for this version of the core, by what its metadata says it requires."""

import operator
import re
from collections.abc import Callable, Iterable

_REQUIREMENT = re.compile(r"ptqcore\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*", re.IGNORECASE)
_CLAUSE = re.compile(r"(~=|==|!=|<=|>=|<|>)\s*(\d+(?:\.\d+)*)")
_COMPARE: dict[str, Callable[[list[int], list[int]], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def unmet(requirements: Iterable[str], version: str) -> str | None:
    """What a distribution requires of the core and has not got, for example `>=0.2,<0.3`; None if it has.

    Read are plain releases; what depends on the environment or an extra, and clauses of any other form, the
    installer has checked.

    Args:
        requirements: as `importlib.metadata` gives them.
        version: of the core.
    """
    found = re.match(r"\d+(\.\d+)*", version)
    for requirement in requirements if found else ():
        match = _REQUIREMENT.fullmatch(requirement)
        clauses = match[1].strip() if match else ""
        if not all(_holds(clause.strip(), found[0]) for clause in clauses.split(",")):  # type: ignore[index]
            return clauses
    return None


def _holds(clause: str, version: str) -> bool:
    match = _CLAUSE.fullmatch(clause)
    if match is None:
        return True
    sign, wanted = match[1], [int(part) for part in match[2].split(".")]
    have = [int(part) for part in version.split(".")]
    length = max(len(wanted), len(have))
    wanted, have = (numbers + [0] * (length - len(numbers)) for numbers in (wanted, have))
    if sign != "~=":
        return _COMPARE[sign](have, wanted)
    kept = match[2].count(".")
    return have >= wanted and have[:kept] == wanted[:kept]
