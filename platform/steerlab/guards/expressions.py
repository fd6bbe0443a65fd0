"""Regular expressions that a job brings, matched against names within a limit of time: `(.*)*x` would take for ever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import regex

from steerlab.guards.faults import TooLong, limited

_LIMIT_S = 1.0
_LIMIT_BYTES = 2**28
_CALLS = re.compile(r"\(\?(R|[-+]?[0-9]+|&\w+|P>\w+)\)")
_LONGEST = 10_000
"""Characters of an expression; a list of modules written out may be long."""


def whole(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that an expression matches as a whole.

    Raises:
        ValueError: it is no regular expression, or takes longer than a second.
    """
    return _matched(pattern, names, lambda compiled, name, left_s: compiled.fullmatch(name, timeout=left_s))


def part(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that an expression matches somewhere. Raises ValueError as `whole` does."""
    return _matched(pattern, names, lambda compiled, name, left_s: compiled.search(name, timeout=left_s))


def _matched(pattern: str, names: Iterable[str], match: Callable[[regex.Pattern[str], str, float], object]) -> list[str]:
    if len(pattern) > _LONGEST:
        raise ValueError(f"module pattern {pattern[:60]!r}... has {len(pattern)} characters, more than {_LONGEST}")
    if calls := _CALLS.search(pattern):
        raise ValueError(f"module pattern {pattern[:200]!r} calls itself ({calls[0]}): write it without")
    end_s = time.monotonic() + _LIMIT_S
    try:
        with limited(f"module pattern {pattern[:200]!r}", seconds=2 * _LIMIT_S, num_bytes=_LIMIT_BYTES):
            compiled = regex.compile(pattern)
            return [name for name in names if match(compiled, name, max(1e-3, end_s - time.monotonic()))]
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"module pattern {pattern[:200]!r} is not a regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"module pattern {pattern[:200]!r} takes longer than {_LIMIT_S:g} s on the names of modules: it repeats what "
            "repeats itself, such as (.*)*; write it without"
        ) from None
    except TooLong as error:
        raise ValueError(f"{error}: it repeats what repeats itself; write it without") from None
