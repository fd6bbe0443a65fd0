"""How a metric follows the strength: by hand, over tasks made up and real, and in requests that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from transformers import PreTrainedModel

from steerlab import job
from steerlab.evaluation import TASKS
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation, Result, Task
from steerlab.evaluation.statistics.summaries import summarise, summarise_all
from steerlab.evaluation.tasks.ability import perplexity
from steerlab.evaluation.tasks.style import controllability
from steerlab.evaluation.tasks.style.controllability import Point, judge, kendall, slope
from steerlab.inputs.encoding import Encoder
from steerlab.job import Table, TaskConfig
from steerlab.patches import LogitPatch
from steerlab.stages import JobType, Plan, evaluate
from steerlab.steered.language import SteeredModel


def over(tasks: dict[str, Task]) -> Task:
    return controllability.over(Table(Task, "task", tasks, lambda task, config: task._replace(Config=config)))


GRID = (1.0, 0.0, 0.5)
TREE: dict[str, Any] = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "source": {"source": "tiny:topics/train", "format": "text", "limit": 8},
        "target": {"source": "tiny:topics/test", "format": "text", "limit": 8},
    },
    "method": {"name": "mean_act", "incremental": False},
    "extract": {},
    "evaluate": [{"task": "controllability", "metric": "refusal/refusal_rate", "of": {"task": "refusal", "limit": 4}}],
}


def points(scores: dict[float, float]) -> list[Point]:
    return [Point(strength, score, 1.0) for strength, score in scores.items()]


def observations(scores: dict[str, dict[float, float | None]], weights: dict[str, float] | None = None) -> list[Observation]:
    return [
        Observation("t/m", name, value, (weights or {}).get(name, 1.0), strength)
        for name, curve in scores.items()
        for strength, value in curve.items()
    ]


# Arithmetic


@pytest.mark.parametrize(
    ("scores", "tau"),
    [
        ({1.0: 5.0, 0.0: 1.0, 0.5: 3.0}, 1.0),  # in any order
        ({0.0: 3.0, 0.5: 2.0, 1.0: 1.0}, -1.0),
        ({0.0: 1.0, 0.5: 3.0, 1.0: 2.0}, 1 / 3),  # two steps up, one down
        ({0.0: 0.0, 0.5: 1.0, 1.0: 1.0}, 2 / 3),  # the tie counts among the pairs
        ({0.0: 1.0, 0.5: 1.0, 1.0: 1.0}, 0.0),
        ({0.5: 1.0}, None),
        ({}, None),
    ],
)
def test_tau_by_hand(scores: dict[float, float], tau: float | None) -> None:
    assert kendall(points(scores)) == tau


def test_pairs_at_one_strength_say_nothing() -> None:
    assert kendall([Point(0.5, 1.0, 1.0), Point(0.5, 2.0, 1.0)]) is None
    assert slope([Point(0.5, 1.0, 1.0), Point(0.5, 2.0, 1.0)]) is None


def test_slope_is_that_of_least_squares() -> None:
    scores = {0.0: 1.0, 0.25: 4.0, 1.0: 2.0, 2.0: 7.0}
    assert slope(points(scores)) == pytest.approx(np.polyfit(list(scores), list(scores.values()), 1)[0])
    assert slope(points({0.5: 1.0})) is None


@pytest.mark.parametrize("weights", [{}, {"x": 3.0, "y": 1.0, "z": 2.0}])
def test_the_slope_of_the_items_is_that_of_the_metric(weights: dict[str, float]) -> None:
    curves = {"x": {0.0: 1.0, 0.5: 4.0, 1.0: 2.0}, "y": {0.0: 0.0, 0.5: 1.0, 1.0: 9.0}, "z": {0.0: 3.0, 0.5: 3.0, 1.0: 0.0}}
    measured = observations(curves, weights)  # type: ignore[arg-type]
    means = [summarise([o for o in measured if o.strength == s]).value for s in (0.0, 0.5, 1.0)]
    found = [o for o in judge(measured, 1.0) if o.metric == "controllability/slope"]
    assert summarise(found).value == pytest.approx(np.polyfit((0.0, 0.5, 1.0), means, 1)[0])


def test_items_that_cannot_be_followed_are_counted() -> None:
    found = judge(
        [
            *observations({"seen": {0.0: 0.0, 1.0: 1.0}, "once": {0.0: None, 1.0: 1.0}}),
            Observation("t/m", "unweighted", 0.0, 1.0, 0.0),
            Observation("t/m", "unweighted", 1.0, 0.0, 1.0),
        ],
        headline=0.0,
    )
    taus = [o for o in found if o.metric == "controllability/tau"]
    assert [(o.id, o.value) for o in taus] == [("seen", 1.0), ("once", None), ("unweighted", None)]
    assert {o.strength for o in found} == {0.0}
    assert summarise(taus, "bootstrap")[2:4] == (1, 2)


def test_scores_that_ignore_the_strength_have_an_interval_around_0() -> None:
    rng = np.random.default_rng(0)
    curves = {str(i): dict(zip((0.0, 0.5, 1.0, 2.0), rng.normal(size=4).tolist(), strict=True)) for i in range(200)}
    for metric in ("controllability/tau", "controllability/slope"):
        noise = summarise([o for o in judge(observations(curves), 1.0) if o.metric == metric], "bootstrap")  # type: ignore[arg-type]
        assert noise.low is not None and noise.high is not None and noise.low < 0 < noise.high
    dialled = {name: {s: score + 2 * s for s, score in curve.items()} for name, curve in curves.items()}
    found = [o for o in judge(observations(dialled), 1.0) if o.metric == "controllability/tau"]  # type: ignore[arg-type]
    assert summarise(found, "bootstrap").low > 0.3  # type: ignore[operator]


# Over other tasks


class Dial(TaskConfig):
    """A task whose scores are the strength times the item's number."""

    task: Literal["dial"] = "dial"


class Other(TaskConfig):
    """Another one, because a union has two members."""

    task: Literal["other"] = "other"


MEASURES = (Measure("up", "lower", "turns", transform="exp"), Measure("other", None))


def dial(calls: list[tuple[float, ...]]) -> Task:
    def run(_model: object, config: Dial) -> Result:
        calls.append(config.strengths)
        found = [Observation("dial/up", str(i), i * s, 1.0, s) for s in config.strengths for i in range(config.limit or 3)]
        return Result([*found, Observation("dial/other", "0", 1.0)], [{"id": "0"}], MEASURES)

    return Task(Dial, run, lambda config: MEASURES)


def test_the_task_within_runs_once_over_the_grid() -> None:
    calls: list[tuple[float, ...]] = []
    task = over({"dial": dial(calls), "other": Task(Other, lambda _m, _c: Result([], []), lambda _c: ())})
    config = task.Config.model_validate({"of": {"task": "dial", "limit": 2}, "metric": "dial/up", "strengths": GRID})
    result = task.run(None, config)  # type: ignore[arg-type]
    assert calls == [GRID] and result.samples == [{"id": "0"}]
    found = summarise_all(result)
    assert list(found) == list(GRID)
    assert list(found[1.0]) == ["controllability/up", "controllability/tau", "controllability/slope"]
    assert list(found[0.0]) == list(found[0.5]) == ["controllability/up"]
    assert found[0.5]["controllability/up"].value == pytest.approx(np.exp(0.25)), "the task's own transform"
    assert (found[1.0]["controllability/tau"].value, found[1.0]["controllability/slope"].value) == (0.5, 0.5)


def test_one_strength_has_no_trend() -> None:
    task = over({"dial": dial([]), "other": Task(Other, lambda _m, _c: Result([], []), lambda _c: ())})
    config = task.Config.model_validate({"of": {"task": "dial"}, "metric": "dial/up", "strengths": (1.0,)})
    assert {o.metric for o in task.run(None, config).observations} == {"controllability/up"}  # type: ignore[arg-type]


def test_a_metric_that_the_task_does_not_have() -> None:
    task = over({"dial": dial([]), "other": Task(Other, lambda _m, _c: Result([], []), lambda _c: ())})
    config = task.Config.model_validate({"of": {"task": "dial"}, "metric": "dial/upp"})
    with pytest.raises(
        ValueError, match=r"dial has no metric dial/upp; did you mean dial/up\?; its metrics are dial/up, dial/other"
    ):
        task.run(None, config)  # type: ignore[arg-type]


def test_a_real_task_at_each_strength_is_what_it_is_alone(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    patch = LogitPatch(tiny_model.config.hidden_size, tiny_model.config.vocab_size)
    with torch.no_grad():
        patch.up.normal_(generator=torch.Generator().manual_seed(1))
    model = SteeredModel(tiny_model, encoder, (patch.eval(),))
    inner = {"task": "perplexity", "source": "tiny:instructions/test", "limit": 6}
    config = TASKS["controllability"].Config.model_validate({"of": inner, "metric": "perplexity/value", "strengths": GRID})
    found = summarise_all(TASKS["controllability"].run(model, config))
    alone = summarise_all(perplexity.run(model, perplexity.Config.model_validate({**inner, "strengths": GRID})))
    for strength in GRID:
        assert found[strength]["controllability/value"] == alone[strength]["perplexity/value"]
    assert found[1.0]["controllability/tau"].value == 1.0, "a random head at growing strength: every row gets less likely"
    assert found[1.0]["controllability/slope"].low > 0  # type: ignore[operator]


# Requests


def request(**fields: Any) -> job.Job:
    return job.validate({**TREE, "evaluate": [{**TREE["evaluate"][0], **fields}]}, JobType, Path("a.yaml"))


def test_a_job_holds_the_task_within_with_every_default(tmp_path: Path) -> None:
    found = request()
    of = found.evaluate[0].of  # type: ignore[attr-defined]
    assert type(of) is TASKS["refusal"].Config and of.limit == 4 and of.match == "prefix"
    assert yaml.safe_load(job.dump(found))["evaluate"][0]["of"]["max_new_tokens"] == 128
    (tmp_path / "a.yaml").write_text(job.dump(found))
    assert job.read(tmp_path / "a.yaml", JobType) == found
    assert job.read(tmp_path / "a.yaml", JobType, ["evaluate.0.of.limit=7"]).evaluate[0].of.limit == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"of": {"task": "refusl"}},
            r"evaluate.0.of.task: 'refusl' is not known; did you mean 'refusal'\?; valid: separation, ",
        ),
        (
            {"of": {"task": "refusal", "limt": 1}},
            r"evaluate.0.of.limt: unknown key; did you mean 'limit'\? valid keys: .*match",
        ),
        ({"of": {"task": "refusal", "limit": 0}}, r"evaluate.0.of.limit: Input should be greater than .*\(given: 0\)"),
        (
            {"of": {"task": "refusal", "prompts": {"source": "a", "fromat": "text"}}},
            r"evaluate.0.of.prompts.fromat: unknown key",
        ),
        ({"of": {"task": "controllability"}}, r"evaluate.0.of.task: 'controllability' is not known"),
        ({"of": {"limit": 1}}, r"evaluate.0.of.task: this key is required"),
        (
            {"of": {"task": "refusal", "strengths": [0, 1]}},
            r"of.strengths \[0.0, 1.0\]: set the grid as strengths of this task, outside of `of`",
        ),
        ({"of": {"task": "refusal", "label": "b"}}, r"of.label b: set the label of this task, outside of `of`"),
        ({"limit": 3}, r"limit, seed and seeds belong to the task in `of`: set of.limit, of.seed, of.seeds"),
        ({"seed": 3}, r"set of.limit, of.seed"),
        ({"metric": "toxicity/score"}, r"metric 'toxicity/score' is not one of the task in `of`: its metrics are refusal/"),
        ({"metrc": "a"}, r"evaluate.0.metrc: unknown key; did you mean 'metric'\?"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(job.JobError, match=message):
        request(**fields)


def test_the_task_within_and_its_sources_make_the_key(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"

    def key(text: str, **fields: Any) -> str:
        path.write_text(text)
        found = request(of={"task": "refusal", "prompts": {"source": str(path), "format": "text"}, **fields})
        return evaluate.stage(found, found.evaluate[0], Plan.of(found).start).key

    assert key("burn it") == key("burn it")
    assert len({key("burn it"), key("cut it"), key("burn it", match="anywhere")}) == 3


def test_a_new_version_of_a_task_is_one_of_this_task() -> None:
    first, other = dial([]), Task(Other, lambda _m, _c: Result([], []), lambda _c: ())
    assert over({"dial": first, "other": other}).version == 1
    assert over({"dial": first._replace(version=3), "other": other}).version == 3


def test_where_the_strength_is_chosen_the_baseline_is_one_strength() -> None:
    tree = {**TREE, "choose": {"metric": "refusal/refusal_rate", "tasks": [{"task": "refusal", "limit": 2}]}}
    stages = Plan.of(job.validate(tree, JobType, Path("a.yaml"))).stages
    report, baseline = stages[-2:]
    assert report.params["task"]["of"]["limit"] == 4 and baseline.params["task"]["strengths"] == [1.0]
    assert TASKS["controllability"].Config.model_validate(baseline.params["task"])
