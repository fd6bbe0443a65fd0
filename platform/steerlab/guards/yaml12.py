"""Read YAML as version 1.2's core schema means it: `no` is a text, `2e-2` a number, `010` ten, a date a text.

PyYAML reads YAML 1.1. Beyond the other rules for plain scalars, a key that stands twice in a mapping is refused, as are tags
other than those of JSON's types, infinite numbers, and texts that would expand to more than a job can be. Merges (`<<`) and
digits in groups (`1_000`) are read as before.
"""

from __future__ import annotations

import yaml

from steerlab.guards.json_values import Json
from steerlab.guards.yaml_limits import MAX_DEPTH, MAX_ROW_VALUES, MAX_VALUES, YamlError, check_events, check_size
from steerlab.guards.yaml_schema import Dumper, JobLoader, RowLoader

__all__ = ["YamlError", "dump", "load", "load_rows", "load_value"]


def load(text: str) -> Json:
    """Read one YAML document as JSON values (keys may be numbers, truth values or null).

    Raises:
        YamlError: it is none, or none that is read here, with the line.
    """
    return _load(text)[0]


def load_rows(text: str) -> Json:
    """Read a YAML document that may be long, such as rows of data, by libyaml where it is built in: ten times as fast.

    A key that stands twice is not noticed.

    Raises:
        YamlError: it is none, has more than a million values, or is nested too deeply.
    """
    try:
        check_events(RowLoader(text))
        loader = RowLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        check_size(node, MAX_ROW_VALUES)
        return loader.construct_document(node)
    except RecursionError:
        raise YamlError("the values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_said(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise YamlError(f"a control character or a half of one, {_character(error)}, is no text") from None


def load_value(text: str) -> Json:
    """Read a value of the command line, where a comment can only be a mistake. Raises YamlError."""
    value, end = _load(text)
    if text[end:].strip():
        raise YamlError("what follows ' #' would be a comment")
    return value


def _load(text: str) -> tuple[Json, int]:
    """Return the value and where in the text it ends."""
    loader = None
    try:
        loader = JobLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, 0
        check_size(node, MAX_VALUES)
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


def _character(error: yaml.YAMLError) -> str:
    found = getattr(error, "character", "?")
    return repr(chr(found) if isinstance(found, int) else found)


def _said(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong in the words of who writes the file, where PyYAML's are those of a parser."""
    context, problem = (" ".join(str(part or "").split()) for part in (error.context, error.problem))
    told = {
        "exceeded maximum nesting depth": f"the values are nested more than {MAX_DEPTH} deep",
        "'\\t' that cannot start": "a tab stands where YAML wants spaces",
        "expected a single document": "a second document begins (---); a file holds one",
        "scanning an alias": "what begins with * is an alias in YAML",
        "undefined alias": f"{problem}; what begins with * is an alias in YAML",
        "scanning an anchor": "what begins with & is an anchor in YAML",
        "a quoted scalar": "a quote is not closed",
        "flow": "a [ or { is not closed" if "<stream end>" in problem else problem,
    }
    return next((words for part, words in told.items() if part in f"{context} {problem}"), problem)[:200]


def dump(tree: object) -> str:
    """Write JSON values as YAML that `load`, and any other reader, reads back."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
