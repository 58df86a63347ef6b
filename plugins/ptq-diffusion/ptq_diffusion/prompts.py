"""Prompts from a text file."""

from pathlib import Path

from ptqcore import DataError


def read_prompts(path: str | None, key: str = "task.prompts") -> tuple[str, ...]:
    """The lines of a UTF-8 text file that are not blank, one prompt each; none without a file.

    Raises:
        DataError: naming the recipe key, if the file cannot be read or has no such line.
    """
    if path is None:
        return ()
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{key} {path!r} cannot be read as UTF-8 text: {reason}") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise DataError(f"{key} {path!r} holds no prompt: write one a line")
    return lines
