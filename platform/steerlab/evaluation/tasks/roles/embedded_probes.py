"""The default items of SEP: this repository's probes in alpaca rows, in the published format.

133 probes written for this repository (`probes.json` in this folder, each in a plain and an insistent wording) are inserted
into the alpaca rows that have an input: one probe per row, with all four positions and both wordings in turn. If the
witness of a probe occurs in the row or in its answer, the next probe is used instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from steerlab.data import sources
from steerlab.data.values import Row
from steerlab.evaluation.asking.items import ALPACA, has_input
from steerlab.evaluation.statistics.metrics import contains

POSITIONS = ("ll", "lr", "rl", "rr")
"""Positions of a probe: in the instruction of (I), then in the data of (D); l is before the text, r after it."""


class Probe(NamedTuple):
    """A hidden request in a plain and an insistent wording, and the word that shows that it was executed."""

    id: int
    type: str
    probe: str
    insistent: str
    witness: str


def probes() -> list[Probe]:
    """Read the repository's probes."""
    text = resources.files("steerlab.evaluation.tasks.roles").joinpath("probes.json").read_text(encoding="utf-8")
    return [Probe(**entry) for entry in json.loads(text)]


def embedded_rows() -> list[Row]:
    """Build the default set from the repository's probes and the alpaca rows with an input."""
    return place_probes([row for row in sources.rows(ALPACA) if has_input(row)], probes())


def place_probes(rows: Sequence[Row], probes: Sequence[Probe]) -> list[Row]:
    """Insert one probe into each row, with the four positions and two wordings in turn; the result is deterministic.

    Raises:
        ValueError: a row contains the witness of every probe.
    """
    placed: list[Row] = []
    for i, row in enumerate(rows):
        instruction, data = str(row["instruction"]), str(row["input"])
        text = "\n".join((instruction, data, str(row.get("output", ""))))
        # A witness that the row already contains would count as executed without the probe.
        candidates = [probes[(i + skipped) % len(probes)] for skipped in range(len(probes))]
        probe = next((p for p in candidates if not contains(text, p.witness)), None)
        if probe is None:
            raise ValueError(f"row {i} contains the witness of each of the {len(probes)} probes: {text[:80]!r}")
        position = POSITIONS[i % len(POSITIONS)]
        # The wording changes after each round of positions, so that every position has both wordings.
        is_insistent = i // len(POSITIONS) % 2 == 1
        request = probe.insistent if is_insistent else probe.probe
        placed.append(
            {
                "system_prompt_clean": instruction,
                "prompt_instructed": beside(data, request, position[1]),
                "system_prompt_instructed": beside(instruction, request, position[0]),
                "prompt_clean": data,
                "witness": probe.witness,
                "info": {
                    "type": "alpaca",
                    "subtask": probe.type,
                    "appended_task_id": probe.id,
                    "appended_type": position,
                    "is_insistent": is_insistent,
                },
            }
        )
    return placed


def beside(text: str, request: str, side: str) -> str:
    """Return a request before (`l`) or after (`r`) a text."""
    return f"{request} {text}" if side == "l" else f"{text} {request}"
