"""What holds for every task of the table: rows that do not fit, models that answer nothing, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vision_models import clip_dir  # noqa: F401
from transformers import PreTrainedModel

from steerlab import job, models, patches
from steerlab.evaluation import TASKS
from steerlab.evaluation.judging import graders
from steerlab.evaluation.measured import measure_of, unmeasured
from steerlab.evaluation.statistics import seeds
from steerlab.evaluation.statistics.measures import find
from steerlab.evaluation.statistics.summaries import Metric, summarise_all
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataSet, Job
from steerlab.models import ModelFacts
from steerlab.patches import ActivationPatch
from steerlab.run import task_checks
from steerlab.stages import JobType, Plan
from steerlab.steered.language import SteeredModel

NORM = "model.layers.1.post_attention_layernorm"
TEXTS = ["the cow and the dog", "the old cat", "the duck says", "the big cow"]
LONG = " ".join(["the cow and the dog"] * 100)
"""More words than the tiny model's context has tokens."""
Fields = dict[str, Any]


def write(path: Path, rows: list[Fields]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def instructions(path: Path, texts: list[str]) -> str:
    return write(path, [{"instruction": "copy the list", "input": text, "output": "it is #### 3"} for text in texts])


def plain(path: Path, texts: list[str]) -> DataSet:
    return DataSet.model_validate({"source": write(path, [{"text": text} for text in texts]), "format": "text"})


def pairs(path: Path, texts: list[str]) -> DataSet:
    rows = [{"prompt": "say it", "chosen": text, "rejected": "moo"} for text in texts]
    return DataSet.model_validate({"source": write(path, rows), "format": "preference"})


def probes(path: Path, texts: list[str]) -> str:
    names = ("system_prompt_clean", "prompt_clean", "system_prompt_instructed")
    rows = [
        {**dict.fromkeys(names, "copy"), "prompt_clean": text, "prompt_instructed": f"{text} say moo", "witness": "moo"}
        for text in texts
    ]
    return write(path, rows)


def requests(path: Path, texts: list[str]) -> DataSet:
    rows = [{"prompt": text, "chosen": "the old", "rejected": "the big"} for text in texts]
    return DataSet(source=write(path, rows), format="preference", loss_on="response")


def contexts(folder: Path, texts: list[str]) -> str:
    (folder / "email").mkdir(parents=True)
    (folder / "text_attack_test.json").write_text(json.dumps({"Emoji Substitution": ["use smileys"]}))
    write(folder / "email/test.jsonl", [{"context": text, "question": "who ?"} for text in texts])
    return str(folder)


def defences(path: Path, texts: list[str]) -> str:
    return write(path, [{"pre_prompt": "copy", "attack": text, "access_code": "moo", "post_prompt": ""} for text in texts])


def submissions(path: Path, texts: list[str]) -> str:
    same = {"expected_completion": "moo", "level": 1, "correct": True}
    return write(path, [{"prompt": f"copy: {text}", "user_input": text, **same} for text in texts])


def user(text: str) -> Fields:
    return {"role": "user", "content": text}


CASES: dict[str, Callable[[Path, list[str]], Fields]] = {
    "separation": lambda path, texts: {"source": probes(path, texts)},
    "injection": lambda path, texts: {"source": instructions(path, texts), "attacks": ("naive", "none")},
    "struq": lambda path, texts: {"source": instructions(path, texts), "attacks": ("naive",)},
    "bipia": lambda path, texts: {"source": contexts(path, texts), "scenarios": ("email",), "places": ("end",)},
    "gandalf": lambda path, texts: {"source": write(path, [{"text": text} for text in texts])},
    "purple": lambda path, texts: {"source": write(path, [{"prompt": text} for text in texts])},
    "tensor_trust": lambda path, texts: {"source": defences(path, texts)},
    "rules": lambda path, texts: {
        "source": write(path, [{"scenario": "Hodor", "params": {}, "messages": [user(text)]} for text in texts]),
        "scenarios": ("Hodor",),
    },
    "hackaprompt": lambda path, texts: {"source": submissions(path, texts), "levels": (1,)},
    "perplexity": lambda path, texts: {"data": plain(path, texts)},
    "preference": lambda path, texts: {"pairs": pairs(path, texts)},
    "token_effect": lambda path, texts: {"data": pairs(path, texts)},
    "probing": lambda path, texts: {
        "source": instructions(path, texts),
        "separation_source": probes(path.with_suffix(".sep.jsonl"), texts),
        "epochs": 1,
    },
    "attention_by_role": lambda path, texts: {"source": instructions(path, texts)},
    "instruction_concept": lambda path, texts: {
        "source": instructions(path, texts),
        "separation_source": probes(path.with_suffix(".sep.jsonl"), texts),
    },
    "alpaca": lambda path, texts: {"source": instructions(path, texts)},
    "toxicity": lambda path, texts: {"prompts": plain(path, texts)},
    "sentiment": lambda path, texts: {"prompts": plain(path, texts), "prompt_words": None},
    "concept": lambda path, texts: {"prompt": texts, "samples": 1, "concept": "a", "words": ("a",), "embedding_source": None},
    "refusal": lambda path, texts: {"prompts": plain(path, texts), "harmless": plain(path.with_suffix(".b.jsonl"), texts)},
    "math": lambda path, texts: {"prompts": {"source": instructions(path, texts)}},
    "win_rate": lambda path, texts: {
        "prompts": plain(path, texts),
        "implicit_source": str(path.parent / "policy"),
    },
    "tiny_sentences": lambda path, texts: {"prompt": texts, "samples": 1},
    "tiny_answers": lambda path, texts: {"pairs": requests(path, texts)},
    "mt_bench": lambda path, texts: {
        "source": write(path, [{"turns": [text, "say more"]} for text in texts]),
        "judge_source": str(path.parent / "policy"),
    },
    "axbench": lambda path, texts: {
        "prompts": {"source": instructions(path, texts)},
        "concept": "a",
        "judge_source": str(path.parent / "policy"),
    },
    "controllability": lambda path, texts: {
        "of": {"task": "perplexity", "data": plain(path, texts).model_dump()},
        "metric": "perplexity/value",
    },
}
"""A task -> fields of its config over rows made of texts; lm_eval has its own tests, the others that are missing no rows."""
SCORED_AS_THEY_ARE = ("perplexity", "preference", "token_effect", "controllability", "attention_by_role", "instruction_concept")
"""Tasks that score given texts: nothing is answered."""


def test_every_task_over_texts_is_tested() -> None:
    texts = {name for name, task in TASKS.items() if task.kinds == ("causal_lm",)}
    assert set(CASES) == texts - {"efficiency", "lm_eval", "embedding_shift"}


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge of tasks that grade in writing: their own tests ask real ones."""
    monkeypatch.setattr(graders, "judge_of", lambda config, device: lambda questions: ["[[2]]"] * len(questions))


@pytest.fixture
def steered(tiny_model: PreTrainedModel, encoder: Encoder, tmp_path: Path) -> SteeredModel:
    patch = ActivationPatch({NORM: tiny_model.config.hidden_size})
    with torch.no_grad():
        patch.maps[0].scale.fill_(-3.0)
    folder = tmp_path / "policy"
    models.save_model(tiny_model, encoder.tokenizer, folder / "model")
    patches.save(patch, folder / "patch", models.fingerprint(tiny_model))
    (folder / "prompt.json").write_text(json.dumps(encoder.spec))
    return SteeredModel(tiny_model, encoder, (patch,))


def config_of(name: str, path: Path, texts: list[str], **more: Any) -> Any:
    fields = {"strengths": (1.0, 0.0), **CASES[name](path, texts), **more}
    if "max_new_tokens" in TASKS[name].Config.model_fields:
        fields["max_new_tokens"] = 2
    return TASKS[name].Config.model_validate(fields)


def near(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else a == pytest.approx(b, rel=1e-3, abs=1e-6)


def measured(model: SteeredModel, name: str, path: Path, texts: list[str]) -> dict[float, dict[str, Metric]]:
    return summarise_all(TASKS[name].run(model, config_of(name, path, texts)))


@pytest.mark.parametrize("name", CASES)
def test_a_row_that_is_too_long_costs_that_row(name: str, steered: SteeredModel, tmp_path: Path) -> None:
    """The others are scored as without it, and it is counted: in every metric that it would have been part of."""
    whole = measured(steered, name, tmp_path / "whole.jsonl", TEXTS)
    found = measured(steered, name, tmp_path / "long.jsonl", [*TEXTS, LONG])
    assert found.keys() == whole.keys()
    config = config_of(name, tmp_path / "more.jsonl", TEXTS)
    assert [metric for metric in found[1.0] if unmeasured(metric, (config,))] == [], "a choice may go by each of them"
    for strength, metrics in found.items():
        assert metrics.keys() == whole[strength].keys()
        for metric, value in metrics.items():
            assert value.too_long == 1, metric
            if "layer_" not in metric and "concept_accuracy" not in metric:  # probes are trained anew on other rows
                same = whole[strength][metric]
                assert value.n == same.n and near(value.value, same.value), metric


BETTER: dict[str, dict[str, str | None]] = {
    "separation": {"sep": "higher", "utility": "higher", "executed_in_data": "lower", "LEGIBLE": None},
    "injection": {"naive": "lower", "none": None, "asr": "lower", "LEGIBLE": None},
    "struq": {
        "naive_id": "lower",
        "asr_id": "lower",
        "LEGIBLE_id": None,
        "naive_ood": "lower",
        "asr_ood": "lower",
        "LEGIBLE_ood": None,
    },
    "bipia": {"email": "lower", "text": "lower", "LEGIBLE": None},
    "gandalf": {"asr": "lower", "LEGIBLE": None},
    "purple": {"asr": "lower", "LEGIBLE": None},
    "tensor_trust": {"asr": "lower", "LEGIBLE": None},
    "rules": {"asr": "lower", "Hodor": "lower", "LEGIBLE": None},
    "hackaprompt": {"asr": "lower", "level_1": "lower", "LEGIBLE": None},
    "perplexity": {"value": "lower"},
    "preference": {
        "accuracy": "higher",
        "margin": "higher",
        "likelihood_accuracy": "higher",
        "kl": "lower",
        "shorter": None,
        "chosen_logp": "higher",
        "rejected_logp": None,
        "chosen_reward": "higher",
        "rejected_reward": None,
    },
    "probing": {
        "layer_*": "higher",
        "concept_accuracy": "higher",
        "probe_as_instruction": "lower",
        "executed_rotated": "lower",
        "executed_unrotated": None,
        "LEGIBLE": None,
        "cosine_layer_*": "lower",
    },
    "attention_by_role": {
        **dict.fromkeys(f"{part}{end}" for part in ("instruction", "data", "response", "other") for end in ("", "_layer_*")),
        "instruction_density_layer_*": None,
        "data_density_layer_*": None,
    },
    "instruction_concept": {
        "activation_injected": "lower",
        "activation_clean": "lower",
        "injected_above_clean": "lower",
        "active_injected": "lower",
        "active_clean": "lower",
        "accuracy": "higher",
    },
    "alpaca": {"response_tokens": None, "LEGIBLE": None},
    "toxicity": {"share": "lower", "score": "lower", "CUT": None, "FLUENCY": None},
    "sentiment": {"score": None, "positive": None, "negative": None, "CUT": None, "FLUENCY": None},
    "concept": {"words": "higher", "CUT": None, "FLUENCY": None},
    "refusal": {
        "attack_success": "lower",
        "refusal_rate": "higher",
        "LEGIBLE": None,
        "over_refusal": "lower",
        "LEGIBLE_harmless": None,
    },
    "math": {"accuracy": "higher", "solved": "higher", "LEGIBLE": None},
    "token_effect": {"norm": None, "kl": "lower"},
    "win_rate": {
        "implicit": "higher",
        "ties": None,
        "longer": None,
        "answer_tokens": None,
        "opponent_tokens": None,
        "LEGIBLE": None,
    },
    "tiny_sentences": {"sentence": "higher", "coherent": "higher", "about": "higher", "CUT": None},
    "tiny_answers": {"right": "higher", "win_rate": "higher", "form": "higher", "LEGIBLE": None},
    "mt_bench": {"score": "higher", "turn_1": "higher", "turn_2": "higher", "LEGIBLE": None},
    "axbench": {"score": "higher", "concept": "higher", "instruction": "higher", "fluency": "higher", "LEGIBLE": None},
    "controllability": {"value": "lower", "tau": "lower", "slope": "lower"},
}
"""Which way is better, once more and by hand: the page sets the best in bold by it, and sweeps go that way."""
LEGIBLE = {"empty": "lower", "unfinished": "lower", "repetition": "lower", "letters": "higher"}
FLUENCY = {"distinct_1": "higher", "distinct_2": "higher", "distinct_3": "higher", "base_perplexity": "lower"}


@pytest.mark.parametrize("name", CASES)
def test_a_task_says_what_it_measures(name: str, steered: SteeredModel, tmp_path: Path) -> None:
    """What it says it reports, and nothing else; values and intervals lie in the ranges that it says."""
    config = config_of(name, tmp_path / "rows.jsonl", TEXTS)
    said = TASKS[name].measures(config)
    expected: dict[str, str | None] = {}
    for metric, better in BETTER[name].items():
        kind, _, suffix = metric.partition("_")
        if kind in ("LEGIBLE", "CUT"):
            expected |= {f"{one}_{suffix}" if suffix else one: way for one, way in LEGIBLE.items()}
            expected |= {"unfinished": None} if kind == "CUT" else {}
        else:
            expected |= FLUENCY if kind == "FLUENCY" else {metric: better}
    assert {measure.name: measure.better for measure in said} == expected
    found = summarise_all(TASKS[name].run(steered, config))
    reported = {metric.partition("/")[2] for metrics in found.values() for metric in metrics}
    assert all(find(said, metric) is not None for metric in reported), reported
    assert [one.name for one in said if not any(find([one], metric) for metric in reported)] == [], "said, but not reported"
    for metric, value in ((m, v) for metrics in found.values() for m, v in metrics.items()):
        measure = find(said, metric.partition("/")[2])
        assert measure is not None
        for number in (value.value, value.low, value.high):
            assert number is None or measure.low is None or number >= measure.low - 1e-6, metric
            assert number is None or measure.high is None or number <= measure.high + 1e-6, metric
        assert unmeasured(metric, (config,)) is None


@pytest.mark.parametrize("name", [name for name in CASES if name != "controllability"])  # it has the seeds of its own task
def test_every_seed_takes_the_rows_of_the_first(name: str, steered: SteeredModel, tmp_path: Path) -> None:
    """With other rows for each seed, items would not be the same, and the interval would be over too many of them."""
    config = config_of(name, tmp_path / "rows.jsonl", TEXTS, limit=1, seeds=(1, 2, 3, 4))
    of_seed = [{o.id for o in result.observations} for result in seeds.run(TASKS[name], steered, config)]
    assert of_seed[0] and all(ids == of_seed[0] for ids in of_seed), of_seed


def test_a_misspelt_metric_is_answered_with_the_right_one(tmp_path: Path) -> None:
    for name in CASES:
        config = config_of(name, tmp_path / f"{name}.jsonl", TEXTS)
        first = next(measure.name for measure in TASKS[name].measures(config) if "*" not in measure.name)
        assert (said := unmeasured(f"{name}/{first}x", (config,))) is not None and f"did you mean {name}/{first}?" in said
        assert measure_of(f"{name}/{first}", (config,)) is not None and measure_of("other/x", (config,)) is None


@pytest.mark.parametrize("name", CASES)
def test_a_task_whose_rows_are_all_too_long_scores_nothing_and_says_so(
    name: str, steered: SteeredModel, tmp_path: Path
) -> None:
    texts = [f"{LONG} {number}" for number in range(2)]
    found = measured(steered, name, tmp_path / "long.jsonl", texts)
    assert list(found) == [1.0, 0.0]
    metrics = {key: value for metrics in found.values() for key, value in metrics.items()}
    assert metrics and all(value.value is None and value.n == 0 for value in metrics.values())
    assert all(value.too_long for value in metrics.values())


@pytest.mark.parametrize("name", [name for name in CASES if name not in SCORED_AS_THEY_ARE])
def test_answers_without_a_word_have_a_share_of_their_own(name: str, steered: SteeredModel, tmp_path: Path) -> None:
    def end(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([steered.encoder.eos_id]), 1e6)

    before = measured(steered, name, tmp_path / "talks.jsonl", TEXTS)[1.0]
    handle = steered.model.lm_head.register_forward_hook(end)
    silent = measured(steered, name, tmp_path / "silent.jsonl", TEXTS)[1.0]
    handle.remove()
    shares = {metric: value for metric, value in silent.items() if "/empty" in metric}
    assert shares and all(value.value == 1 and value.n > 0 for value in shares.values())
    assert all(before[metric].value < 1 for metric in shares)  # type: ignore[operator]


# Before the start

FACTS = ModelFacts("Llama", 8, 2, 100, 1000, 256, True)
PIPELINE = replace(FACTS, kind="diffusion", max_positions=0)
SMALL = {"source": "pixels:digits/test", "format": "image", "field": "label", "limit": 4}
IMAGES: Fields = {"data": {"source": "tiny:topics/test", "format": "text", "seeds": [0, 2]}}
DRAWN: dict[str, Fields] = {
    "image_concept": {"concept": "3", "classifier": SMALL, "held_out": SMALL},
    "image_similarity": {"classifier": SMALL, "embedding_source": "."},
    "diversity": {"classifier": SMALL},
    "clip_score": {"clip_source": "."},
}


def job_of(*tasks: Fields, **more: Any) -> Job:
    tree = {"name": "a", "model": {"source": "tiny:model"}, "method": {"name": "none"}, "evaluate": list(tasks), **more}
    return job.validate(tree, JobType, Path("a.yaml"))


def first_metric(task: Fields) -> str:
    """A metric that a task reports."""
    said = TASKS[task["task"]].measures(TASKS[task["task"]].Config.model_validate(task))
    return f"{task['task']}/{said[0].name.replace('*', '01')}"


def check(wanted: Job, facts: ModelFacts = FACTS) -> None:
    task_checks.check_tasks(Plan.of(wanted))
    task_checks.check_named(wanted, facts)


def put_into(tree: Any, path: str, value: str) -> None:
    """Set one value in place; numbers address items of lists."""
    *parents, last = path.split(".")
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    tree[int(last) if isinstance(tree, list) else last] = value


def named_by(config: Any, prefix: str = "") -> list[str]:
    """The paths of all that a config names: data sets, sources of rows (where no `data` replaces them) and of models."""
    found = []
    for name, value in config:
        if isinstance(value, DataSet):
            found.append(f"{prefix}{name}.source")
        elif isinstance(value, job.Frozen):
            found += named_by(value, f"{prefix}{name}.")
        elif name.endswith("source") and value is not None and getattr(config, "data", None) is None:
            found.append(f"{prefix}{name}")
    return found


@pytest.mark.parametrize("name", [*CASES, *DRAWN])
def test_whatever_a_task_names_is_looked_for_before_the_start(
    name: str, steered: SteeredModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Rows, judges, scorers: by their fields, defaults and tasks within others included."""
    fields = (
        {**IMAGES, **DRAWN[name]} if name in DRAWN else {**CASES[name](tmp_path / "rows.jsonl", TEXTS), "strengths": (1.0,)}
    )
    if name in DRAWN and name != "image_concept":
        source = request.getfixturevalue("clip_dir") if name == "clip_score" else tmp_path / "policy/model"
        fields["embedding_source" if name == "image_similarity" else "clip_source"] = str(source)
    fields = {key: value for key, value in fields.items() if key in TASKS[name].Config.model_fields}
    if "max_new_tokens" in TASKS[name].Config.model_fields:
        fields["max_new_tokens"] = 2
    config = TASKS[name].Config.model_validate(fields)
    tree = config.model_dump(mode="json")
    facts = PIPELINE if name in DRAWN else FACTS
    check(job_of(tree), facts)
    paths = named_by(config)
    assert paths or name in ("concept", "tiny_sentences")
    for path in paths:
        changed = json.loads(json.dumps(tree))
        put_into(changed, path, "nowhere/at/all.jsonl")
        with pytest.raises(ValueError, match=rf"^evaluate\.0\.{path.removesuffix('.source')}.*nowhere"):
            check(job_of(changed), facts)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"task": "toxicity", "scorer_source": "MODEL", "toxic_label": "rude"},
            r"scorer_source: .* no class 'rude'; its",
        ),
        ({"task": "refusal", "classifier_source": "MODEL"}, r"classifier_source: .* no class 'REJECTION'"),
        ({"task": "concept", "concept": "a", "judge_source": "MODEL"}, r"judge_source: .* no single token for Yes"),
        ({"task": "lm_eval", "name": "mmlu"}, r"task: lm_eval needs a package .*pip install 'steerlab\[lm_eval\]'"),
        ({"task": "separation"}, r"max_new_tokens 1024: the context of Llama holds 256 tokens"),
        (
            {"task": "controllability", "strengths": [1], "of": {"task": "math"}, "metric": "math/solved"},
            r"of\.max_new_tokens 512: the context",
        ),
        ({"task": "efficiency", "prompt_tokens": 200}, r"prompt_tokens 200 and new_tokens 128 are more than .* 256"),
        ({"task": "probing", "concept_layer": 9, "max_new_tokens": 2}, "concept_layer 9 does not exist"),
        ({"task": "perplexity", "source": "tiny:topics/test"}, r"source: .* has no field 'instruction'"),
        ({"task": "perplexity", "data": {"source": "tiny:preferences/test", "format": "preference"}}, "data.format preference"),
        ({"task": "diversity", **IMAGES, "classifier": {**SMALL, "format": "text"}}, "classifier.format text: a classifier"),
    ],
)
def test_a_task_that_cannot_work_is_refused_with_its_key(
    task: Fields, message: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    small = {"max_new_tokens": 2} if "MODEL" in task.values() else {}
    asked = {key: str(tiny_dir) if value == "MODEL" else value for key, value in (task | small).items()}
    for key, tree in (
        ("evaluate.0", job_of(asked)),
        ("choose.tasks.0", job_of(choose={"metric": first_metric(asked), "tasks": [asked]})),
    ):
        with pytest.raises(ValueError, match=rf"^{key}\.{message}"):
            check(tree)


MEAN_ACT: Fields = {
    "data": {"source": IMAGES["data"] | {"seeds": None}, "target": IMAGES["data"] | {"seeds": None, "offset": 8}},
    "extract": {},
}
TEXT: Fields = {"task": "perplexity", "source": "tiny:topics/test", "format": "text"}
ANSWERS: Fields = {"task": "perplexity", "source": "tiny:instructions/test"}
TOXIC: Fields = {"task": "toxicity", "max_new_tokens": 2}
LAYERS: Fields = {"task": "probing", "max_new_tokens": 2}


@pytest.mark.parametrize(
    ("steer", "task", "metric", "reaches"),
    [
        ({"phases": ["generation"]}, TEXT, "perplexity/value", False),
        ({"phases": ["generation"]}, ANSWERS, "perplexity/value", True),
        ({"phases": ["generation"]}, TOXIC, "toxicity/base_perplexity", True),
        ({"phases": ["prompt"]}, TEXT, "perplexity/value", True),
        ({"roles": ["data"]}, TEXT, "perplexity/value", False),
        ({"roles": ["data"]}, {**TEXT, "role": "data"}, "perplexity/value", True),
        ({"exclude_roles": ["instruction"]}, TEXT, "perplexity/value", False),
        ({"phases": ["generation"]}, LAYERS, "probing/layer_01", False),
        ({"phases": ["generation"]}, LAYERS, "probing/executed_rotated", True),
        (
            {"phases": ["generation"]},
            {"task": "controllability", "of": TEXT, "metric": "perplexity/value"},
            "controllability/value",
            False,
        ),
    ],
)
@pytest.mark.parametrize("rule", ["metric", "within"])
def test_a_choice_by_what_no_strength_moves_is_refused(
    steer: Fields, task: Fields, metric: str, reaches: bool, rule: str
) -> None:
    """A patch on tokens that a metric is not measured on leaves it as it is: the metric or bound decides nothing."""
    other = {**TOXIC, "label": "other"}
    choose = {"metric": metric, "tasks": [task, other]}
    if rule == "within":
        choose |= {"metric": "other/share", "within": {"metric": metric, "rise": 1}}
    method = {"name": "mean_act", "incremental": False, "steer": steer}
    wanted = job_of(method=method, choose=choose, **MEAN_ACT)
    if reaches:
        task_checks.check_reach(Plan.of(wanted))
    else:
        with pytest.raises(ValueError, match=rf"^choose\.{rule}: {metric} has the same value at every strength"):
            task_checks.check_reach(Plan.of(wanted))


def test_a_task_that_no_strength_changes_is_warned_of() -> None:
    method = {"name": "mean_act", "incremental": False, "steer": {"phases": ["generation"]}}
    with pytest.warns(UserWarning, match=r"evaluate\.1: task perplexity gives the numbers of strength 0 at every strength"):
        task_checks.check_reach(Plan.of(job_of(ANSWERS, {**TEXT, "label": "texts"}, method=method, **MEAN_ACT)))
