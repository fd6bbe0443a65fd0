"""What a space says about its result: bounds, prices, controls and predictions, and what the sweep makes of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.measures import Measure, likeness
from steerlab.evaluation.statistics.measures import share as share_of
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.job import JobError
from steerlab.storage.store import Store
from steerlab.sweeps import outcomes, results, space, trials
from steerlab.sweeps.space_rules import Bound, Prediction, Price, is_control

JOB = {
    "name": "rules",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 64}},
    "method": {"name": "aside"},
    "train": {"steps": 2, "micro_batch": 4, "max_tokens": 64},
    "evaluate": [
        {"task": "separation", "source": "tiny:separation/test", "limit": 8},
        {"task": "perplexity", "source": "tiny:instructions/test", "limit": 8},
        {"task": "preference", "pairs": {"source": "tiny:preferences/test", "format": "preference"}, "limit": 8},
    ],
}
SPACE = """
from ray import tune
SPACE = {"method.angle_rad": tune.grid_search([0.0, 1.0]), "train.lr": tune.grid_search([1e-3, 1e-2])}
METRIC = "separation/sep"
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def planned(folder: Path, text: str) -> trials.SweepPlan:
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    (folder / "space.py").write_text(SPACE + text)
    return trials.plan(folder / "job.yaml", (), space.load(folder / "space.py"))


def test_bounds_and_prices_take_their_direction_from_the_task(tmp_path: Path) -> None:
    text = 'WITHIN = {"separation/utility": 0.9, "perplexity/value": 3}\nPRICES = ["perplexity/value", "separation/utility"]'
    plan = planned(tmp_path, text)
    assert plan.bounds == (Bound("separation/utility", 0.9, "higher"), Bound("perplexity/value", 3.0, "lower"))
    assert [str(bound) for bound in plan.bounds] == ["separation/utility at least 0.9", "perplexity/value at most 3"]
    assert plan.prices == (Price("perplexity/value", "lower"), Price("separation/utility", "higher"))
    described = plan.space.described()
    assert described["within"] == {"separation/utility": 0.9, "perplexity/value": 3.0}
    assert described["prices"] == ["perplexity/value", "separation/utility"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("WITHIN = 3", r"space\.py: WITHIN is a dict such as .*, not 3"),
        ('WITHIN = {"separation/sep": True}', r"WITHIN\['separation/sep'\] is True: give the name of a metric and a number"),
        ('WITHIN = {"separation/sep": float("nan")}', r"WITHIN\['separation/sep'\] is nan"),
        ('WITHIN = {"separation/sup": 1}', r"WITHIN separation/sup is not measured.*did you mean separation/sep"),
        ('WITHIN = {"preference/shorter": 1}', r"WITHIN preference/shorter: this metric has no better direction"),
        ('PRICES = "perplexity/value"', r"PRICES is a list of metrics"),
        ("PRICES = [1]", r"PRICES is a list of metrics"),
        ('PRICES = ["perplexity"]', r"PRICES perplexity is not measured"),
        ("PREDICTIONS = 1", r"PREDICTIONS is a list of dicts"),
        ("PREDICTIONS = [1]", r"PREDICTIONS\[0\]: .*an entry has the keys metric, over, expected"),
        ('PREDICTIONS = [{"metric": "separation/sep"}]', r"PREDICTIONS\[0\]\.over: Field required"),
        (
            'PREDICTIONS = [{"metric": "separation/sep", "over": "method.angle", "expected": "rises"}]',
            r"PREDICTIONS\[0\]: the space does not set 'method.angle'; did you mean method.angle_rad\?",
        ),
        (
            'PREDICTIONS = [{"metric": "separation/x", "over": "train.lr", "expected": "rises"}]',
            r"PREDICTIONS: separation/x is not measured",
        ),
        (
            'PREDICTIONS = [{"metric": "separation/sep", "over": "train.lr", "expected": "grows"}]',
            r"PREDICTIONS\[0\]\.expected: .*'rises', 'falls' or 'flat'",
        ),
        (
            'PREDICTIONS = [{"metric": "eval/loss", "over": "train.lr", "expected": "falls"}]',
            r"PREDICTIONS: eval/loss is not measured: it needs data.validation",
        ),
        ('WITHIN = {"eval/loss": 1.0}', r"WITHIN eval/loss is not measured: it needs data.validation"),
        (
            'PREDICTIONS = [{"metric": "separation/sep", "over": "train.lr", "expected": "rises", "between": [1e-3, 3e-3]}]',
            r"PREDICTIONS\[0\]\.between: train.lr is never 0.003; it is one of \[0.001, 0.01\]",
        ),
        (
            'PREDICTIONS = [{"metric": "separation/sep", "over": "train.lr", "expected": "rises", "between": ["a", "b"]}]',
            r"PREDICTIONS\[0\]\.between: train.lr is never a; it is one of \[0.001, 0.01\]",
        ),
        (
            'PREDICTIONS = [{"metric": "separation/sep", "over": "train.lr", "expected": "rises", '
            '"where": {"method.angle_rad": 2.0}}]',
            r"PREDICTIONS\[0\]\.where: method.angle_rad is never 2.0; it is one of \[0.0, 1.0\]",
        ),
        ('CONTROLS = [{"method.angle_rad": 3.0}]', r"CONTROLS\[0\]: method.angle_rad is never 3.0"),
        ("CONTROLS = {}", r"CONTROLS is a list of dicts"),
        ("CONTROLS = [{}]", r"CONTROLS is a list of dicts"),
        ('CONTROLS = [{"train.seed": 1}]', r"CONTROLS\[0\]: the space does not set 'train.seed'; did you mean train.lr"),
        ("PREDICTION = []", r"PREDICTION: unknown name; did you mean PREDICTIONS\?"),
    ],
)
def test_wrong_rules_are_refused_with_one_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        planned(tmp_path, text)


def row(name: str, metrics: dict[str, float], seed: int = 0, **params: Any) -> dict[str, Any]:
    measured = {f"metric.{key}": value for key, value in metrics.items()}
    keys = {f"key.evaluate.{key.partition('/')[0]}": name for key in metrics}
    values = {f"param.{key}": value for key, value in params.items()}
    return {"trial_id": name, "seed": seed, "status": "finished", "run": f"runs/{name}", **measured, **keys, **values}


def evaluated(store: Store, key: str, metric: str, values: np.ndarray) -> None:
    """Leave the artifact of an evaluation with these item values at strength 1."""
    observations = [Observation(metric, str(i), float(value)) for i, value in enumerate(values)]
    with store.temporary("evaluate", key) as directory:
        stored.write(directory, stored.Outcome(observations, metrics={1.0: {}}))
        store.commit("evaluate", key, directory, {})


def plan_of(mode: str = "max", **rules: Any) -> Any:
    controls = rules.pop("controls", ())
    return SimpleNamespace(
        metric="m/solved", mode=mode, space=SimpleNamespace(controls=controls), **{"bounds": (), "prices": (), **rules}
    )


def chosen(rows: list[dict[str, Any]], plan: Any, store: Store) -> tuple[str | None, list[str] | None]:
    scored = results.scored(rows, plan.metric)
    allowed = outcomes.candidates(scored, plan)
    top = results.best_of(allowed, plan.mode)
    if top is None:
        return None, None
    best, close = outcomes.chosen(top, allowed, scored, plan, store)
    return best.trial_id, close


def test_the_cheapest_of_the_trials_that_cannot_be_told_apart_is_chosen(store: Store) -> None:
    hard = np.random.default_rng(0).random(200)
    shares = {"top": 0.81, "near": 0.80, "far": 0.5, "control": 0.99, "broken": 0.82}
    for name, share in shares.items():
        evaluated(store, name, "m/solved", hard < share)
    costs = {"top": 9.0, "near": 2.0, "far": 1.0, "control": 0.0, "broken": 0.5}
    utility = {"broken": 0.2}
    rows = [
        row(name, {"m/solved": float((hard < share).mean()), "c/cost": costs[name], "u/use": utility.get(name, 1.0)}, kind=name)
        for name, share in shares.items()
    ]
    bound, price, controls = Bound("u/use", 0.9, "higher"), Price("c/cost", "lower"), ({"kind": "control"},)
    assert chosen(rows, plan_of(), store)[0] == "control"
    assert chosen(rows, plan_of(controls=controls), store)[0] == "broken"
    assert chosen(rows, plan_of(controls=controls, bounds=(bound,)), store)[0] == "top"
    best, close = chosen(rows, plan_of(controls=controls, bounds=(bound,), prices=(price,)), store)
    assert best == "near", "far is cheaper, but it can be told from the best value"
    assert close is not None and "top" in close and "far" not in close and "near" not in close
    # A price for which more is better, and one that a trial lacks.
    assert chosen(rows, plan_of(controls=controls, bounds=(bound,), prices=(Price("c/cost", "higher"),)), store)[0] == "top"
    del rows[1]["metric.c/cost"]
    assert chosen(rows, plan_of(controls=controls, bounds=(bound,), prices=(price,)), store)[0] == "top"


def test_no_trial_is_the_best_when_none_keeps_the_bound(store: Store) -> None:
    for name in ("a", "b"):
        evaluated(store, name, "m/solved", np.ones(4))
    rows = [row("a", {"m/solved": 0.5, "u/use": 0.8}), row("b", {"m/solved": 0.9})]
    assert chosen(rows, plan_of(bounds=(Bound("u/use", 0.9, "higher"),)), store) == (None, None)
    assert chosen(rows, plan_of(bounds=(Bound("u/use", 0.8, "lower"),)), store)[0] == "a", "a bound includes its value"


def test_a_bound_is_kept_in_the_mean_over_seeds() -> None:
    rows = [row("a", {"m/solved": 0.5, "u/use": use}, seed) for seed, use in enumerate((0.7, 1.0, 1.0))]
    (trial,) = results.scored(rows, "m/solved")
    assert outcomes.keeps(trial, Bound("u/use", 0.9, "higher"))
    assert not outcomes.keeps(trial, Bound("u/use", 0.91, "higher"))


def test_seeds_that_change_nothing_are_told() -> None:
    """A training whose steps take all rows has the same patch with each seed, to the rounding of sums in another order."""

    def rows(*values: tuple[str, float]) -> list[dict[str, Any]]:
        return [row(name, {"m/solved": value, "u/use": 0.5}, seed) for seed, (name, value) in enumerate(values)]

    same = rows(("a", 0.25), ("a", 0.25), ("b", 0.75), ("b", 0.75 + 1e-7))
    (warning,) = results.warnings_of(same)
    assert warning.startswith("no metric of any trial differs between its 2 seeds")
    assert results.warnings_of(rows(("a", 0.25), ("a", 0.25), ("b", 0.75), ("b", 0.76))) == [], "one trial differs"
    assert results.warnings_of(rows(("a", 0.25), ("b", 0.25))) == [], "one seed each"
    assert results.warnings_of([]) == []
    assert results.warnings_of([*same, *rows(("c", 0.5))]) == [], "a trial has one seed so far"
    assert results.warnings_of(rows(("a", 0.0), ("a", 1e-12))), "a number that is 0 but for rounding"
    assert results.warnings_of([{"trial_id": "a", "status": "finished", "seed": seed} for seed in (0, 1)]) == []
    del same[1]["metric.u/use"]
    assert results.warnings_of(same) == [], "a metric is missing with one seed"
    failed = rows(("a", 0.25), ("a", 0.25))
    failed[1]["status"] = "failed"
    assert results.warnings_of(failed) == [], "a failed trial has no number to compare"


def test_a_control_has_all_values_of_one_entry() -> None:
    controls = [{"a": 1, "b": "x"}, {"c": None}]
    assert is_control({"a": 1, "b": "x", "d": 2}, controls) and is_control({"c": None}, controls)
    assert not is_control({"a": 1, "b": "y"}, controls)
    assert not is_control({"a": 1}, [])


def no_measure(name: str) -> None:
    """Describe no metric, as for a loss."""


def prediction(expected: str, **more: Any) -> Prediction:
    return Prediction.model_validate({"metric": "m/solved", "over": "ratio", "expected": expected, **more})


def test_predictions_are_held_against_paired_differences(store: Store) -> None:
    hard = np.random.default_rng(1).random(300)
    rows = []
    for name, ratio, kind, share in (("a", 0.0, "x", 0.9), ("b", 0.1, "x", 0.8), ("c", 0.5, "x", 0.4), ("d", 0.0, "y", 0.6),
                                     ("e", 0.5, "y", 0.6)):  # fmt: skip
        evaluated(store, name, "m/solved", hard < share)
        rows.append(row(name, {"m/solved": float((hard < share).mean())}, ratio=ratio, kind=kind))
    rows.append({**row("f", {"m/solved": 1.0}, ratio=0.9, kind="x"), "status": "failed"})

    def outcome(expected: str, **more: Any) -> outcomes.Outcome:
        return outcomes.outcomes([prediction(expected, **more)], rows, store, lambda name: share_of("solved", "higher"))[0]

    falls = outcome("falls", where={"kind": "x"}, because="why")
    assert (falls["ends"], falls["held"], falls["because"]) == ([0.0, 0.5], True, "why")
    assert falls["difference"] == pytest.approx(float((hard < 0.4).mean() - (hard < 0.9).mean()))
    assert falls["low"] is not None and falls["high"] is not None and falls["low"] < falls["difference"] < falls["high"] < 0
    assert outcome("rises", where={"kind": "x"})["held"] is False
    assert outcome("flat", where={"kind": "x"})["held"] is False
    assert outcome("flat", where={"kind": "y"})["held"] is True
    assert outcome("falls", where={"kind": "y"})["held"] is None, "a difference of 0 shows nothing"
    assert outcome("falls", where={"kind": "x"}, between=[0.0, 0.1])["ends"] == [0.0, 0.1]
    # Two texts: at the same ratio, kind y has 0.3 less than x at 0, and 0.2 more at 0.5.
    kinds = {"metric": "m/solved", "over": "kind", "between": ["x", "y"], "expected": "falls", "where": {"ratio": 0.0}}
    (over_kind,) = outcomes.outcomes([Prediction.model_validate(kinds)], rows, store, no_measure)
    assert (over_kind["ends"], over_kind["held"]) == (["x", "y"], True)
    assert over_kind["values"] == pytest.approx([(hard < 0.9).mean(), (hard < 0.6).mean()])
    # Without `where`, each setting is compared with itself: x falls by 0.5 and y does not.
    both = outcome("falls")
    assert both["difference"] == pytest.approx((falls["difference"] or 0.0) / 2)
    assert both["values"] == pytest.approx(
        [((hard < 0.9).mean() + (hard < 0.6).mean()) / 2, ((hard < 0.4).mean() + (hard < 0.6).mean()) / 2]
    )
    missing = outcome("falls", where={"kind": "z"})
    assert (missing["ends"], missing["difference"], missing["held"]) == ([], None, None)
    half = outcome("falls", where={"kind": "x"}, between=[0.0, 0.3])
    assert (half["values"], half["difference"], half["held"]) == ([None, None], None, None)


@pytest.mark.parametrize(
    ("spread", "more", "verdict"),
    [
        (0.01, {}, True),
        (0.2, {}, None),  # an interval of about half of the range contains 0, and much else
        (0.2, {"margin": 0.6}, True),
        (0.01, {"margin": 0.005}, None),
    ],
)
def test_flat_needs_an_interval_that_is_narrow(store: Store, spread: float, more: dict[str, Any], verdict: bool | None) -> None:
    shifts = (-spread, 0.0, spread)
    rows = [row("a", {"m/solved": 0.5}, seed, ratio=0.0) for seed in range(3)]
    rows += [row("b", {"m/solved": 0.5 + shift}, seed, ratio=1.0) for seed, shift in enumerate(shifts)]

    def outcome(expected: str, measure: Any, **asked: Any) -> outcomes.Outcome:
        return outcomes.outcomes([prediction(expected, **asked)], rows, store, lambda name: measure)[0]

    bounded = outcome("flat", share_of("solved", "higher"), **more)
    assert bounded["held"] is verdict and bounded["margin"] == more.get("margin", 0.1)
    # Other metrics, with and without a range: a tenth of the first value, 0.05; without one nothing can be said.
    free = outcome("flat", Measure("solved", None), **more)
    assert free["margin"] == more.get("margin", pytest.approx(0.05))
    assert outcome("flat", likeness("solved"), **more)["margin"] == free["margin"]
    at_zero = [{**one, "metric.m/solved": one["metric.m/solved"] - 0.5} for one in rows]
    assert outcomes.outcomes([prediction("flat")], at_zero, store, lambda name: None)[0]["margin"] is None
    assert outcome("flat", None, **more)["margin"] == free["margin"]
    assert outcome("rises", share_of("solved", "higher"))["margin"] is None
    # A difference of 0.005 that can be told from 0 is smaller than what counts as none.
    close = [*rows[:3], *({**one, "metric.m/solved": 0.505} for one in rows[3:])]
    (tiny,) = outcomes.outcomes([prediction("flat")], close, store, lambda name: share_of("solved", "higher"))
    assert tiny["low"] is not None and tiny["low"] > 0 and tiny["held"] is True
    for one in rows[3:]:
        one["metric.m/solved"] += 0.4
    assert outcome("flat", share_of("solved", "higher"))["held"] is (False if spread < 0.1 else None)


def test_a_margin_belongs_to_flat() -> None:
    with pytest.raises(ValueError, match="margin belongs to flat; rises asks whether there is any difference"):
        prediction("rises", margin=0.1)
    with pytest.raises(ValueError, match="greater than 0"):
        prediction("flat", margin=0)


def test_intervals_over_seeds_stay_in_the_range_of_the_metric(store: Store) -> None:
    """Student's t of three shares near 1 reaches beyond 1, and a difference of shares beyond -1."""
    high, low = (1.0, 0.9, 1.0), (0.0, 0.1, 0.0)
    rows = [row("a", {"m/solved": value}, seed, ratio=0.0) for seed, value in enumerate(high)]
    rows += [row("b", {"m/solved": value}, seed, ratio=1.0) for seed, value in enumerate(low)]
    measure = share_of("solved", "higher")
    free, bounded = (results.scored(rows, "m/solved", one)[0] for one in (None, measure))
    assert free.high is not None and free.high > 1 and (bounded.low, bounded.high) == (free.low, 1.0)
    assert results.scored(rows, "m/solved", measure)[1].low == 0.0
    assert results.metrics_of_rows(rows[:3], lambda name: measure)["m/solved"]["high"] == 1.0
    (outcome,) = outcomes.outcomes([prediction("falls")], rows, store, lambda name: measure)
    assert outcome["low"] == -1.0 and outcome["held"] is True


def test_predictions_over_seeds_use_the_spread_of_paired_seeds(store: Store) -> None:
    luck = {0: 0.0, 1: 0.3, 2: -0.2}
    rows = [row("a", {"m/solved": 0.4 + luck[seed]}, seed, ratio=0.0) for seed in luck]
    rows += [row("b", {"m/solved": 0.5 + luck[seed] + 0.001 * seed}, seed, ratio=1.0) for seed in luck]
    (outcome,) = outcomes.outcomes([prediction("rises")], rows, store, no_measure)
    assert outcome["held"] is True and outcome["difference"] == pytest.approx(0.101)
    noisy = [
        {**one, "metric.m/solved": one["metric.m/solved"] + shift}
        for one, shift in zip(rows, [0] * 3 + [0.5, -0.6, 0.1], strict=True)
    ]
    assert outcomes.outcomes([prediction("rises")], noisy, store, no_measure)[0]["held"] is None
