"""Search spaces: what is refused before anything starts, and what their points become."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from steerlab.job import JobError
from steerlab.sweeps import driver, search, trials
from steerlab.sweeps import space as spaces

ROOT = Path(__file__).parents[2]
JOB = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:instructions/train", "limit": 32},
        "validation": {"source": "tiny:instructions/validation", "limit": 8},
    },
    "method": {"name": "aside"},
    "train": {"steps": 4, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 8}],
}
GRID = "SPACE = {'train.lr': tune.grid_search([1e-3])}\n"
GOOD = 'METRIC, MODE = "perplexity/value", "min"\n'


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(JOB))
    return path


def ask(job: Path, text: str, samples: int | None = None, seeds: int = 1, overrides: tuple[str, ...] = ()) -> driver.Asked:
    path = job.parent / "space.py"
    path.write_text("from ray import tune\n" + text)
    return driver.asked(trials.plan(job, overrides, spaces.load(path)), samples, seeds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD, "SPACE is missing"),
        ("SPACE = {'method.angle_rat': tune.grid_search([1.0])}\n" + GOOD, r"unknown key; did you mean 'angle_rad'\?"),
        ("SPACE = {'methud.angle_rad': tune.grid_search([1.0])}\n" + GOOD, "unknown key; did you mean 'method'"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3, -1.0])}\n" + GOOD, r"train.lr = -1.0.*greater than 0"),
        ("SPACE = {'train.momentum': tune.uniform(0.1, 1.5)}\n" + GOOD, r"train.momentum = 1.5.*less than 1"),
        ("SPACE = {'train.seed, train.lr': tune.grid_search([(1, 2, 3)])}\n" + GOOD, "sets 2 fields"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3, 1e-3])}\n" + GOOD, "gives the trial [0-9a-f]{8} twice"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3])}\nMODE = 'min'\n", "METRIC is missing"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3])}\nMETRIC = 'perplexity/value'\n", "MODE is missing"),
        (GRID + "METRIC, MODE = 'perplexity/valeu', 'min'\n", "measures perplexity/value"),
        (GRID + "METRIC, MODE = 'toxicity/share', 'min'\n", "no task is called 'toxicity'"),
        (GRID + "METRIC, MODE = 'perplexity/value', 'least'\n", "MODE is 'min' or 'max'"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3])}\nSHEDULER = 1\n" + GOOD, "did you mean SCHEDULER"),
        ("SPACE = {'snapshot': tune.uniform(1, 4)}\n" + GOOD, "names the steps to keep"),
        ("SPACE = {'snapshot': tune.grid_search([2, 4])}\n" + GOOD, "trains the model itself"),
        ("SPACE = {'method.name': tune.grid_search(['asid'])}\n" + GOOD, "'asid' is not known; did you mean 'aside'"),
        ("SPACE = {'strength': tune.grid_search([0.0, 1.0])}\n" + GOOD, None),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_with_one_message(job: Path, text: str, message: str | None) -> None:
    if message is None:
        assert len(ask(job, text).units) == 1
        return
    with pytest.raises(ValueError, match=message):
        ask(job, text)


def test_searchers_and_schedulers_that_cannot_work_are_refused(job: Path) -> None:
    optuna = "from ray.tune.search.optuna import OptunaSearch\nSEARCH_ALG = OptunaSearch(seed=0)\n" + GOOD
    with pytest.raises(JobError, match="Optuna searches no grid"):
        ask(job, "SPACE = {'train.lr': tune.grid_search([1e-3])}\n" + optuna)
    asha = "from ray.tune.schedulers import ASHAScheduler\nSPACE = {'train.lr': tune.loguniform(1e-4, 1e-2)}\n" + GOOD
    with pytest.raises(JobError, match=r"time_attr 'training_iteration'; it must be 'step'"):
        ask(job, asha + "SCHEDULER = ASHAScheduler()\n")
    asked = ask(job, asha + "SCHEDULER = ASHAScheduler(time_attr='step', grace_period=2, max_t=4)\n", samples=3)
    scheduler: Any = asked.plan.space.scheduler
    assert scheduler._metric == "eval/loss"
    trial = SimpleNamespace(trial_id="a")
    scheduler.on_trial_add(None, trial)
    last = scheduler.on_trial_result(None, trial, {"step": 4, "eval/loss": 1.0})
    assert last == "CONTINUE", "a training that reached its last step is evaluated yet"
    with pytest.raises(JobError, match="max_t 3 stops every trial before its 4 steps end"):
        ask(job, asha + "SCHEDULER = ASHAScheduler(time_attr='step', grace_period=2, max_t=3)\n")


def test_a_space_that_fails_shows_its_own_lines_and_no_others(job: Path) -> None:
    path = job.parent / "space.py"
    path.write_text("from ray import tune\n\ndef values():\n    return [1, 2].index(3)\n\nSPACE = {'train.lr': values()}\n")
    with pytest.raises(JobError) as caught:
        spaces.load(path)
    assert str(caught.value).splitlines() == [
        f"{path}:6: SPACE = {{'train.lr': values()}}",
        f"{path}:4: return [1, 2].index(3)",
        "  ValueError: 3 is not in list",
    ]
    path.write_text("SPACE = {\n")
    with pytest.raises(JobError, match=r"space.py:1: .*\n  SyntaxError"):
        spaces.load(path)
    path.write_text("import nothing_like_it\n")
    with pytest.raises(JobError, match=r"space\.py:1: import nothing_like_it\n  ModuleNotFoundError"):
        spaces.load(path)


def test_strengths_become_one_unit_and_seeds_units_of_their_own(job: Path) -> None:
    text = "SPACE = {'method.angle_rad': tune.grid_search([0.5, 1.0]), 'strength': tune.grid_search([0.0, 0.5, 1.0])}\n" + GOOD
    asked = ask(job, text, seeds=2)
    assert [(unit.shared, unit.strengths, unit.seeds) for unit in asked.units] == [
        ({"method.angle_rad": angle}, (0.0, 0.5, 1.0), (seed,)) for angle in (0.5, 1.0) for seed in (0, 1)
    ]
    made = asked.plan.job_of(asked.units[1].shared, asked.units[1].seeds[0], asked.units[1].strengths)
    assert made.train is not None and made.train.seed == 1
    assert [task.strengths for task in made.evaluate] == [(0.0, 0.5, 1.0)]
    assert made.scale.warm
    best = asked.plan.best_job({"method.angle_rad": 1.0, "strength": 0.5}, 0)
    assert [task.strengths for task in best.evaluate] == [(0.5,)] and best.scale.warm is None


def test_points_drawn_at_random_are_the_same_for_the_same_seed_and_count_once(job: Path) -> None:
    text = "SPACE = {'train.lr': tune.loguniform(1e-4, 1e-2), 'method.learned': tune.choice([True, False])}\n" + GOOD
    first, again = ask(job, text, samples=6), ask(job, text, samples=6)
    assert len(first.units) == 6 and first.units == again.units
    few = ask(job, "SPACE = {'method.learned': tune.choice([True, False])}\n" + GOOD, samples=20)
    assert len(few.units) == 2
    with pytest.raises(JobError, match="is a grid"):
        ask(job, "SPACE = {'train.lr': tune.grid_search([1e-3])}\n" + GOOD, samples=3)


def test_every_kind_of_domain_is_drawn_checked_and_written(job: Path) -> None:
    text = (
        "SPACE = {'train.lr': tune.qloguniform(1e-4, 1e-2, 1e-4), 'train.steps': tune.randint(2, 6), 'train.momentum': "
        "tune.quniform(0.0, 0.9, 0.1), 'train.warmup_steps': tune.lograndint(1, 2), 'train.clip_norm': 1.0, "
        "'train.seed': tune.sample_from(lambda spec: 7)}\n" + GOOD
    )
    asked = ask(job, text, samples=4)
    points = [trial.params for unit in asked.units for trial in unit.trials]
    assert json.loads(json.dumps(points)) == points and {point["train.seed"] for point in points} == {7}
    kinds = {key: entry["kind"] for key, entry in asked.described()["space"].items()}
    assert kinds == {
        "train.lr": "loguniform",
        "train.steps": "randint",
        "train.momentum": "uniform",
        "train.warmup_steps": "lograndint",
        "train.clip_norm": "constant",
        "train.seed": "sample_from",
    }
    made = asked.plan.job_of(points[0], 0, ())
    assert made.train is not None and made.train.seed == 7, "a seed of the space is the seed"


def test_the_strengths_of_choose_are_an_axis_and_its_tasks_choose() -> None:
    path = ROOT / "search_spaces/steering_steps.py"
    asked = driver.asked(trials.plan(ROOT / "jobs/tiny/lineas.yaml", (), spaces.load(path)), None, 1)
    assert [unit.shared for unit in asked.units] == [{"snapshot": step} for step in (5, 15, 30, 60)]
    assert {unit.strengths for unit in asked.units} == {(0.0, 0.5, 1.0)}
    assert (asked.plan.metric, asked.plan.mode) == ("concept/words", "max")
    made = [asked.plan.job_of(unit.shared, 0, unit.strengths) for unit in asked.units]
    assert all(job.choose is None and [task.seed for task in job.evaluate] == [0] for job in made)
    assert {job.train.snapshots for job in made if job.train} == {(5, 15, 20, 30, 60)}
    best = asked.plan.best_job({"snapshot": 30, "strength": 0.5}, 0)
    assert [task.task for task in best.evaluate] == ["concept", "perplexity"] and best.evaluate[0].seed == 1


SPACES = {
    "rotation_angle": "aside",
    "keep_ratio": "warp",
    "steering_steps": "lineas",
    "alpha": "iav",
    "diffusion_strength": "diffusion_lineas",
    "aside": "aside",
    "warp": "warp",
    "lineas": "lineas",
    "act": "act",
    "iav": "iav",
}


def test_every_search_space_has_a_job() -> None:
    assert {path.stem for path in (ROOT / "search_spaces").glob("*.py")} == set(SPACES)


@pytest.mark.parametrize("name", [name for name, job in SPACES.items() if (ROOT / f"jobs/tiny/{job}.yaml").exists()])
def test_every_search_space_fits_its_job(name: str) -> None:
    space = spaces.load(ROOT / f"search_spaces/{name}.py")
    asked = driver.asked(trials.plan(ROOT / f"jobs/tiny/{SPACES[name]}.yaml", (), space), None, 1)
    assert asked.units or asked.plan.space.search_alg is not None
    json.dumps(asked.described())


def test_paired_values_are_searched_together(job: Path) -> None:
    text = (
        "from ray.tune.search.optuna import OptunaSearch\nSEARCH_ALG = OptunaSearch(seed=0)\n"
        "SPACE = {'train.optimizer, train.lr': tune.choice([('adamw', 1e-3), ('sgd', 1e-1)])}\n" + GOOD
    )
    asked = ask(job, text, samples=2)
    suggester = search.Suggester(asked.plan.space, "min", (), (0,), 2)
    points = [search.Suggester._point(suggester, params) for params in ({"train.optimizer, train.lr": '["sgd", 0.1]'},)]
    assert points == [{"train.optimizer": "sgd", "train.lr": 0.1}]
