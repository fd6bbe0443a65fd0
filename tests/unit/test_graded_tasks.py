"""Tasks whose judge writes grades: MT-Bench with two turns, AxBench with three questions, by an API or a local model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from judge_server import serving

from steerlab.evaluation import TASKS
from steerlab.evaluation.judging import graders
from steerlab.evaluation.judging.graders import Grading
from steerlab.evaluation.statistics.metrics import Result
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.statistics.written import Written
from steerlab.evaluation.tasks.ability import mt_bench
from steerlab.evaluation.tasks.style import axbench
from steerlab.patches import ActivationPatch
from steerlab.steered.language import SteeredModel

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["the cow ?", "and the dog ?"]},
    {"question_id": 111, "category": "math", "turns": ["two and two ?", "and one ?"], "reference": ["it is 4", "it is 5"]},
]
NORM = "model.layers.1.post_attention_layernorm"


@pytest.fixture
def steered(tiny_model, encoder) -> SteeredModel:
    patch = ActivationPatch({NORM: tiny_model.config.hidden_size}, {"phases": ("generation",)})
    patch.maps[0].scale.data.fill_(-3.0)
    return SteeredModel(tiny_model, encoder, (patch,))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def run(task: str, model: SteeredModel, judge: Callable[[str], str], **fields: Any) -> tuple[Result, list[dict[str, Any]]]:
    with serving(judge) as server:
        api = {"base_url": server.url, "model": "judge-1", "retries": 0}
        config = TASKS[task].Config.model_validate({"api": api, "max_new_tokens": 6, **fields})
        return TASKS[task].run(model, config), server.bodies


# MT-Bench


def graded(question: str) -> str:
    return "Fine. Rating: [[4]]" if question.rstrip().endswith("its context.") else "Rating: [[8]]"


def test_both_turns_are_graded_and_the_second_follows_the_models_own_first_answer(steered, encoder, tmp_path: Path) -> None:
    source = lines(tmp_path / "question.jsonl", QUESTIONS)
    result, asked = run("mt_bench", steered, graded, source=source, strengths=(1.0, 0.0), temperature=0.0)
    found = summarise_all(result)
    for strength in (1.0, 0.0):
        numbers = {name: found[strength][f"mt_bench/{name}"].value for name in ("score", "turn_1", "turn_2")}
        assert numbers == {"score": 6.0, "turn_1": 8.0, "turn_2": 4.0}
    assert len(asked) == 8, "two questions, two turns, two strengths"
    for sample in result.samples:
        # Written again, turn by turn: the second prompt holds the first answer of the same strength.
        texts = (str(sample[name]) for name in ("prompt", "output", "prompt_2"))
        dialogue = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=True)]
        for prompt, answer in (
            (encoder.conversation(str(sample["prompt"])), "output"),
            (encoder.dialogue(dialogue), "output_2"),
        ):
            ((again,),) = steered.generate([prompt], max_new_tokens=6, strengths=(sample["strength"],))  # type: ignore[arg-type]
            assert again.text == sample[answer]
    assert len({sample["output_2"] for sample in result.samples}) > 2, "strengths differ"


def test_the_judge_sees_the_dialogue_and_the_reference_of_questions_that_have_one(steered, tmp_path: Path) -> None:
    result, asked = run("mt_bench", steered, graded, source=lines(tmp_path / "q.jsonl", QUESTIONS), temperature=0.0)
    questions = [body["messages"][0]["content"] for body in asked]
    by_math = [question for question in questions if "two and two ?" in question]
    assert len(by_math) == 2 and all("it is 4" in question for question in by_math)
    assert [("it is 5" in question) for question in sorted(by_math, key=len)] == [False, True]
    assert not any("it is 4" in question for question in questions if "the cow ?" in question)
    second = next(question for question in questions if "and the dog ?" in question)
    (sample,) = (sample for sample in result.samples if sample["category"] == "writing")
    assert str(sample["output"]) in second and str(sample["output_2"]) in second


def test_published_files_are_read_as_they_are(steered, tmp_path: Path) -> None:
    published = [
        {"name": name, "type": "single", "system_prompt": "You judge.", "prompt_template": template, "category": "general"}
        for name, template in {
            "single-v1": "Q {question} A {answer}",
            "single-math-v1": "M {question} R {ref_answer_1} A {answer}",
            "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
            "single-math-v1-multi-turn": "M {question_1} R {ref_answer_2} A {answer_1} Q {question_2} A {answer_2}",
            "pair-v2": "{question}",
        }.items()
    ]
    references = [{"question_id": 111, "choices": [{"turns": ["four", "five"]}], "model_id": "gpt-4"}]
    fields = {
        "source": lines(tmp_path / "question.jsonl", [{k: v for k, v in q.items() if k != "reference"} for q in QUESTIONS]),
        "references_source": lines(tmp_path / "gpt-4.jsonl", references),
        "prompts_source": lines(tmp_path / "judge_prompts.jsonl", published),
    }
    _, asked = run("mt_bench", steered, lambda question: "[[5]]", temperature=0.0, **fields)
    assert all(body["messages"][0] == {"role": "system", "content": "You judge."} for body in asked)
    texts = [body["messages"][1]["content"] for body in asked]
    assert sorted(text[:1] for text in texts) == ["M", "M", "Q", "Q"]
    assert any(text.startswith("M two and two ? R four A") for text in texts)
    assert any(text.startswith("M two and two ? R five A") for text in texts)
    short = lines(tmp_path / "few.jsonl", published[:1])
    with pytest.raises(ValueError, match=r"prompts_source: .* has no prompt single-math-v1"):
        mt_bench.gradings(mt_bench.Config.model_validate({**fields, "prompts_source": short, "judge_source": "a"}))
    wrong = lines(tmp_path / "one.jsonl", [{"question_id": 1, "turns": ["only one"]}])
    with pytest.raises(ValueError, match="source: question 1: turns must be a list of two texts"):
        mt_bench.load(mt_bench.Config(source=wrong, judge_source="a"))


def test_grades_that_are_missing_are_counted(steered, tmp_path: Path) -> None:
    result, _ = run(
        "mt_bench",
        steered,
        lambda q: "no idea" if "its context." in q else "[[3]]",
        source=lines(tmp_path / "q.jsonl", QUESTIONS),
    )
    found = summarise_all(result)[1.0]
    assert (found["mt_bench/turn_1"].value, found["mt_bench/turn_2"].unparsable, found["mt_bench/score"].unparsable) == (
        3.0,
        2,
        2,
    )


# AxBench


@pytest.mark.parametrize(
    ("grades", "mean"), [((2, 2, 2), 2.0), ((2, 0, 2), 0.0), ((1, 1, 2), 3 / 2.5), ((0.5, 1, 2), 3 / 3.5), ((1, 1, 1), 1.0)]
)
def test_the_score_is_the_harmonic_mean_and_0_where_a_grade_is(grades: tuple[float, ...], mean: float) -> None:
    assert axbench.harmonic_mean(grades) == pytest.approx(mean)


def three_grades(question: str) -> str:
    return "[[1]]" if question.startswith("Does this text belong") else "Rating: [[2]]"


def test_each_answer_gets_three_grades_and_their_harmonic_mean(steered, tmp_path: Path) -> None:
    rows = [{"instruction": text, "output": ""} for text in ("name a colour", "say who it is")]
    prompts = {"source": lines(tmp_path / "rows.jsonl", rows)}
    result, asked = run("axbench", steered, three_grades, concept="the sea", prompts=prompts, strengths=(1.0, 0.0))
    found = summarise_all(result)
    for metrics in found.values():
        values = {name: metrics[f"axbench/{name}"].value for name in ("score", *axbench.GRADES)}
        assert values == {"score": pytest.approx(1.5), "concept": 2.0, "instruction": 1.0, "fluency": 2.0}
    questions = [body["messages"][0]["content"] for body in asked]
    assert len(questions) == len(set(questions)) <= 12
    assert sum("Concept: the sea" in question for question in questions) == len(questions) / 3
    outputs = {str(sample["output"]) for sample in result.samples}
    assert all(any(question.endswith(f"Text:\n{output}") for output in outputs) for question in questions)


def test_a_concept_is_read_from_the_published_file(tmp_path: Path) -> None:
    flat = [
        {"concept_id": i, "concept": c, "ref": "x", "concept_genres_map": {c: ["text"]}} for i, c in enumerate(("tea", "ships"))
    ]
    grouped = [{"concepts": ["tea", "ships"], "refs": ["x", "y"]}, {"concepts": ["rain", "snow"], "refs": ["z", "w"]}]
    for rows, number, concept in ((flat, 1, "ships"), (grouped, 2, "rain")):
        source = lines(tmp_path / "metadata.jsonl", rows)
        config = axbench.Config(concepts_source=source, concept_id=number, judge_source="a")
        assert axbench.concept_of(config) == concept
    with pytest.raises(ValueError, match=r"concepts_source: .* has no concept_id 9; it has 4 concepts"):
        axbench.concept_of(config.model_copy(update={"concept_id": 9}))
    with pytest.raises(ValueError, match="has neither a text `concept` nor a list"):
        axbench.concept_of(config.model_copy(update={"concepts_source": lines(tmp_path / "other.jsonl", [{"name": "tea"}])}))


def test_texts_of_a_file_have_concepts_of_their_own_and_empty_ones_are_not_shown() -> None:
    seen: list[str] = []

    def judge(question: str) -> str:
        seen.append(question)
        return "Rating: [[2]]"

    written = [
        Written("0", 1.0, "p", "a ship", {"concept": "ships"}),
        Written("1", 1.0, "p", " "),
        Written("2", 1.0, "p", "tea", {}),
    ]
    with serving(judge) as server:
        config = axbench.Config.model_validate({"concept": "tea", "api": {"base_url": server.url, "model": "m", "parallel": 1}})
        scored = axbench.scorer(config, "cpu")(written)
    assert [[o.value for o in own] for own in scored] == [[2.0] * 4, [None] * 4, [2.0] * 4]
    assert len(seen) == 6 and sum("Concept: ships" in question for question in seen) == 1


# Any judge


def test_texts_of_answers_are_filled_in_once() -> None:
    texts: Mapping[str, str] = {"question": "{answer}", "answer": "{question}"}
    asked = Grading("{question} {answer} {other}").question(texts)
    assert asked == [{"role": "user", "content": "{answer} {question} {other}"}]


def test_a_local_model_is_asked_the_same_questions(
    steered, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered.model.save_pretrained(tmp_path / "judge")
    for file in tiny_dir.iterdir():
        if not (tmp_path / "judge" / file.name).exists():
            (tmp_path / "judge" / file.name).write_bytes(file.read_bytes())
    config = axbench.Config(concept="tea", judge_source=str(tmp_path / "judge"), judge_tokens=5)
    judge = graders.judge_of(config, "cpu")
    said = judge([[{"role": "user", "content": "the cow"}], [{"role": "user", "content": "the cow " * 400}]])
    prompt = steered.encoder.dialogue([{"role": "user", "content": "the cow"}])
    ((expected,),) = steered.generate([prompt], max_new_tokens=5, strengths=(0.0,))
    assert said == [expected.text, "too_long"]
    asked: list[Any] = []
    monkeypatch.setattr(graders, "judge_of", lambda *_: lambda questions: asked.extend(questions) or ["[[1]]"] * len(questions))
    (own,) = axbench.scorer(config, "cpu")([Written("0", 1.0, "p", "tea time", {})])
    assert [re.search(r"\w+$", turn["content"])[0] for (turn,) in asked] == ["time"] * 3 and [o.value for o in own] == [1.0] * 4  # type: ignore[index]


@pytest.mark.parametrize(
    ("task", "fields", "said"),
    [
        ("axbench", {"concept": "a"}, "set either api or judge_source"),
        ("axbench", {"judge_source": "a"}, "set either concept, or concepts_source with concept_id"),
        ("axbench", {"judge_source": "a", "concepts_source": "b"}, "belong together"),
        ("mt_bench", {"source": "a"}, "set either api or judge_source"),
    ],
)
def test_what_cannot_be_graded_is_refused(task: str, fields: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TASKS[task].Config.model_validate(fields)
