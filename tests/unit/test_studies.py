"""The studies of jobs/ ask for jobs that could start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerlab import job, run
from steerlab.data import rows
from steerlab.stages import JobType, Plan

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def preferences(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(JOBS))
    import preferences

    return preferences


@pytest.fixture
def protection(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(JOBS))
    import protection

    return protection


@pytest.fixture
def steering(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(JOBS))
    import steering

    return steering


@pytest.mark.parametrize("pair", ["toxicity", "sentiment"])
def test_no_text_of_the_steering_study_is_in_two_parts_of_a_seed(steering: Any, pair: str) -> None:
    """What is fitted on, chosen on and reported on; another seed has other texts to fit on."""
    fitted = []
    for seed in (0, 1):
        jobs = steering.wanted(pair, steering.split(seed))
        one = jobs["mean_act"]
        parts = [one.data.source, one.choose.tasks[0].prompts, one.evaluate[0].prompts]
        texts = [[str(row["text"]) for row in rows.read(part)] for part in parts]
        assert [len(part) for part in texts[:2]] == [32, 64] and len(texts[2]) > 200
        assert len({text for part in texts for text in part}) == sum(map(len, texts))
        neutral = [one.choose.tasks[1].data, one.evaluate[1].data]
        assert {part.shuffle for part in (*parts, *neutral, one.data.target)} == {seed}
        fitted.append(texts[0])
    assert set(fitted[0]) != set(fitted[1])


def test_the_wording_of_a_prompt_is_chosen_on_the_rows_that_choose_strengths(steering: Any) -> None:
    one = steering.wanted("toxicity", steering.split(2))["mean_act"]
    for development, tasks in ((True, one.choose.tasks), (False, one.evaluate)):
        made = steering.prompted("toxicity", "prompt", "be kind. ", steering.split(2), development=development)
        assert made.evaluate == tasks and made.method.prefix == "be kind. " and made.choose is None
        assert steering.prompted("toxicity", "prompt", "", steering.split(2), development=development).method.name == "none"
    assert steering.best({"": 0.2, "a": 0.1, "b": 0.1}, "min") == "a" and steering.best({"": 0.2, "a": 0.1}, "max") == ""
    assert steering.best({"": None, "a": 0.1}, "max") == "a"
    examples = steering.prefixes("toxicity", "few-shot", one)
    target = [str(row["text"]) for row in rows.read(one.data.target)]
    assert examples[0] == f"{target[0]}\n\n{target[1]}\n\n" and examples[2].count("\n\n") >= 8
    inverse = steering.wanted("sentiment", [])[steering.INVERSE]
    assert inverse.inverse and inverse.choose.mode == "min"


def test_lines_of_the_protection_study_differ_in_what_they_name(protection: Any) -> None:
    variants = protection.variants((0.05,), 0.1)
    found = {variant.group: protection.wanted("tiny", variant, 7, "train", []) for variant in variants}
    for name in found.keys() - {"before", "safety rows mixed in"}:  # which read more rows than the others
        run.check(Plan.of(found[name]))
    assert found["before"].name == "tiny-safety" and {found[name].train.seed for name in found.keys() - {"before"}} == {7}
    safety = found["eigenvectors"].data.by_role["safety"]
    (mixed,) = found["safety rows mixed in"].data.train.also
    assert mixed.source == safety.source and mixed.limit == (safety.limit or 100) // 2
    assert all("safety" not in found[name].data.by_role for name in ("full fine-tuning", "safety rows mixed in"))
    assert found["selected layers, half way"].evaluate[0].strengths == (1.0, 0.5)
    settings = {name: one.method.model_dump() for name, one in found.items() if one.method.name == "warp"}
    assert {one["seed"] for one in settings.values()} == {7} and {one["others"] for one in settings.values()} == {"train"}
    shown = {name: (one["rotation"], one["mask"], one["keep_ratio"]) for name, one in settings.items()}
    assert shown == {
        "selected layers, half way": ("none", "importance", 0.0),
        "eigenvectors": ("safety", "importance", 0.05),
        "no rotation": ("none", "importance", 0.05),
        "random rotation": ("random", "importance", 0.05),
        "random mask": ("safety", "random", 0.1),
        "magnitude mask": ("safety", "magnitude", 0.1),
    }


def test_every_variant_trains_in_bfloat16_and_is_evaluated_in_float32(preferences: Any) -> None:
    for variant in preferences.VARIANTS:
        (plain, two) = (preferences.wanted("tiny", variant, 3, [], dtype) for dtype in (None, "bfloat16"))
        run.check(Plan.of(two))
        below = job.base_job(two, JobType)
        assert below is not None
        assert (plain.model.dtype, two.model.dtype, below.model.dtype) == ("float32", "float32", "bfloat16")
        assert two.evaluate == plain.evaluate and not below.evaluate
        assert (below.method, below.train, two.train) == (plain.method, plain.train, None)
        assert below.train.seed == 3


def test_alphas_are_those_that_were_measured(preferences: Any) -> None:
    variant = preferences.VARIANTS[0]
    one = preferences.wanted("tiny", variant, 0, ["evaluate.0.strengths=[1,0.25]"], None)
    assert one.evaluate[0].strengths == (1.0, 0.25)
    assert preferences.alphas_of([{1.0: {}, 0.0: {}, 0.25: {}}]) == [0.25, 1.0]
