"""Hostile forms of trees, texts and files, drawn from a seed, and what becomes of each: valid, refused, or else."""

from __future__ import annotations

import copy
import json
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlab.guards.faults import is_for_people

LIMIT_S = 2.0
"""Processor time that a case may take: on a busy machine a case waits for others, which is no fault of its own."""
HANGS_S = 30.0
"""Time after which a case counts as one that waits for ever."""
LONGEST = 2_000
"""Characters of a message."""


class TooSlow(BaseException):
    """A case that took longer than its limit; no `except Exception` takes it for an answer."""


@dataclass
class Tally:
    """What became of the cases of a kind."""

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)
    """Cases that gave neither an answer nor a message, each with how it can be seen again."""
    slowest_s: float = 0.0
    slowest: str = ""

    def line(self) -> str:
        """Return a line of the table."""
        total = sum(self.counts.values())
        counts = f"{self.counts['valid']} valid, {self.counts['refused']} refused, {len(self.others)} others"
        return f"{self.kind}: {total} cases, {counts}; the slowest took {self.slowest_s:.2f} s ({self.slowest})"


_TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, LIMIT_S), (signal.SIGALRM, signal.ITIMER_REAL, HANGS_S))


def try_one(tally: Tally, name: str, call: Callable[[], Any]) -> None:
    """Run one case and count what became of it."""
    for kind, timer, limit_s in _TIMERS:
        signal.signal(kind, _too_slow)
        signal.setitimer(timer, limit_s)
    began_s = time.process_time()
    outcome = "valid"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except TooSlow as error:
        outcome = "other"
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:-1]]
        limits = f"{LIMIT_S} s of work or {HANGS_S} s of waiting"
        tally.others.append(f"{name}: longer than {limits}, in {' > '.join(where)}")
    except BaseException as error:
        outcome = _outcome(error, tally, name)
    finally:
        for _, timer, _ in _TIMERS:
            signal.setitimer(timer, 0)
    seconds = time.process_time() - began_s
    if seconds > tally.slowest_s:
        tally.slowest_s, tally.slowest = seconds, name
    tally.counts[outcome] += 1


def _outcome(error: BaseException, tally: Tally, name: str) -> str:
    message = str(error)
    own = isinstance(error, ValueError) and is_for_people(error)
    if (own or isinstance(error, OSError)) and len(message) <= LONGEST:
        return "refused"
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {message[:160]!r}"
    tally.others.append(f"{name}: {said if own is False else f'{len(message)} characters: {said}'}")
    return "other"


def _too_slow(*_: Any) -> None:
    raise TooSlow


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**12, -(10**12), 2**31, 2**32, 2**63, 2**64, 10**30, 0.0, -0.0, 1e-300, 1e300, 0.5, -3.7,
    "", " ", "a", "0", "-1", "1e400", "null", "true", "pi/2", "\x00", "\x1b[31m", "\u202e", "\ud83d\ude00" * 100,
    "x" * 5_000, "..", "../../etc/passwd", "/", "/dev/null", "~nobody/x", "~", "hf:", "hf:a/b", "wheel:", "wheel:a==1",
    "sdist:a==1@sha256:" + "0" * 64, "s3://", "gs://a/b", "file:///", "file://host/x", "job:", "job:.", "tiny:",
    "tiny:model", "tiny:nothing", "pixels:", "gym:", "gym:gsm_symbolic?seed=0&size=999999999999", "(.*)*x", "[", "*",
    "(?P<a>", "(" * 200, ".*" * 500, "{", "{}", "{a", "{a.b[0]!r:>9}", "{{ 1 }}", "{% for a in b %}", [], {}, [[]], [{}],
    [None], {"": ""}, {"a": {"b": {"c": []}}}, [1, 2, 3], ["a", "b"], {"a": 1}, [[1, 2], [3, 4]], [1e9, 2e9],
    {"task": "perplexity"}, {"source": "tiny:topics/test"}, {"min": [1], "max": 2}, list(range(300)),
)  # fmt: skip
"""Values in place of others."""


_KEYS = ("", "x", "source", "task", "steps", "\u202e", "a.b", "0", "method")


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values of a tree."""
    left = [(tree, path)]
    while left:
        node, path = left.pop()
        if path:
            yield path
        if isinstance(node, dict | list) and len(path) < 50:
            left += [(node[key], (*path, key)) for key in (node if isinstance(node, dict) else range(len(node)))]


def mutated_tree(tree: Any, draw: random.Random, others: list[Any]) -> Any:
    """Return a tree with one to three changes: values replaced, taken away, doubled, moved, or taken from another tree."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        every = list(places(tree))
        if not every:
            return tree
        *parents, last = draw.choice(every)
        node = tree
        for key in parents:
            node = node[key]
        how = draw.random()
        if how < 0.55:
            node[last] = copy.deepcopy(draw.choice(HOSTILE))
        elif how < 0.65:
            del node[last]
        elif how < 0.75:
            other = draw.choice(others)
            path = draw.choice(list(places(other)))
            for key in path:
                other = other[key]
            node[last] = copy.deepcopy(other)
        elif how < 0.85 and isinstance(node, dict):
            node[draw.choice(("", "x", "source", "task", "steps", "\u202e", "a.b", "0", "method"))] = copy.deepcopy(
                draw.choice(HOSTILE)
            )
        elif how < 0.92:
            node[last] = [node[last], node[last]]
        else:
            deep: Any = node[last]
            for _ in range(draw.choice((2, 30, 300))):
                deep = {"a": deep} if draw.random() < 0.5 else [deep]
            node[last] = deep
    return tree


_PUT_IN = (
    "", "", " ", "\n", ":", "- ", "{", "}", "[", "]", "'", '"', "#", "&a ", "*a", "!!int ''", "!!bool maybe", "!x ", "|", ">",
    "!!python/name:os.system ", "\t", "\x00", "\ud83d", "\ufeff", "%", "@", "`", "<<: *a", "? ", "---", "...", "1e999", ".nan",
    "0o9", "\u2028",
)  # fmt: skip
"""What texts are changed by."""


def mutated_text(text: str, draw: random.Random) -> str:
    """Return a text with a few characters, lines or stretches changed."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.choice((0, 1, 1, 3, 20)))
        new = draw.choice(_PUT_IN)
        text = text[:at] + new + text[end:]
    return text


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return the content of a file with bytes flipped, cut, doubled or put in."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(len(content) + 1)
        how = draw.random()
        if how < 0.4 and at < len(content):
            content[at] = draw.randrange(256)
        elif how < 0.55:
            del content[at : at + draw.choice((1, 4, 100))]
        elif how < 0.7:
            content[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 64))))
        elif how < 0.8:
            del content[at:]
        elif how < 0.9:
            content[at : at + 8] = (2 ** draw.choice((8, 31, 40, 62)) - 1).to_bytes(8, "little")
        else:
            content[at:at] = content[: draw.choice((1, 16, 256))]
    return bytes(content)


def as_json(tree: Any) -> str:
    """Write a tree as JSON, half characters and all."""
    return json.dumps(tree)
