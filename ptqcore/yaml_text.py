"""YAML of recipes: plain data, without the tags, anchors and aliases of the language."""

from typing import Any

import yaml

from ptqcore.reading import MOST_DEEP


class _Loader(yaml.SafeLoader):
    """Plain data alone: an alias lets a few lines stand for gigabytes, or for what contains itself."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            _refuse(f"the alias *{event.anchor} is not read here: write out what it stands for", event)
        if self._depth == MOST_DEEP:
            _refuse(f"it is nested more than {MOST_DEEP} deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _refuse(what: str, event: Any) -> None:
    raise yaml.composer.ComposerError(None, None, what, event.start_mark)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: on one line, if it is no YAML of plain data.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error
