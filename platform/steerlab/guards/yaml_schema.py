"""The core schema of YAML 1.2, with merges, for PyYAML: the types of plain scalars, and the values of tagged nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable
from typing import Any, NoReturn, TypeAlias

import yaml
from yaml.constructor import BaseConstructor

from steerlab.guards.json_values import Json
from steerlab.guards.yaml_limits import MAX_DEPTH, MAX_VALUES, YamlError, line_of

_Resolvers: TypeAlias = dict[str, list[tuple[str, re.Pattern[str]]]]
"""First character of a plain scalar -> the tags that it may have, each with the pattern of its scalars."""
_Constructors: TypeAlias = dict[str | None, Callable[[BaseConstructor, yaml.Node], object]]
"""Tag -> function that returns the value of a node; None is the key for all other tags."""
_CORE = "tag:yaml.org,2002:"
_MERGE = f"{_CORE}merge"
# YAML 1.2 has no octal numbers with a leading 0 and no base 60: 010 is ten and 12:30 is a text.
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOL = {text: text.lower() == "true" for word in ("true", "false") for text in (word, word.capitalize(), word.upper())}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NULL = re.compile(r"~|null|Null|NULL|")


def _flatten(loader: BaseConstructor, node: yaml.MappingNode) -> None:
    """Replace the merges (`<<`) in a mapping by the pairs of the merged mappings.

    The mapping's own keys win over merged ones, and of several merged mappings the first.
    """
    # This replaces PyYAML's method, which in 6.0.4 confuses a merged key of one character with one of the mapping's own.
    merged: list[tuple[yaml.Node, yaml.Node]] = []
    own: list[tuple[yaml.Node, yaml.Node]] = []
    for key_node, value_node in node.value:
        if key_node.tag != _MERGE:
            own.append((key_node, value_node))
            continue
        sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise YamlError("<< takes a mapping, or a list of mappings", line_of(source))
            _flatten(loader, source)
            merged += source.value
    node.value = [*merged, *own]  # the constructor keeps the last value of a key


class JobLoader(yaml.SafeLoader):
    """PyYAML's loader in Python with the core schema of YAML 1.2, merges, and limits."""

    yaml_implicit_resolvers: _Resolvers = {}
    yaml_constructors: _Constructors = {}
    flatten_mapping = _flatten  # type: ignore[assignment]
    depth = 0
    left = MAX_VALUES

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node. Raises YamlError beyond the limits of depth and number, while the tree is still small."""
        self.depth += 1
        self.left -= 1
        if self.left < 0:
            raise YamlError(f"there are more than {MAX_VALUES:,} values", line_of(self.peek_event()))
        if self.depth > MAX_DEPTH:
            raise YamlError(f"the values are nested more than {MAX_DEPTH} deep", line_of(self.peek_event()))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping. Raises YamlError for a duplicate key."""
        # The check is here instead of in the constructor, which also sees the keys of merged mappings, and those may be
        # repeated.
        node = super().compose_mapping_node(anchor)
        lines: dict[object, int] = {}
        for key_node, _ in node.value:
            line = line_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError("a key is a text, not a list or a mapping", line)
            key = self.construct_object(key_node)
            if key in lines:
                where = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}, twice"
                raise YamlError(f"the key {key_node.value[:60]!r} is in {where}; remove one of them", line)
            lines[key] = line
        return node


class RowLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same schema for long files, on libyaml if PyYAML has it."""

    flatten_mapping = _flatten
    yaml_implicit_resolvers: _Resolvers = JobLoader.yaml_implicit_resolvers
    yaml_constructors: _Constructors = JobLoader.yaml_constructors


def _resolver(kind: str, pattern: str, first: str) -> None:
    JobLoader.add_implicit_resolver(f"{_CORE}{kind}", re.compile(rf"^(?:{pattern})\Z"), list(first))


_resolver("bool", "|".join(_BOOL), "tTfF")
_resolver("int", _INT.pattern, "-+0123456789")
_resolver("float", _FLOAT.pattern, "-+.0123456789")
_resolver("merge", "<<", "<")
JobLoader.add_implicit_resolver(f"{_CORE}null", re.compile(r"^(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])


def _scalar(loader: BaseConstructor, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise YamlError(f"the tag {_shown(node.tag)} belongs to one value", line_of(node))
    if _SURROGATE.search(node.value):
        raise YamlError("a text holds half of a character (a lone surrogate)", line_of(node))
    return node.value


def _refused(node: yaml.Node, kind: str) -> YamlError:
    return YamlError(f"{node.value[:60]!r} is not a {kind}", line_of(node))


def _int(loader: BaseConstructor, node: yaml.Node) -> int:
    text = _scalar(loader, node)
    if not _INT.fullmatch(text):
        raise _refused(node, "whole number")
    if text[:2] in ("0o", "0x"):
        return int(text, 0)
    if len(text) > 400:  # Python 3.11 refuses more than 4300 digits, with a message of its own
        raise YamlError(f"a number of {len(text)} digits is too long", line_of(node))
    return int(text)


def _float(loader: BaseConstructor, node: yaml.Node) -> float:
    text = _scalar(loader, node)
    if not _FLOAT.fullmatch(text):
        raise _refused(node, "number")
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise YamlError(f"{text[:60]}: settings are finite numbers; null means no number", line_of(node))
    return number


def _bool(loader: BaseConstructor, node: yaml.Node) -> bool:
    if (text := _scalar(loader, node)) not in _BOOL:
        raise _refused(node, "truth value: write true or false")
    return _BOOL[text]


def _null(loader: BaseConstructor, node: yaml.Node) -> None:
    if not _NULL.fullmatch(_scalar(loader, node)):
        raise _refused(node, "null value")


def _list(loader: BaseConstructor, node: yaml.Node) -> list[Json]:
    if not isinstance(node, yaml.SequenceNode):
        raise YamlError("the tag !!seq belongs to a list", line_of(node))
    return [loader.construct_object(item, deep=True) for item in node.value]


def _mapping(loader: BaseConstructor, node: yaml.Node) -> dict[Hashable, Json]:
    if not isinstance(node, yaml.MappingNode):
        raise YamlError("the tag !!map belongs to a mapping", line_of(node))
    return loader.construct_mapping(node, deep=True)


def _unknown(loader: BaseConstructor, node: yaml.Node) -> NoReturn:
    raise YamlError(f"the tag {_shown(node.tag)} is not supported; values are texts, numbers, lists and mappings",
                    line_of(node))  # fmt: skip


def _shown(tag: str) -> str:
    return "!!" + tag.removeprefix(_CORE) if tag.startswith(_CORE) else tag


JobLoader.add_constructor(f"{_CORE}int", _int)
JobLoader.add_constructor(f"{_CORE}float", _float)
JobLoader.add_constructor(f"{_CORE}bool", _bool)
JobLoader.add_constructor(f"{_CORE}null", _null)
JobLoader.add_constructor(f"{_CORE}str", _scalar)
JobLoader.add_constructor(f"{_CORE}merge", _scalar)  # `<<` as a value, not as a key, is a text
JobLoader.add_constructor(f"{_CORE}seq", _list)
JobLoader.add_constructor(f"{_CORE}map", _mapping)
JobLoader.add_constructor(None, _unknown)  # type: ignore[arg-type]


class Dumper(yaml.SafeDumper):
    """Writes YAML in which a text that version 1.1 or 1.2 would read as another type is in quotes."""


Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *JobLoader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *JobLoader.yaml_implicit_resolvers}
}
