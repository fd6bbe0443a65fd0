"""Collect the faults that occur while the rows of a data set are read, and report them: bad rows, absent fields, no rows
left."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field

from steerlab.data import values
from steerlab.data.sources import SourceError
from steerlab.data.values import Row
from steerlab.job import DataSet


@dataclass
class Seen:
    """Faults and facts of the rows of one data set so far; `data/rows.py` fills it row by row, then calls its checks."""

    name: str
    """Short name of the data set, for messages."""
    read: int = 0
    """Number of rows read, including skipped ones."""
    bad: list[str] = field(default_factory=list)
    """For each row that `skip_bad` skipped, the reason."""
    names: str = ""
    """Fields of the first row by their names in the file, written out for messages."""
    new_names: str = ""
    """Fields of the first row after `rename`."""
    absent: list[str] = field(default_factory=list)
    """Keys of the job that name a field which no row has had so far."""
    subsets: dict[object, None] = field(default_factory=dict)
    """Subsets seen besides those that the job names, in the order of the file; None means rows without a subset."""
    taken: dict[object, None] = field(default_factory=dict)
    """Subsets seen that the job names."""
    unused: Counter[str] = field(default_factory=Counter)
    """Non-empty fields that the format does not read, each with the number of its rows."""

    @classmethod
    def before(cls, data: DataSet, name: str) -> Seen:
        """Return the state before the first row, when every field that the job names is still absent."""
        settings = {"rename": data.rename, "where": data.where, "equals": data.equals, "map": data.map}
        return cls(name, absent=[f"{key}.{field}" for key, fields in settings.items() for field in fields])

    def leave_out(self, reason: str, data: DataSet) -> None:
        """Record the reason why a bad row is skipped. Raises SourceError if the data set has no `skip_bad`."""
        if not data.skip_bad:
            raise SourceError(f"{reason} (skip_bad: true skips such rows)")
        self.bad.append(reason)

    def check_names(self, data: DataSet) -> None:
        """Raise ValueError if the job names a field that no row has, or one of several subsets that the file lacks."""
        # With a limit the rows of a later subset may not have been reached; without any row `nothing_left` gives a better
        # message.
        if self.taken and data.limit is None and (lacking := [name for name in data.subsets if name not in self.taken]):
            present = ", ".join(map(str, {**self.taken, **self.subsets}))
            raise ValueError(f"subset {lacking[0]!r}: {self.name} has no such subset; it has {present}")
        # A field that no row has is a misspelt name; one that some rows lack is normal.
        if self.read and self.absent:
            key = self.absent[0]
            is_renamed = bool(data.rename) and not key.startswith("rename.")
            names, when = (self.new_names, " after rename") if is_renamed else (self.names, "")
            raise ValueError(f"{key}: a row of {self.name} has no such field{when} (it has: {names})")

    def nothing_left(self, data: DataSet, passed: int) -> ValueError:
        """Return the error for a data set that gives no rows; `passed` rows went through its filters."""
        if data.subsets and not self.taken and not passed and not self.bad:
            if list(self.subsets) == [None]:
                return ValueError(f"subset {data.subsets[0]!r}: {self.name} is not a JSON object of lists of texts")
            present = ", ".join(map(str, self.subsets))
            return ValueError(f"subset {data.subsets[0]!r}: {self.name} has no such subset; it has {present}")
        bad = f"; {len(self.bad)} are bad, the first: {self.bad[0]}" if self.bad else ""
        return ValueError(
            f"{', '.join(data.sources)}: no rows remain; {self.read} were read, {passed} pass the filters, "
            f"offset is {data.offset}{bad}"
        )

    def warn(self, data: DataSet) -> None:
        """Warn about rows that were skipped and fields that are not used, one warning each."""
        if self.bad:
            kind = "no pairs" if data.format == "preference" else "bad"
            warnings.warn(
                f"{self.name}: {len(self.bad)} of {self.read} rows are {kind} and were skipped; the first: {self.bad[0]}",
                stacklevel=3,
            )
        if self.unused:
            # One warning covers all rows, because a data set may have millions of them.
            shown = ", ".join(f"{name} (in {number} rows)" for name, number in self.unused.items())
            warnings.warn(f"{self.name}: format {data.format} does not use {shown}", stacklevel=3)


def is_absent(key: str, own: Row, row: Row) -> bool:
    """Return whether a row lacks the field that a key of the job names, such as `where.score`.

    `own` is the row as it is in the file, to whose names `rename` refers; `row` is the same row after `rename`.
    """
    setting, _, name = key.partition(".")
    return values.look_up(own if setting == "rename" else row, name) is values.MISSING
