"""Entries of a search space: a grid, a domain of Ray Tune or a constant, and the values that each can take.

Ray Tune's nested form, {"train": {"lr": tune.loguniform(...)}}, is flattened to keys with dots ("train.lr"). Values are
converted to JSON types: NumPy numbers become Python numbers, tuples become lists.
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
    """The dict that `tune.grid_search` returns."""

    grid_search: list[Json]


def entries(space: Mapping[object, object]) -> dict[str, Entry]:
    """Return the entries of a SPACE by their full keys ("train.lr"), with values of JSON types.

    Raises:
        JobError: a key is not a string, two entries set the same field, or a value has a type that a job field cannot hold.
    """
    by_key: dict[str, Entry] = {}
    for key, entry in _flat(space, ""):
        if key in by_key:
            raise JobError(f"SPACE[{key!r}] is given twice, once nested and once by its whole key")
        by_key[key] = _entry(key, entry)
    # An entry may set several fields ("method.name, method.pooling"); a whole section ("method") sets all fields below it.
    single = [(field.strip(), key) for key in by_key for field in key.split(",")]
    for name, key in single:
        for other, other_key in single:
            if name.startswith(f"{other}.") or (name == other and key != other_key):
                raise JobError(f"SPACE[{other_key!r}] and SPACE[{key!r}] both set {name}")
    return by_key


def _flat(node: Mapping[object, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, entry in node.items():
        if not isinstance(key, str) or not all(part.strip() for part in key.replace(",", ".").split(".")):
            raise JobError(
                f"SPACE[{key!r}]: a key is the path of a field, 'train.lr', or of several, 'method.name, method.pooling'"
            )
        whole = ", ".join(f"{prefix}{part.strip()}" for part in key.split(",")) if prefix else key
        # {"train": {"lr": 1e-3}} changes one field of the section only, whereas {"method.steer": {...}}
        # replaces the whole value of that field, unless a domain somewhere in it shows that it is a nested space.
        is_section = not prefix and "." not in key
        if isinstance(entry, Mapping) and not is_grid(entry) and entry and (is_section or _holds_domain(entry)):
            if "," in key:
                raise JobError(f"SPACE[{key!r}]: several fields cannot share a nested dict")
            yield from _flat(entry, f"{whole}.")
        else:
            yield whole, entry


def _holds_domain(value: object) -> bool:
    # A plain function counts as a domain, so that `_entry` is reached, whose message advises `tune.sample_from`.
    if isinstance(value, Domain) or is_grid(value) or callable(value):
        return True
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_holds_domain(item) for item in inner)


def _entry(key: str, entry: object) -> Entry:
    """Return an entry with values of JSON types."""
    if is_grid(entry):
        return {"grid_search": _values(key, entry["grid_search"])}
    if isinstance(entry, Categorical):
        changed = copy.copy(entry)  # the space's file may use the domain object elsewhere
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
    listed = list(values)
    if not listed:
        raise JobError(f"SPACE[{key!r}] has no values")
    if any(_holds_domain(value) for value in listed):
        raise JobError(
            f"SPACE[{key!r}]: one of its values is a domain itself, which is not supported: give each field its own "
            "entry, or compute one from the others with tune.sample_from"
        )
    return [plain(value, f"SPACE[{key!r}]") for value in listed]


@overload
def plain(value: dict[object, object], where: str) -> JsonObject: ...
@overload
def plain(value: object, where: str) -> Json: ...
def plain(value: object, where: str) -> Json:
    """Convert a value to JSON types. Raises JobError, with a message that begins with `where`, if that is impossible."""
    # NumPy comes first: numpy.float64 is a subclass of float, but numpy.bool_ is not a subclass of bool.
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    # bool comes before int, of which it is a subclass: True must not become 1.
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise JobError(f"{where}: {value} is not a finite number, so a setting cannot hold it")
    # An instance of a subclass (IntEnum, StrEnum, numpy.str_) becomes its plain value, which YAML can write.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple | range):
        return [plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): plain(item, where) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise JobError(f"{where}: a setting cannot hold a value of type {type(value).__name__}: {cut(repr(value))}")


def is_grid(entry: object) -> TypeGuard[Grid]:
    """Return whether an entry is a grid_search."""
    return isinstance(entry, Mapping) and set(entry) == {"grid_search"}


def finite(entry: Entry) -> list[Json] | None:
    """Return all values of a grid, a choice or a constant; None for a range or a function."""
    if is_grid(entry):
        return list(entry["grid_search"])
    if isinstance(entry, Categorical):
        return list(entry.categories)
    return None if isinstance(entry, Domain) else [entry]


def extremes(entry: Entry) -> list[Json]:
    """Return the values whose validity implies that of all others: every value of a finite entry, or the ends of a range."""
    values = finite(entry)
    if values is not None:
        return values
    if isinstance(entry, Integer):
        # Ray Tune excludes the upper end of `randint`.
        return [int(entry.lower), max(int(entry.lower), int(entry.upper) - 1)]
    if isinstance(entry, Float):
        # A normal distribution has no ends; its values are checked when they are drawn.
        return [float(end) for end in (entry.lower, entry.upper) if end is not None and math.isfinite(end)]
    return []


def describe(entry: Entry) -> JsonObject:
    """Describe an entry in JSON types: its kind, and its values or the ends and the step of its range."""
    if is_grid(entry):
        return {"kind": "grid_search", "values": list(entry["grid_search"])}
    if isinstance(entry, Categorical):
        return {"kind": "choice", "values": list(entry.categories)}
    if isinstance(entry, Float | Integer):
        sampler = entry.get_sampler()
        # `quniform` and the like wrap the sampler of the range in one that rounds to steps.
        step = sampler.q if isinstance(sampler, Quantized) else None
        inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
        # The samplers of Ray Tune are private classes with names such as _Uniform and _LogUniform (Ray 2.60).
        kind = type(inner).__name__.strip("_").lower() if not isinstance(inner, LogUniform) else "loguniform"
        number = "randint" if isinstance(entry, Integer) else "uniform"
        described: JsonObject = {"kind": {"uniform": number, "loguniform": f"log{number}"}.get(kind, kind)}
        return described | {"low": entry.lower, "high": entry.upper} | ({"step": step} if step else {})
    if isinstance(entry, Domain):
        return {"kind": "sample_from"}
    return {"kind": "constant", "values": [entry]}
