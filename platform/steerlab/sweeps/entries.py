"""What an entry of a search space is: a grid, a domain of Ray Tune or a constant, and which values it may have.

Ray Tune's own nested form, {"train": {"lr": tune.loguniform(...)}}, is written out to keys with dots. Values are those of JSON:
numbers of NumPy become Python's, tuples become lists.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypedDict, TypeGuard, overload

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized

from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import JobError, cut

Entry: TypeAlias = Domain | Json
"""A domain of Ray Tune, a grid (`Grid`, which is JSON too) or a constant."""


class Grid(TypedDict):
    """What `tune.grid_search` makes."""

    grid_search: list[Json]


def entries(space: Mapping[object, object]) -> dict[str, Entry]:
    """Return the entries of a SPACE by their whole keys, their values those of JSON.

    Raises:
        JobError: a key is no text, two entries set one field, or a value is none that a job can hold.
    """
    found: dict[str, Entry] = {}
    for key, entry in _flat(space, ""):
        if key in found:
            raise JobError(f"SPACE[{key!r}] is there twice, once nested and once by its whole key")
        found[key] = _entry(key, entry)
    single = [(one.strip(), key) for key in found for one in key.split(",")]
    for name, key in single:
        for other, other_key in single:
            if name.startswith(f"{other}.") or (name == other and key != other_key):
                raise JobError(f"SPACE[{other_key!r}] and SPACE[{key!r}] both set {name}")
    return found


def _flat(node: Mapping[object, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, entry in node.items():
        if not isinstance(key, str) or not all(part.strip() for part in key.replace(",", ".").split(".")):
            raise JobError(
                f"SPACE[{key!r}]: a key is the path of a field, 'train.lr', or of several, 'method.name, method.pooling'"
            )
        whole = ", ".join(f"{prefix}{part.strip()}" for part in key.split(",")) if prefix else key
        # A section of the job is merged; a constant at the path of a field takes the place of what was there.
        is_section = not prefix and "." not in key
        if isinstance(entry, Mapping) and not is_grid(entry) and entry and (is_section or _holds_domain(entry)):
            if "," in key:
                raise JobError(f"SPACE[{key!r}]: several fields cannot share a nested dict")
            yield from _flat(entry, f"{whole}.")
        else:
            yield whole, entry


def _holds_domain(value: object) -> bool:
    if isinstance(value, Domain) or is_grid(value) or callable(value):
        return True
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_holds_domain(one) for one in inner)


def _entry(key: str, entry: object) -> Entry:
    """Return an entry whose values are those of JSON."""
    if is_grid(entry):
        return {"grid_search": _values(key, entry["grid_search"])}
    if isinstance(entry, Categorical):
        changed = copy.copy(entry)
        changed.categories = _values(key, entry.categories)
        return changed
    if isinstance(entry, Domain):
        return entry
    if callable(entry):
        raise JobError(f"SPACE[{key!r}] is a function; write tune.sample_from(...)")
    return plain(entry, f"SPACE[{key!r}]")


def _values(key: str, values: object) -> list[Json]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise JobError(f"SPACE[{key!r}]: tune.grid_search and tune.choice take a list of values, not {cut(repr(values))}")
    found = list(values)
    if not found:
        raise JobError(f"SPACE[{key!r}] has no values")
    if any(_holds_domain(one) for one in found):
        raise JobError(
            f"SPACE[{key!r}]: one of its values is a domain itself, which is not searched here: give each field an entry of "
            "its own, or compute one from the others with tune.sample_from"
        )
    return [plain(one, f"SPACE[{key!r}]") for one in found]


@overload
def plain(value: dict[object, object], where: str) -> JsonObject: ...
@overload
def plain(value: object, where: str) -> Json: ...
def plain(value: object, where: str) -> Json:
    """Return a value in JSON's types. Raises JobError, which begins with `where`, if it has none."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise JobError(f"{where}: {value} is no value of a setting")
    # Of a subclass, such as an enumeration of numbers, the plain value.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple | range):
        return [plain(one, where) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): plain(one, where) for key, one in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise JobError(f"{where}: a value of type {type(value).__name__} is none of a setting: {cut(repr(value))}")


def is_grid(entry: object) -> TypeGuard[Grid]:
    """Say whether an entry is a grid_search."""
    return isinstance(entry, Mapping) and set(entry) == {"grid_search"}


def finite(entry: Entry) -> list[Json] | None:
    """Return the values of an entry that can only have these; None where there is no such list."""
    if is_grid(entry):
        return list(entry["grid_search"])
    if isinstance(entry, Categorical):
        return list(entry.categories)
    return None if isinstance(entry, Domain) else [entry]


def extremes(entry: Entry) -> list[Json]:
    """Return the values of an entry that have to be valid for all of them to be: every one, or the ends of a range."""
    values = finite(entry)
    if values is not None:
        return values
    if isinstance(entry, Integer):
        return [int(entry.lower), max(int(entry.lower), int(entry.upper) - 1)]
    if isinstance(entry, Float):
        # Ranges without ends (a normal distribution) are checked as they are drawn.
        return [float(end) for end in (entry.lower, entry.upper) if end is not None and math.isfinite(end)]
    return []


def describe(entry: Entry) -> JsonObject:
    """Write an entry as JSON values: its kind, and its values or the ends of its range."""
    if is_grid(entry):
        return {"kind": "grid_search", "values": list(entry["grid_search"])}
    if isinstance(entry, Categorical):
        return {"kind": "choice", "values": list(entry.categories)}
    if isinstance(entry, Float | Integer):
        sampler = entry.get_sampler()
        step = sampler.q if isinstance(sampler, Quantized) else None
        inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
        kind = type(inner).__name__.strip("_").lower() if not isinstance(inner, LogUniform) else "loguniform"
        number = "randint" if isinstance(entry, Integer) else "uniform"
        described: JsonObject = {"kind": {"uniform": number, "loguniform": f"log{number}"}.get(kind, kind)}
        return described | {"low": entry.lower, "high": entry.upper} | ({"step": step} if step else {})
    if isinstance(entry, Domain):
        return {"kind": "sample_from"}
    return {"kind": "constant", "values": [entry]}
