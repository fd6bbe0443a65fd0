"""How large a YAML document may be: how many values it has, and how deeply they are nested, aliases written out."""

from __future__ import annotations

from typing import Protocol

import yaml

MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Values of a job file."""
MAX_ROW_VALUES = 1_000_000
"""Values of a file of rows."""


class YamlError(ValueError):
    """A text that is no YAML of the kind that is read here; the message is one line, `line` counts from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Parser(Protocol):
    def get_event(self) -> yaml.Event | None: ...


def check_events(parser: _Parser) -> None:
    """Refuse rows that are nested too deeply, or are too many, before libyaml makes a tree: it would end the process."""
    depth, count = 0, 0
    while (event := parser.get_event()) is not None:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"the values are nested more than {MAX_DEPTH} deep", line_of(event))
        if count > MAX_ROW_VALUES:
            raise YamlError(f"there are more than {MAX_ROW_VALUES:,} values", line_of(event))


def line_of(place: yaml.Node | yaml.Event) -> int:
    """Return the line in which a node or an event begins, from 1."""
    return place.start_mark.line + 1


def check_size(root: yaml.Node, most: int) -> None:
    """Refuse aliases that go in a circle or expand to more values, or deeper ones, than a file may have."""
    sizes: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> tuple[int, int]:
        """Return how many values a node has, and how deep they are nested."""
        if id(node) in sizes:
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        if id(node) in open_:
            raise YamlError("an alias (*) stands inside of what it names", line_of(node))
        open_.add(id(node))
        below = [size(one) for item in node.value for one in (item if isinstance(item, tuple) else (item,))]
        open_.discard(id(node))
        total, depth = 1 + sum(count for count, _ in below), 1 + max((deep for _, deep in below), default=0)
        sizes[id(node)] = total, depth
        if total > most:
            raise YamlError(f"the values, aliases (*) written out, are more than {most}", line_of(node))
        if depth > MAX_DEPTH:
            raise YamlError(f"the values, aliases (*) written out, are nested more than {MAX_DEPTH} deep", line_of(node))
        return total, depth

    size(root)
