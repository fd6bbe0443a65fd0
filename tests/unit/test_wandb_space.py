"""Search spaces as W&B's sweeps: the same values, under W&B's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from steerlab.job import JobError
from steerlab.sweeps import space as spaces
from steerlab.sweeps.agent import point_of
from steerlab.tracking.wandb_client.parameters import parameter, sweep_config


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        (tune.grid_search([1, 2]), {"values": [1, 2]}),
        (tune.choice(["a", ("b", 2)]), {"values": ["a", ["b", 2]]}),
        (tune.uniform(0, 1), {"distribution": "uniform", "min": 0, "max": 1}),
        (tune.quniform(0, 1, 0.1), {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.1}),
        (tune.loguniform(1e-4, 1e-2), {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}),
        (tune.qloguniform(2, 64, 2), {"distribution": "q_log_uniform_values", "min": 2, "max": 64, "q": 2}),
        (tune.randint(1, 10), {"distribution": "int_uniform", "min": 1, "max": 9}),
        (tune.qrandint(2, 10, 2), {"distribution": "q_uniform", "min": 2, "max": 10, "q": 2}),
        (tune.lograndint(1, 10), {"distribution": "q_log_uniform_values", "min": 1, "max": 9, "q": 1}),
        (tune.randn(1, 2), {"distribution": "normal", "mu": 1, "sigma": 2}),
        (tune.qrandn(1, 2, 0.5), {"distribution": "q_normal", "mu": 1, "sigma": 2, "q": 0.5}),
        (3, {"value": 3}),
    ],
)
def test_each_kind_of_entry(entry: Any, meant: dict[str, Any]) -> None:
    assert parameter("a.b", entry) == meant


def test_a_whole_space() -> None:
    space = {"train.lr": tune.loguniform(1e-4, 1e-2), "method.name, method.pooling": tune.grid_search([("aura", "max")])}
    config = sweep_config("job", space, "separation/sep", "max", min_reports=20)
    assert config["method"] == "random" and config["metric"] == {"name": "separation/sep", "goal": "maximize"}
    assert config["parameters"]["method.name--method.pooling"] == {"values": [["aura", "max"]]}
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 20}
    assert sweep_config("job", {"snapshot": tune.grid_search([1])}, "m", "min")["method"] == "grid"
    assert sweep_config("job", space, "m", "min", "bayes")["method"] == "bayes"


@pytest.mark.parametrize(
    ("space", "method", "message"),
    [
        ({"a": tune.sample_from(lambda spec: 1)}, None, r"SPACE\['a'\]: W&B cannot draw values from a function"),
        ({"a": {"b": tune.uniform(0, 1)}}, None, r"SPACE\['a'\]: a nested space; name the whole path, as in 'a.field'"),
        ({"a": tune.uniform(0, 1)}, "grid", r"SPACE\['a'\] is a range; W&B's grid needs lists"),
    ],
)
def test_what_wandb_cannot_draw(space: dict[str, Any], method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep_config("job", space, "m", "min", method)


def test_names_are_those_that_wandb_takes_and_lead_back() -> None:
    """Its schema allows letters, digits, underscores, dots and dashes; a comma or a blank is refused."""
    folder = Path(__file__).parents[2] / "search_spaces"
    found = [spaces.load(path) for path in sorted(folder.glob("*.py"))]
    assert any("," in entry for space in found for entry in space.entries)
    for space in found:
        parameters = sweep_config("job", space.entries, "m", "min")["parameters"]
        assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) for name in parameters), space.path
        values = {name: entry.get("values", [0])[0] for name, entry in parameters.items()}
        assert set(point_of(space, values)) == {key.strip() for entry in space.entries for key in entry.split(",")}
    with pytest.raises(JobError, match=r"W&B's sweep varies train.lrr, which .* does not: "):
        point_of(found[0], {"train.lrr": 1})
