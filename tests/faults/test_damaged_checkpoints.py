"""Damaged checkpoints of a real training: left out with a line, and the final weights are the bits of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from damage import DAMAGES, files_below
from trainings import Training, in_a_process

STEPS = 6


def damaged(root: Path, seed: str, rounds: int) -> None:
    """Stop a training at random steps, damage a random file of a random checkpoint in each of the ways, and continue it."""
    chance = random.Random(seed)
    training = Training(root)
    whole = training.run("whole")
    assert whole is not None and training.steps == list(range(1, STEPS + 1))
    for number in range(rounds):
        for damage in DAMAGES:
            place = f"{damage.__name__}{number}"
            assert training.run(place, stop_after=chance.randrange(3, STEPS + 1)) is None
            folder = root / place / "checkpoints"
            newest = max(path.name for path in folder.iterdir())
            victim = chance.choice(files_below(folder))
            damage(victim, chance)
            assert training.run(place) == whole, (place, victim)
            # An older one is not looked at, unless it is the best.
            assert training.lines or newest not in victim.parts, (place, victim)
            assert all("is skipped: " in line and "\n" not in line for line in training.lines)
            assert training.steps == list(range(1, STEPS + 1)), "each step is told once more, or for the first time"
            shutil.rmtree(root / place)
    # Somebody removes them, some or all: the training goes on from what is left, or begins anew.
    for name in ("some", "all"):
        training.run(name, stop_after=4)
        folders = sorted((root / name / "checkpoints").iterdir())
        for folder in folders if name == "all" else folders[-1:]:
            shutil.rmtree(folder)
        assert training.run(name) == whole and training.lines == []


@pytest.mark.parametrize("rounds", [pytest.param(1), pytest.param(5, marks=pytest.mark.faults)])
def test_damaged_checkpoints(rounds: int, chance: random.Random, tmp_path: Path) -> None:
    in_a_process(damaged, tmp_path, f"{chance.random()}", rounds)
