"""Limit the number and the nesting of values in a YAML document, with aliases expanded."""

from __future__ import annotations

from typing import Protocol

import yaml

MAX_DEPTH = 64
"""Maximum number of levels of nesting; Python's recursion limit allows a few hundred."""
MAX_VALUES = 100_000
"""Maximum number of values of a job file."""
MAX_ROW_VALUES = 1_000_000
"""Maximum number of values of a file of rows."""


class YamlError(ValueError):
    """A text is not YAML, or uses something that is refused here. The message is one line; `line` counts from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Parser(Protocol):
    def get_event(self) -> yaml.Event | None: ...


def check_events(parser: _Parser) -> None:
    """Raise YamlError if a document is nested too deeply or has too many values, before libyaml builds its tree."""
    depth, count = 0, 0
    while (event := parser.get_event()) is not None:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"the values are nested more than {MAX_DEPTH} deep", line_of(event))
        if count > MAX_ROW_VALUES:
            raise YamlError(f"there are more than {MAX_ROW_VALUES:,} values", line_of(event))


def line_of(place: yaml.Node | yaml.Event) -> int:
    """Return the line in which a node or an event begins, counted from 1."""
    return place.start_mark.line + 1


def check_size(root: yaml.Node, most: int) -> None:
    """Raise YamlError if aliases form a cycle, or expand to more than `most` values or too many levels."""
    # Sizes are computed once per node and never expanded; nine levels of nine aliases each would be a billion values.
    sizes: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> tuple[int, int]:
        """Return the number of values of a node, and their levels of nesting."""
        if id(node) in sizes:
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        if id(node) in open_:
            raise YamlError("an alias (*) is inside the value that it names", line_of(node))
        open_.add(id(node))
        # Items are nodes in a sequence, and (key, value) pairs of nodes in a mapping.
        below = [size(child) for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        open_.discard(id(node))
        total, depth = 1 + sum(count for count, _ in below), 1 + max((deep for _, deep in below), default=0)
        # The key is the identity, because an alias is the same node object in PyYAML's tree.
        sizes[id(node)] = total, depth
        if total > most:
            raise YamlError(f"with aliases (*) expanded, there are more than {most} values", line_of(node))
        if depth > MAX_DEPTH:
            raise YamlError(f"with aliases (*) expanded, the values are nested more than {MAX_DEPTH} deep", line_of(node))
        return total, depth

    size(root)
