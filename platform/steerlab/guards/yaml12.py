"""Read YAML by the core schema of version 1.2: `no` is a text, `2e-2` a number, `010` is ten, a date is a text.

PyYAML alone reads YAML 1.1. In addition, duplicate keys of a mapping are refused here, as are tags other than those of JSON's
types, infinite numbers, and documents that expand to too many values. Of YAML 1.1, merges (`<<`) and underscores in numbers
(`1_000`) are accepted.
"""

from __future__ import annotations

import yaml

from steerlab.guards.json_values import Json
from steerlab.guards.yaml_limits import MAX_DEPTH, MAX_ROW_VALUES, MAX_VALUES, YamlError, check_events, check_size
from steerlab.guards.yaml_schema import Dumper, JobLoader, RowLoader

__all__ = ["YamlError", "dump", "load", "load_rows", "load_value"]


def load(text: str) -> Json:
    """Read one YAML document as JSON values, except that keys may also be numbers, booleans or null.

    Raises:
        YamlError: the text is not YAML, or uses something that is refused here; the error has the line.
    """
    return _load(text)[0]


def load_rows(text: str) -> Json:
    """Read a long YAML document, such as rows of data, with libyaml if PyYAML was built with it, which is ten times as fast.

    Unlike `load`, it does not refuse duplicate keys.

    Raises:
        YamlError: the text is not YAML, has more than a million values, or is nested too deeply.
    """
    try:
        # The first pass is over events only, because libyaml builds the tree recursively in C, where deep nesting overflows the
        # stack.
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
        raise YamlError(_in_words(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise YamlError(f"a control character or half of one, {_character(error)}, is not allowed in a text") from None


def load_value(text: str) -> Json:
    """Read a value of the command line. Raises YamlError, also for a comment, which can only be a mistake there."""
    value, end = _load(text)
    if text[end:].strip():
        raise YamlError("the text after ' #' would be a comment")
    return value


def _load(text: str) -> tuple[Json, int]:
    """Return the value and the index in the text at which it ends."""
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
        raise YamlError(_in_words(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        # PyYAML's ReaderError, for characters that YAML forbids, has a position instead of a mark.
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else None
        raise YamlError(f"a control character or half of one, {_character(error)}, is not allowed in a text", line) from None
    finally:
        if loader is not None:
            loader.dispose()


def _character(error: yaml.YAMLError) -> str:
    character = getattr(error, "character", "?")
    return repr(chr(character) if isinstance(character, int) else character)


def _in_words(error: yaml.MarkedYAMLError) -> str:
    """Return an error of PyYAML in words for the author of the file; its own are those of a parser."""
    context, problem = (" ".join(str(part or "").split()) for part in (error.context, error.problem))
    # The keys are words of PyYAML's message; the first entry that occurs in it is taken.
    messages = {
        "exceeded maximum nesting depth": f"the values are nested more than {MAX_DEPTH} deep",
        "'\\t' that cannot start": "a tab is at a place where YAML needs spaces",
        "expected a single document": "a second document begins (---); a file holds one",
        "scanning an alias": "a text that begins with * is an alias in YAML",
        "undefined alias": f"{problem}; a text that begins with * is an alias in YAML",
        "scanning an anchor": "a text that begins with & is an anchor in YAML",
        "a quoted scalar": "a quote is not closed",
        "flow": "a [ or { is not closed" if "<stream end>" in problem else problem,
    }
    return next((words for part, words in messages.items() if part in f"{context} {problem}"), problem)[:200]


def dump(tree: object) -> str:
    """Return JSON values as YAML that `load`, and readers of YAML 1.1, read back unchanged."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
