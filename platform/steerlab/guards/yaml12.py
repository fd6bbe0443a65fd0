"""Read YAML as version 1.2's core schema means it: `no` is a text, `2e-2` a number, `010` ten, a date a text.

PyYAML reads YAML 1.1. Beyond the other rules for plain scalars, a key that stands twice in a mapping is refused, as are tags
other than those of JSON's types, infinite numbers, and texts that would expand to more than a job can be. Merges (`<<`) and
digits in groups (`1_000`) are read as before.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_CORE = "tag:yaml.org,2002:"
_MERGE = f"{_CORE}merge"
_MAX_DEPTH = 64
_MAX_VALUES = 100_000
_MAX_ROW_VALUES = 1_000_000
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOL = {text: text.lower() == "true" for word in ("true", "false") for text in (word, word.capitalize(), word.upper())}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NULL = re.compile(r"~|null|Null|NULL|")


class YamlError(ValueError):
    """A text that is no YAML of the kind that is read here; the message is one line, `line` counts from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def _flatten(loader: Any, node: Any) -> None:
    """Put the pairs of merged mappings (`<<`) before a mapping's own, which win; of several the first named wins.

    Not PyYAML's way: its 6.0.4 takes an inherited key of one letter for an own one.
    """
    merged: list[Any] = []
    own: list[Any] = []
    for key_node, value_node in node.value:
        if key_node.tag != _MERGE:
            own.append((key_node, value_node))
            continue
        sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise YamlError("<< takes a mapping, or a list of mappings", source.start_mark.line + 1)
            _flatten(loader, source)
            merged += source.value
    node.value = [*merged, *own]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema with merges."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    yaml_constructors: dict[Any, Any] = {}
    flatten_mapping = _flatten  # type: ignore[assignment]
    depth = 0
    left = _MAX_VALUES

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node no deeper than the limit, and no more of them than a job has."""
        self.depth += 1
        self.left -= 1
        if self.left < 0:
            raise YamlError(f"there are more than {_MAX_VALUES:,} values", self.peek_event().start_mark.line + 1)
        if self.depth > _MAX_DEPTH:
            raise YamlError(f"the values are nested more than {_MAX_DEPTH} deep", self.peek_event().start_mark.line + 1)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping whose keys are all different; later, merges will have put other mappings' keys among them."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError("a key is a text, not a list or a mapping", line)
            key = self.construct_object(key_node)
            if key in lines:
                where = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}, twice"
                raise YamlError(f"the key {key_node.value[:60]!r} stands in {where}; keep one of them", line)
            lines[key] = line
        return node


class _Rows(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same schema, for long files."""

    flatten_mapping = _flatten
    yaml_implicit_resolvers: dict[Any, Any] = _Loader.yaml_implicit_resolvers
    yaml_constructors: dict[Any, Any] = _Loader.yaml_constructors


def _resolver(kind: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"{_CORE}{kind}", re.compile(rf"^(?:{pattern})\Z"), list(first))


_resolver("bool", "|".join(_BOOL), "tTfF")
_resolver("int", _INT.pattern, "-+0123456789")
_resolver("float", _FLOAT.pattern, "-+.0123456789")
_resolver("merge", "<<", "<")
_Loader.add_implicit_resolver(f"{_CORE}null", re.compile(r"^(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])


def _scalar(loader: Any, node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise YamlError(f"the tag {_shown(node.tag)} belongs to one value", node.start_mark.line + 1)
    if _SURROGATE.search(node.value):
        raise YamlError("a text holds half of a character (a lone surrogate)", node.start_mark.line + 1)
    return node.value


def _refused(node: Any, kind: str) -> YamlError:
    return YamlError(f"{node.value[:60]!r} is no {kind}", node.start_mark.line + 1)


def _int(loader: Any, node: Any) -> int:
    text = _scalar(loader, node)
    if not _INT.fullmatch(text):
        raise _refused(node, "whole number")
    if text[:2] in ("0o", "0x"):
        return int(text, 0)
    if len(text) > 400:
        raise YamlError(f"a number of {len(text)} digits is too long", node.start_mark.line + 1)
    return int(text)


def _float(loader: Any, node: Any) -> float:
    text = _scalar(loader, node)
    if not _FLOAT.fullmatch(text):
        raise _refused(node, "number")
    found = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(found):
        raise YamlError(f"{text[:60]}: settings are finite numbers; null stands for none", node.start_mark.line + 1)
    return found


def _bool(loader: Any, node: Any) -> bool:
    if (text := _scalar(loader, node)) not in _BOOL:
        raise _refused(node, "truth value: write true or false")
    return _BOOL[text]


def _null(loader: Any, node: Any) -> None:
    if not _NULL.fullmatch(_scalar(loader, node)):
        raise _refused(node, "null")


def _list(loader: Any, node: Any) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise YamlError("the tag !!seq belongs to a list", node.start_mark.line + 1)
    return [loader.construct_object(one, deep=True) for one in node.value]


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise YamlError("the tag !!map belongs to a mapping", node.start_mark.line + 1)
    return loader.construct_mapping(node, deep=True)


def _unknown(loader: Any, node: Any) -> Any:
    raise YamlError(f"the tag {_shown(node.tag)} is not known here; values are texts, numbers, lists and mappings",
                    node.start_mark.line + 1)  # fmt: skip


def _shown(tag: str) -> str:
    return "!!" + tag.removeprefix(_CORE) if tag.startswith(_CORE) else tag


_Loader.add_constructor(f"{_CORE}int", _int)
_Loader.add_constructor(f"{_CORE}float", _float)
_Loader.add_constructor(f"{_CORE}bool", _bool)
_Loader.add_constructor(f"{_CORE}null", _null)
_Loader.add_constructor(f"{_CORE}str", _scalar)
_Loader.add_constructor(f"{_CORE}merge", _scalar)  # as a value it is a text
_Loader.add_constructor(f"{_CORE}seq", _list)
_Loader.add_constructor(f"{_CORE}map", _mapping)
_Loader.add_constructor(None, _unknown)  # type: ignore[arg-type]


def load(text: str) -> Any:
    """Read one YAML document as JSON values (keys may be numbers, truth values or null).

    Raises:
        YamlError: it is none, or none that is read here, with the line.
    """
    return _load(text)[0]


def load_rows(text: str) -> Any:
    """Read a YAML document that may be long, such as rows of data, by libyaml where it is built in: ten times as fast.

    A key that stands twice is not noticed.

    Raises:
        YamlError: it is none, has more than a million values, or is nested too deeply.
    """
    try:
        _check_events(text)
        loader = _Rows(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, _MAX_ROW_VALUES)
        return loader.construct_document(node)
    except RecursionError:
        raise YamlError("the values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_said(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise YamlError(f"a control character or a half of one, {_character(error)}, is no text") from None


def _check_events(text: str) -> None:
    """Refuse what is nested too deeply, or has too many values, before libyaml makes a tree: it would end the process."""
    loader, depth, count = _Rows(text), 0, 0
    while (event := loader.get_event()) is not None:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > _MAX_DEPTH:
            raise YamlError(f"the values are nested more than {_MAX_DEPTH} deep", event.start_mark.line + 1)
        if count > _MAX_ROW_VALUES:
            raise YamlError(f"there are more than {_MAX_ROW_VALUES:,} values", event.start_mark.line + 1)


def load_value(text: str) -> Any:
    """Read a value of the command line, where a comment can only be a mistake. Raises YamlError."""
    value, end = _load(text)
    if text[end:].strip():
        raise YamlError("what follows ' #' would be a comment")
    return value


def _load(text: str) -> tuple[Any, int]:
    """Return the value and where in the text it ends."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, 0
        _check_size(node, _MAX_VALUES)
        return loader.construct_document(node), node.end_mark.index
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_said(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else None
        raise YamlError(f"a control character or a half of one, {_character(error)}, is no text", line) from None
    finally:
        if loader is not None:
            loader.dispose()


def _character(error: Any) -> str:
    found = getattr(error, "character", "?")
    return repr(chr(found) if isinstance(found, int) else found)


def _said(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong in the words of who writes the file, where PyYAML's are those of a parser."""
    context, problem = (" ".join(str(part or "").split()) for part in (error.context, error.problem))
    told = {
        "exceeded maximum nesting depth": f"the values are nested more than {_MAX_DEPTH} deep",
        "'\\t' that cannot start": "a tab stands where YAML wants spaces",
        "expected a single document": "a second document begins (---); a file holds one",
        "scanning an alias": "what begins with * is an alias in YAML",
        "undefined alias": f"{problem}; what begins with * is an alias in YAML",
        "scanning an anchor": "what begins with & is an anchor in YAML",
        "a quoted scalar": "a quote is not closed",
        "flow": "a [ or { is not closed" if "<stream end>" in problem else problem,
    }
    return next((words for part, words in told.items() if part in f"{context} {problem}"), problem)[:200]


def _check_size(root: Any, most: int) -> None:
    """Refuse aliases that go in a circle or expand to more values, or deeper ones, than a file may have."""
    sizes: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()

    def size(node: Any) -> tuple[int, int]:
        """Return how many values a node has, and how deep they are nested."""
        if id(node) in sizes:
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        if id(node) in open_:
            raise YamlError("an alias (*) stands inside of what it names", node.start_mark.line + 1)
        open_.add(id(node))
        below = [size(one) for item in node.value for one in (item if isinstance(item, tuple) else (item,))]
        open_.discard(id(node))
        total, depth = 1 + sum(count for count, _ in below), 1 + max((deep for _, deep in below), default=0)
        sizes[id(node)] = total, depth
        if total > most:
            raise YamlError(f"the values, aliases (*) written out, are more than {most}", node.start_mark.line + 1)
        if depth > _MAX_DEPTH:
            raise YamlError(
                f"the values, aliases (*) written out, are nested more than {_MAX_DEPTH} deep", node.start_mark.line + 1
            )
        return total, depth

    size(root)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that YAML of either version would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def dump(tree: Any) -> str:
    """Write JSON values as YAML that `load`, and any other reader, reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
