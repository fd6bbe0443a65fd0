"""The wording of a benchmark's instructions, from a user's file.

The instructions of a benchmark are its authors' text, so this repository has others; numbers that should be compared with
published ones need the published wording. A file has a row {scenario, instruction} for each scenario, whose instruction names
fields of the benchmark's rows in braces: {question}, or {users[0]} for an entry of a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from steerlab.data import sources

_FIELD = re.compile(r"{(\w+)(?:\[(\d+)\])?}")


def read(source: str | None, own: Mapping[str, str], scenarios: Sequence[str]) -> Mapping[str, str]:
    """Return scenario -> wording.

    Args:
        source: the file; None takes this repository's wordings.
        own: this repository's wordings.
        scenarios: scenarios that are needed.

    Raises:
        ValueError: the file has no row for one of the scenarios, or two for one.
    """
    if source is None:
        return own
    names = ("scenario", "instruction")
    rows = sources.rows(source, fields=names, texts=names)
    wordings = {str(row["scenario"]): str(row["instruction"]) for row in rows}
    missing = [scenario for scenario in scenarios if scenario not in wordings]
    if missing:
        raise ValueError(f"{source} has no row for scenario {missing[0]} (it has: {', '.join(wordings)})")
    if len(wordings) < len(rows):
        raise ValueError(f"{source} has a scenario twice: its {len(rows)} rows name {', '.join(wordings)}")
    return wordings


def fill(wording: str, fields: Mapping[str, object], what: str) -> str:
    """Return a wording with fields filled in; other braces are not changed.

    Args:
        wording: the wording.
        fields: field -> its value, a text, a number, or a list of them.
        what: owner of the fields, for messages.

    Raises:
        ValueError: a field that the wording names does not exist.
    """

    def value(place: re.Match[str]) -> str:
        name, index = place[1], place[2]
        if name not in fields:
            raise ValueError(f"{what} has no field {name!r} (it has: {', '.join(fields)})")
        content = fields[name]
        if index is None:
            return str(content)
        if not isinstance(content, list | tuple) or int(index) >= len(content):
            raise ValueError(f"{what} has no entry {index} in its field {name!r}")
        return str(content[int(index)])

    # Fields are filled in one pass without `format`: a wording may contain other braces, and a value the name of a field.
    return _FIELD.sub(value, wording)
