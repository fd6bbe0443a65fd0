"""What was met while the rows of a data set were read, and what is said of it: bad rows, fields that no row has, no rows."""

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
    """What was met while rows were read."""

    name: str
    """The data set in a few words."""
    read: int = 0
    bad: list[str] = field(default_factory=list)
    """Why rows were left out."""
    names: str = ""
    """Fields of the first row, by their names in the file."""
    new_names: str = ""
    """Fields of the first row after `rename`."""
    absent: list[str] = field(default_factory=list)
    """Keys of the job that name a field which no row had so far."""
    subsets: dict[object, None] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    """Fields of known forms that nobody reads, by the number of rows that hold something there."""

    @classmethod
    def before(cls, data: DataSet, name: str) -> Seen:
        """Return what is known before the first row: no field that the job names was found yet."""
        named = {"rename": data.rename, "where": data.where, "equals": data.equals, "map": data.map}
        return cls(name, absent=[f"{key}.{field}" for key, fields in named.items() for field in fields])

    def leave_out(self, reason: str, data: DataSet) -> None:
        """Count a bad row, or refuse the data set for it."""
        if not data.skip_bad:
            raise SourceError(f"{reason} (skip_bad: true leaves such rows out)")
        self.bad.append(reason)

    def check_names(self, data: DataSet) -> None:
        """Refuse a job that names fields which no row has."""
        if self.read and self.absent:
            key = self.absent[0]
            is_renamed = bool(data.rename) and not key.startswith("rename.")
            names, when = (self.new_names, " after rename") if is_renamed else (self.names, "")
            raise ValueError(f"{key}: a row of {self.name} has no such field{when} (it has: {names})")

    def nothing_left(self, data: DataSet, passed: int) -> ValueError:
        """Return the reason why a data set gives no rows, of which `passed` went through the filters."""
        if data.subset is not None and data.subset not in self.subsets and not passed and not self.bad:
            if list(self.subsets) == [None]:
                return ValueError(f"subset {data.subset!r}: {self.name} is no JSON object of lists of texts")
            there = ", ".join(map(str, self.subsets))
            return ValueError(f"subset {data.subset!r}: {self.name} has no such subset; it has {there}")
        bad = f"; {len(self.bad)} are bad, the first: {self.bad[0]}" if self.bad else ""
        return ValueError(
            f"{', '.join(data.sources)}: no rows are left; {self.read} were read, {passed} pass the filters, "
            f"offset is {data.offset}{bad}"
        )

    def warn(self, data: DataSet) -> None:
        """Say once what was left out and what nobody reads."""
        if self.bad:
            kind = "no pairs" if data.format == "preference" else "bad"
            warnings.warn(
                f"{self.name}: {len(self.bad)} of {self.read} rows are {kind}, left out; the first: {self.bad[0]}",
                stacklevel=3,
            )
        if self.unused:
            shown = ", ".join(f"{name} (in {number} rows)" for name, number in self.unused.items())
            warnings.warn(f"{self.name}: format {data.format} does not use {shown}", stacklevel=3)


def is_absent(key: str, own: Row, row: Row) -> bool:
    """Say whether a row lacks the field that a key of the job names: `own` as it is in the file, `row` after `rename`."""
    setting, _, name = key.partition(".")
    return values.look_up(own if setting == "rename" else row, name) is values.MISSING
