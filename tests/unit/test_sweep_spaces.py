"""Search spaces: what is refused before anything starts, and what their points become."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from steerlab.job import JobError
from steerlab.sweeps import search, sweep_request, trials
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


def ask(
    job: Path, text: str, samples: int | None = None, seeds: int = 1, overrides: tuple[str, ...] = ()
) -> sweep_request.SweepRequest:
    path = job.parent / "space.py"
    path.write_text("from ray import tune\n" + text)
    return sweep_request.checked(trials.plan(job, overrides, spaces.load(path)), samples, seeds)


def test_more_trials_than_anybody_reads_are_refused_with_the_arithmetic(job: Path) -> None:
    grid = "SPACE = {'train.lr': tune.grid_search([1e-3 + i * 1e-9 for i in range(400)]), 'strength': "
    with pytest.raises(JobError, match=r"400 \(train.lr\) x 300 \(strength\) x 2 \(--seeds\) = 240,000 trials, more than"):
        ask(job, f"{grid}tune.grid_search([i / 300 for i in range(1, 301)])}}\n{GOOD}", seeds=2)


def test_long_checks_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_PROGRESS_EVERY_S", -1.0)
    said: list[str] = []
    assert list(trials.counted("abcd", "checking", said.append)) == list("abcd")
    assert said[-1].startswith("checking: 3 of 4, 0 s left")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD, "SPACE is missing"),
        ("SPACE = {}\n" + GOOD, "SPACE is empty"),
        ("SPACE = [1]\n" + GOOD, "SPACE is of type list"),
        ("SPCAE = {'train.lr': 1e-3}\n" + GOOD, "SPCAE: unknown name; did you mean SPACE"),
        ("SPACE = {'strength': [0.5, 1.0]}\n" + GOOD, r"SPACE\['strength'\] is a list; .*tune.grid_search"),
        ("SPACE = {'train.lr': [1e-3, 1e-2]}\n" + GOOD, r"train.lr: .*for several write tune.grid_search"),
        ("SPACE = {'train.lr': (1e-3, 1e-2)}\n" + GOOD, r"train.lr: .*for several write tune.grid_search"),
        ("SPACE = {'train': {'lr': [1e-3, 1e-2]}}\n" + GOOD, r"train.lr: .*for several write tune.grid_search"),
        ("SPACE = {'strength': tune.grid_search(['x'])}\n" + GOOD, "'x' is not a number"),
        ("SPACE = {'strength': tune.grid_search([True])}\n" + GOOD, "True is not a number"),
        ("SPACE = {'train.lr': tune.grid_search(1e-3)}\n" + GOOD, "take a list of values, not 0.001"),
        ("SPACE = {'train.lr': tune.grid_search('abc')}\n" + GOOD, "take a list of values, not 'abc'"),
        ("SPACE = {'train.lr': tune.choice([])}\n" + GOOD, r"SPACE\['train.lr'\] has no values"),
        ("SPACE = {'train.lr': lambda spec: 1}\n" + GOOD, "is a function; write tune.sample_from"),
        ("SPACE = {'train.lr': tune.choice([tune.uniform(0, 1), 1])}\n" + GOOD, "is a domain itself"),
        ("SPACE = {'method': tune.choice([{'name': tune.grid_search(['ise'])}])}\n" + GOOD, "is a domain itself"),
        ("SPACE = {'train.lr': {1, 2}}\n" + GOOD, "a value of type set"),
        ("SPACE = {'train.lr': tune.grid_search([float('nan')])}\n" + GOOD, "nan is not a finite number"),
        ("SPACE = {1: 2}\n" + GOOD, r"SPACE\[1\]: a key is the path of a field"),
        ("SPACE = {('train.lr', 'train.steps'): 2}\n" + GOOD, "a key is the path of a field"),
        ("SPACE = {'train..lr': 2}\n" + GOOD, "a key is the path of a field"),
        ("SPACE = {'train': {'lr': 1e-3}, 'train.lr': 1e-2}\n" + GOOD, "twice, once nested and once by its whole key"),
        ("SPACE = {'train.lr, train.steps': tune.grid_search([(1, 2)]), 'train.lr': 1}\n" + GOOD, "both set train.lr"),
        ("SPACE = {'method': tune.grid_search([{'name': 'ise'}]), 'method.name': 'x'}\n" + GOOD, "both set method.name"),
        ("SPACE = {'train.lr': tune.sample_from(lambda spec: spec.config.nothing)}\n" + GOOD, "cannot be drawn: .*whole keys"),
        ("SPACE = {'train.lr': tune.sample_from(lambda spec: 1 / 0)}\n" + GOOD, "SPACE cannot be drawn: ZeroDivisionError"),
        ("SPACE = {'train.lr': 1e-3}\nMETRIC, MODE = 3, 'min'\n", "METRIC is the name of a metric"),
        ("SPACE = {'train.lr': 1e-3}\nDEVELOPMENT = {'task': 'x'}\n" + GOOD, "DEVELOPMENT is a list of tasks"),
        ("SPACE = {'method.angle_rat': tune.grid_search([1.0])}\n" + GOOD, r"unknown key; did you mean 'angle_rad'\?"),
        ("SPACE = {'methud.angle_rad': tune.grid_search([1.0])}\n" + GOOD, r"unknown key; did you mean 'method\.angle_rad'\?"),
        ("SPACE = {'angle_rad': tune.grid_search([1.0])}\n" + GOOD, r"unknown key; did you mean 'method\.angle_rad'\?"),
        ("SPACE = {'lr': tune.grid_search([1e-3])}\n" + GOOD, r"unknown key; did you mean 'train\.lr'\?"),
        ("SPACE = {'metod': 'ise'}\n" + GOOD, "unknown key; did you mean 'method'"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3, -1.0])}\n" + GOOD, r"train.lr = -1.0.*greater than 0"),
        ("SPACE = {'train.momentum': tune.uniform(0.1, 1.5)}\n" + GOOD, r"train.momentum = 1.5.*less than 1"),
        ("SPACE = {'train.seed, train.lr': tune.grid_search([(1, 2, 3)])}\n" + GOOD, "sets 2 fields"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3, 1e-3])}\n" + GOOD, "gives the trial [0-9a-f]{8} twice"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3])}\nMODE = 'min'\n", "METRIC is missing"),
        (GRID + "METRIC, MODE = 'perplexity/valeu', 'min'\n", "measures perplexity/value"),
        (GRID + "METRIC, MODE = 'toxicity/share', 'min'\n", "no task is called 'toxicity'"),
        (GRID + "METRIC, MODE = 'perplexity/value', 'least'\n", "MODE is 'min' or 'max'"),
        ("SPACE = {'train.lr': tune.grid_search([1e-3])}\nSHEDULER = 1\n" + GOOD, "did you mean SCHEDULER"),
        ("SPACE = {'snapshot': tune.uniform(1, 4)}\n" + GOOD, "lists the steps to save"),
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


@pytest.mark.parametrize(
    ("metric", "task", "mode"),
    [
        ("perplexity/value", {}, "min"),
        ("train/loss", {}, "min"),
        ("eval/loss", {}, "min"),
        ("math/solved", {"task": "math", "max_new_tokens": 2}, "max"),
        ("m/empty", {"task": "math", "label": "m", "max_new_tokens": 2}, "min"),
    ],
)
def test_the_direction_is_that_of_the_metric_where_a_space_names_none(
    job: Path, metric: str, task: dict[str, Any], mode: str
) -> None:
    job.write_text(yaml.safe_dump({**JOB, "evaluate": [*JOB["evaluate"], *([task] if task else [])]}))  # type: ignore[misc]
    assert ask(job, f"{GRID}METRIC = {metric!r}\n").plan.mode == mode
    assert ask(job, f"{GRID}METRIC, MODE = {metric!r}, 'max'\n").plan.mode == "max"


def test_a_metric_that_is_better_neither_way_needs_a_direction(job: Path) -> None:
    task = {"task": "sentiment", "prompts": {"source": "tiny:topics/test", "format": "text"}, "prompt_words": None}
    job.write_text(yaml.safe_dump({**JOB, "evaluate": [{**task, "max_new_tokens": 2}]}))
    with pytest.raises(
        JobError, match=r"MODE is missing: give 'min' or 'max', since sentiment/positive declares no better direction"
    ):
        ask(job, f"{GRID}METRIC = 'sentiment/positive'\n")


def test_ray_tunes_nested_form_is_merged_into_the_job(job: Path) -> None:
    text = (
        "import enum, numpy as np\n"
        "class Schedule(str, enum.Enum):\n    LINE = 'constant'\n"
        "SPACE = {'train': {'lr': tune.grid_search(np.array([1e-3, 1e-2])), 'betas': (0.9, np.float32(0.5)), "
        "'schedule': Schedule.LINE, 'warmup_steps': np.int64(1)}, 'method': {'angle_rad': tune.choice([np.float64(0.5)])}, "
        "'data.train.fill': {'label': 'x'}}\n" + GOOD
    )
    asked = ask(job, text, samples=1)
    points = [trial.params for unit in asked.units for trial in unit.trials]
    assert [point.pop("train.lr") for point in points] == [1e-3, 1e-2]
    assert points == 2 * [
        {
            "train.betas": [0.9, 0.5],
            "train.schedule": "constant",
            "train.warmup_steps": 1,
            "method.angle_rad": 0.5,
            "data.train.fill": {"label": "x"},
        }
    ]
    assert json.loads(json.dumps(points)) == points and type(points[0]["train.schedule"]) is str
    made = asked.plan.job_of(points[0], 0, ())
    assert made.train is not None and made.train.steps == 4, "what the space leaves out stays"


def test_entries_may_depend_on_each_other_by_their_whole_keys(job: Path) -> None:
    text = "SPACE = {'train': {'lr': tune.grid_search([1e-3, 1e-2])}, 'train.clip_norm': tune.sample_from("
    asked = ask(job, text + "lambda spec: 100 * spec.config['train.lr'])}\n" + GOOD, samples=1)
    assert [unit.shared["train.clip_norm"] for unit in asked.units] == pytest.approx([0.1, 1.0])


def test_a_list_is_one_value_of_a_field_that_takes_lists(job: Path) -> None:
    asked = ask(job, "SPACE = {'train.betas': (0.9, 0.99), 'train.lr': tune.grid_search([1e-3])}\n" + GOOD)
    assert asked.units[0].shared["train.betas"] == [0.9, 0.99]


def test_a_space_imports_its_neighbours_and_forgets_them(job: Path, tmp_path: Path) -> None:
    found = []
    for folder, values in (("one", "[1e-3]"), ("two", "[1e-2, 1e-1]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "neighbour_values.py").write_text(f"LRS = {values}\n")
        path = tmp_path / folder / "space.py"
        path.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom ray import tune\n"
            "from neighbour_values import LRS\n@dataclass\nclass Own:\n    a: int = 1\n"
            "SPACE = {'train.lr': tune.grid_search(LRS)}\n"
        )
        found.append(spaces.load(path).entries["train.lr"]["grid_search"])
    assert found == [[1e-3], [1e-2, 1e-1]]
    assert "neighbour_values" not in sys.modules and str(tmp_path / "two") not in sys.path
    (tmp_path / "two" / "neighbour_values.py").write_text("\nLRS = 1 / 0\n")
    with pytest.raises(JobError, match=r"space.py:4: from neighbour_values import LRS\n.*neighbour_values.py:2: LRS = 1 / 0\n"):
        spaces.load(tmp_path / "two" / "space.py")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"exit()\n", r"space.py:1: exit\(\)\n  SystemExit"),
        (b"import sys\nsys.exit('enough')\n", "space.py:2: .*\n  SystemExit: enough"),
        (b"\xff\xfe\n", "SyntaxError|ValueError"),
        (b"a = 1\x00\n", "SyntaxError|ValueError"),
        (b"def f():\n    return f()\nf()\n", "RecursionError"),
    ],
)
def test_whatever_a_space_does_ends_in_a_message(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "space.py"
    path.write_bytes(content)
    with pytest.raises(JobError, match=message):
        spaces.load(path)


def test_seeds_beyond_the_largest_are_refused(job: Path) -> None:
    largest = 2**32 - 1
    assert ask(job, GRID + GOOD, seeds=1, overrides=(f"train.seed={largest}",)).seeds == (largest,)
    with pytest.raises(JobError, match=rf"--seeds 2: the seeds begin with train.seed {largest} and exceed {largest}"):
        ask(job, GRID + GOOD, seeds=2, overrides=(f"train.seed={largest}",))


TEXTS = "SPACE = {'method.name': tune.grid_search(['mean_act', 'gaussian_act'])}\n"
SHUFFLED = "SEEDS = [{'data.source.shuffle': seed, 'data.target.shuffle': seed} for seed in (4, 8, 9)]\n"


def test_each_seed_sets_what_the_space_says_of_it_and_a_closed_form_can_be_repeated(tmp_path: Path) -> None:
    def asked(text: str, seeds: int, job: str = "act") -> sweep_request.SweepRequest:
        path = tmp_path / "space.py"
        path.write_text("from ray import tune\n" + text)
        return sweep_request.checked(trials.plan(ROOT / f"jobs/tiny/{job}.yaml", (), spaces.load(path)), None, seeds)

    with pytest.raises(JobError, match=r"the job trains nothing, so .*; SEEDS in the space can set other data for each seed"):
        asked(TEXTS, 2)
    with pytest.raises(JobError, match=r"--seeds 4: SEEDS in .*space.py has 3 entries"):
        asked(TEXTS + SHUFFLED, 4)
    request = asked(TEXTS + SHUFFLED, 3)
    assert request.seeds == (0, 1, 2) and len(request.units) == 6
    made = [request.plan.job_of(unit.shared, unit.seeds[0], unit.strengths).data for unit in request.units]
    assert [(data.source.shuffle, data.target.shuffle) for data in made] == [(4, 4), (8, 8), (9, 9)] * 2  # type: ignore[union-attr]
    best = request.plan.best_job(request.units[0].trials[0].params, 2)
    assert best.data.source is not None and best.data.source.shuffle == 9, "the best trial is evaluated on its own texts"
    assert request.plan.job_of({}, None, ()).data.source.shuffle is None, "the job itself stays as it is"  # type: ignore[union-attr]
    # A trained job has both: its training seed, and what SEEDS sets.
    trained = asked("SPACE = {'train.lr': tune.grid_search([1e-2])}\n" + SHUFFLED, 2, "lineas")
    jobs = [trained.plan.job_of(unit.shared, unit.seeds[0], ()) for unit in trained.units]
    assert [(job.train.seed, job.data.source.shuffle) for job in jobs] == [(0, 4), (1, 8)]  # type: ignore[union-attr]
    assert asked(TEXTS, 1).described().keys() == request.described().keys() - {"seed_settings"}
    assert request.described()["seed_settings"][1] == {"data.source.shuffle": 8, "data.target.shuffle": 8}  # type: ignore[index]


def test_a_seed_that_makes_the_job_of_another_is_refused(tmp_path: Path) -> None:
    """The development tasks, which choose the trial, replace the job's own, so that a change of those is none."""
    text = TEXTS + "SEEDS = [{'evaluate.0.limit': 1}, {'evaluate.0.limit': 2}]\n"
    path = tmp_path / "space.py"
    path.write_text("from ray import tune\n" + text)
    with pytest.raises(JobError, match=r"space.py: SEEDS\[1\] makes the same job as SEEDS\[0\]"):
        sweep_request.checked(trials.plan(ROOT / "jobs/tiny/act.yaml", (), spaces.load(path)), None, 2)


def test_only_seeds_that_run_are_part_of_a_sweep(job: Path) -> None:
    """More entries, or nested ones, change nothing about the sweep of the first two."""
    seeds = "SEEDS = [{'data': {'train': {'source': 'tiny:instructions/train', 'shuffle': n}}} for n in range(%d)]\n"
    two, three = (ask(job, GRID + GOOD + seeds % number, seeds=2) for number in (2, 3))
    assert two.described() == three.described()
    flat = "SEEDS = [{'method': {'angle_rad': 0.5, 'learned': True}}, {'method.angle_rad, method.learned': (0.25, True)}]\n"
    asked = ask(job, GRID + GOOD + flat, seeds=2)
    made: Any = [asked.plan.job_of(unit.shared, unit.seeds[0], ()) for unit in asked.units]
    assert [(one.method.angle_rad, one.method.learned, one.method.name) for one in made] == [
        (0.5, True, "aside"), (0.25, True, "aside"),
    ]  # fmt: skip
    with pytest.raises(JobError, match="SEEDS has 2 entries, none of them for the seed 5"):
        asked.plan.job_of({}, 5, ())


def test_seeds_count_from_the_training_seed_of_the_job(job: Path) -> None:
    text = GRID + GOOD + "SEEDS = [{'method.angle_rad': 1e-3}, {'method.angle_rad': 1e-2}]\n"
    asked = ask(job, text, seeds=2, overrides=("train.seed=7",))
    made: Any = [asked.plan.job_of(unit.shared, unit.seeds[0], ()) for unit in asked.units]
    assert {(one.train.seed, one.method.angle_rad) for one in made} == {(7, 1e-3), (8, 1e-2)}


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("{'data.train.shuffle': 1}", "SEEDS is a list of dicts"),
        ("[3]", "SEEDS is a list of dicts"),
        ("[{3: 1}]", r"SEEDS\[0\]\[3\]: a key is the path of a field"),
        ("[{'train.lr': 1}]", r"SEEDS\[0\] sets train.lr, but SPACE sets train.lr as well"),
        ("[{'train': {'lr': 1}}]", r"SEEDS\[0\] sets train.lr, but SPACE sets train.lr as well"),
        ("[{'train.lr.x': 1}]", r"SEEDS\[0\] sets train.lr.x, but SPACE sets train.lr as well"),
        ("[{}, {'train.seed': 1}]", r"SEEDS\[1\] sets train.seed, but --seeds sets train.seed as well"),
        ("[{}, {'train.seed ': 1}]", r"SEEDS\[1\] sets train.seed, but --seeds sets train.seed as well"),
        ("[{'train.\"seed\"': 1}]", r"but --seeds sets train.seed as well"),
        ("[{'train': {'steps': 3, 'seed': 7}}]", r"but --seeds sets train.seed as well"),
        ("[{'strength': 0.5}]", r"SEEDS\[0\] sets strength, which distinguishes trials, not seeds"),
        ("[{'data.train.shuffle': tune.choice([1, 2])}]", r"SEEDS\[0\]\['data.train.shuffle'\] is a domain"),
        ("[{'data.train.shuffle, data.train.limit': (1, 2, 3)}]", r"sets 2 fields, so \[1, 2, 3\] must be 2 values"),
        ("[{'method.seeed': 1}]", r"space.py: SEEDS\[0\]: method.*seeed"),
        ("[{'data.train.shuffle': 1}, {'data.train.shuffle': 1}]", r"SEEDS\[1\] is equal to SEEDS\[0\]"),
        ("[{}, {'data.train.shufle': 1}]", r"space.py: SEEDS\[1\]: .*shufle"),
        ("[{'data.train.shuffle': {1, 2}}]", r"SEEDS\[0\]\['data.train.shuffle'\]: .*a value of type set"),
        ("[{'dato.train.shuffle': 1}]", r"space.py: SEEDS\[0\]\['dato.train.shuffle'\]: unknown key; did you mean"),
    ],
)
def test_wrong_settings_of_seeds_are_refused(job: Path, seeds: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        ask(job, GRID + GOOD + f"SEEDS = {seeds}\n")


def test_a_value_of_a_default_is_varied_and_the_rest_of_it_stays(job: Path) -> None:
    text = "SPACE = {'evaluate.1.prompts.limit': tune.grid_search([3, 4])}\n" + GOOD
    job.write_text(yaml.safe_dump(JOB | {"evaluate": [*JOB["evaluate"], {"task": "toxicity", "limit": 1}]}))  # type: ignore[misc]
    found = trials.plan(job, (), spaces.load(_written(job, text)))
    made: Any = found.job_of({"evaluate.1.prompts.limit": 3}, 0, ())
    assert (made.evaluate[1].prompts.limit, made.evaluate[1].prompts.format) == (3, "text")


def _written(job: Path, text: str) -> Path:
    path = job.parent / "space.py"
    path.write_text("from ray import tune\n" + text)
    return path


def test_searchers_and_schedulers_that_cannot_work_are_refused(job: Path) -> None:
    optuna = "from ray.tune.search.optuna import OptunaSearch\nSEARCH_ALG = OptunaSearch(seed=0)\n" + GOOD
    with pytest.raises(JobError, match="Optuna cannot search a grid"):
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


@pytest.mark.parametrize(
    ("entries", "overrides", "said"),
    [
        ("'train.steps': tune.choice([2, 12, 6])", (), "stops trials with train.steps 12 before their 12 steps end"),
        ("'train.epochs': tune.choice([1, 3])", ("train.steps=null", "train.epochs=1"), "train.epochs 3 before their 12 steps"),
        ("'train.epochs': tune.uniform(1, 3)", ("train.steps=null", "train.epochs=1"), "train.epochs 3.0 before their 12"),
        ("'train.micro_batch': tune.choice([8, 2])", ("train.steps=null", "train.epochs=1"), "micro_batch 2 before their 16"),
        ("'data.train.limit': tune.randint(8, 97)", ("train.steps=null", "train.epochs=1"), "train.limit 96 before their 12"),
    ],
)
def test_the_longest_trial_of_a_space_must_end_before_asha_stops_it(
    job: Path, entries: str, overrides: tuple[str, ...], said: str
) -> None:
    """Whatever makes it long: steps, epochs, rows of a step or rows of the data; in a list or in a range."""
    asha = f"from ray.tune.schedulers import ASHAScheduler\nSPACE = {{'train.lr': tune.loguniform(1e-4, 1e-2), {entries}}}\n"
    scheduler = "SCHEDULER = ASHAScheduler(time_attr='step', grace_period=2, max_t={})\n"
    with pytest.raises(JobError, match=said):
        ask(job, asha + GOOD + scheduler.format(11), overrides=overrides)
    ask(job, asha + GOOD + scheduler.format(16), overrides=overrides)


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
    asked = sweep_request.checked(trials.plan(ROOT / "jobs/tiny/lineas.yaml", (), spaces.load(path)), None, 1)
    assert [unit.shared for unit in asked.units] == [{"snapshot": step} for step in (5, 15, 30, 60)]
    assert {unit.strengths for unit in asked.units} == {(0.0, 0.5, 1.0)}
    assert (asked.plan.metric, asked.plan.mode) == ("tiny_sentences/about", "max")
    made = [asked.plan.job_of(unit.shared, 0, unit.strengths) for unit in asked.units]
    assert all(job.choose is None and [task.seed for task in job.evaluate] == [0] for job in made)
    assert {job.train.snapshots for job in made if job.train} == {(5, 15, 20, 30, 60)}
    best = asked.plan.best_job({"snapshot": 30, "strength": 0.5}, 0)
    assert [task.task for task in best.evaluate] == ["tiny_sentences", "perplexity"] and best.evaluate[0].seed == 1
    assert best.choose is None, "the trial's strength is the strength: nothing is chosen anew"
    assert all(task.strengths[0] == 0.5 for task in best.evaluate)
    unasked = asked.plan.best_job({"snapshot": 30}, 0)
    assert unasked.choose is not None, "where the sweep has no strength, the job still chooses one"


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
    "tiny/angle": "aside",
    "tiny/keep_ratio": "warp",
    "tiny/steering_steps": "lineas",
    "tiny/alpha": "iav",
    "tiny/guidance": "diffusion_act",
    "tiny/pixel_form": "diffusion_act",
    "tiny/shape": "act",
    "tiny/heads": "iav",
    "tiny/prompt": "prompt",
}


def test_every_search_space_has_a_job() -> None:
    files = (ROOT / "search_spaces").rglob("*.py")
    assert {str(path.relative_to(ROOT / "search_spaces").with_suffix("")) for path in files} == set(SPACES)


@pytest.mark.filterwarnings("ignore:strengths .* lie outside")  # the tiny world shows what too much strength breaks
@pytest.mark.parametrize("name", [name for name, job in SPACES.items() if (ROOT / f"jobs/tiny/{job}.yaml").exists()])
def test_every_search_space_fits_its_job(name: str) -> None:
    space = spaces.load(ROOT / f"search_spaces/{name}.py")
    asked = sweep_request.checked(trials.plan(ROOT / f"jobs/tiny/{SPACES[name]}.yaml", (), space), None, 1)
    assert asked.units or asked.plan.space.search_alg is not None
    json.dumps(asked.described())


def test_snapshots_that_are_set_with_other_fields_are_taken_by_every_training() -> None:
    space = spaces.load(ROOT / "search_spaces/tiny/steering_steps.py")
    plan = trials.plan(ROOT / "jobs/tiny/lineas.yaml", (), space)
    assert plan.snapshots == (5, 15, 30, 60, 100)
    made = plan.job_of({"snapshot": 15, "data.target.equals.label": "sea"}, 0, ())
    assert made.snapshot == 15 and made.train is not None and set(plan.snapshots) <= set(made.train.snapshots)


def test_paired_values_are_searched_together(job: Path) -> None:
    text = (
        "from ray.tune.search.optuna import OptunaSearch\nSEARCH_ALG = OptunaSearch(seed=0)\n"
        "SPACE = {'train.optimizer, train.lr': tune.choice([('adamw', 1e-3), ('sgd', 1e-1)])}\n" + GOOD
    )
    asked = ask(job, text, samples=2)
    suggester = search.Suggester(asked.plan.space, "min", (), (0,), 2)
    points = [search.Suggester._point(suggester, params) for params in ({"train.optimizer, train.lr": '["sgd", 0.1]'},)]
    assert points == [{"train.optimizer": "sgd", "train.lr": 0.1}]
