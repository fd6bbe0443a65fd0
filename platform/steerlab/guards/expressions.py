"""Match the regular expressions of a job within limits of time and memory; `(.*)*x` could run forever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import regex

from steerlab.guards.faults import TooLong, limited

_LIMIT_S = 1.0
_LIMIT_BYTES = 2**28
# `regex` takes memory without bounds for a left-recursive pattern such as (?R), and no module name needs recursion.
_CALLS = re.compile(r"\(\?(R|[-+]?[0-9]+|&\w+|P>\w+)\)")
_LONGEST = 10_000
"""Characters of an expression. The limit is high because an expression may list the modules of a whole model."""


def whole(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that an expression matches completely.

    Raises:
        ValueError: the expression is malformed, or takes longer than a second over all names.
    """
    return _matched(pattern, names, lambda compiled, name, left_s: compiled.fullmatch(name, timeout=left_s))


def part(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that contain a match of an expression. Raises ValueError as `whole` does."""
    return _matched(pattern, names, lambda compiled, name, left_s: compiled.search(name, timeout=left_s))


def _matched(pattern: str, names: Iterable[str], match: Callable[[regex.Pattern[str], str, float], object]) -> list[str]:
    """Return the names for which `match(compiled, name, seconds left)` is true, within one limit for all names."""
    # Compiling takes time and memory in proportion to the length, at least.
    if len(pattern) > _LONGEST:
        raise ValueError(f"module pattern {pattern[:60]!r}... has {len(pattern)} characters, more than {_LONGEST}")
    if calls := _CALLS.search(pattern):
        raise ValueError(f"module pattern {pattern[:200]!r} calls itself ({calls[0]}): write it without recursion")
    end_s = time.monotonic() + _LIMIT_S
    try:
        # The `timeout` of `regex` covers matching only; `limited` also covers compiling, and the memory of both.
        with limited(f"module pattern {pattern[:200]!r}", seconds=2 * _LIMIT_S, num_bytes=_LIMIT_BYTES):
            compiled = regex.compile(pattern)
            return [name for name in names if match(compiled, name, max(1e-3, end_s - time.monotonic()))]
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"module pattern {pattern[:200]!r} is not a regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"module pattern {pattern[:200]!r} takes longer than {_LIMIT_S:g} s on the names of modules: it has nested "
            "repetitions, such as (.*)*; write it without them"
        ) from None
    except TooLong as error:
        raise ValueError(f"{error}: it has nested repetitions; write it without them") from None
