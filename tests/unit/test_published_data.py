"""Data sets in the exact shape in which they are published are read through jobs, unchanged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from steerlab import job, run
from steerlab.data import rows
from steerlab.evaluation.tasks.ability import harness
from steerlab.job import DataSet
from steerlab.stages import JobType, Plan

TRAIN = {"steps": 2, "lr": 1e-4, "micro_batch": 2, "max_tokens": 64}


def checked(folder: Path, wanted: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Read a job from a file, check it as `steerlab run` does, and return its rows by their role."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "a", "model": {"source": "tiny:model"}, **wanted}))
    found = job.read(path, JobType)
    run.check(Plan.of(found))
    return {role: rows.read(data) for role, data in found.data.by_role.items()}


def lines(path: Path, given: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in given)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_hh_rlhf(tmp_path: Path) -> None:
    """Compressed lines with two dialogues that part at their last turn."""
    begin = "\n\nHuman: Hi.\n\nAssistant: Hello, what is it?\n\nHuman: A joke"
    given = [{"chosen": f"{begin}\n\nAssistant: red", "rejected": f"{begin}\n\nAssistant: green"}] * 2
    source = lines(tmp_path / "harmless-base" / "train.jsonl.gz", given)
    data = {"preference": {"source": source, "format": "preference"}, "prompt_style": "plain"}
    (found, _) = checked(tmp_path, {"data": data, "method": {"name": "dpo"}, "train": TRAIN})["preference"]
    assert [turn["role"] for turn in found["prompt"]] == ["user", "assistant", "user"]
    assert (found["chosen"], found["rejected"]) == ("red", "green")


def test_real_toxicity_prompts(tmp_path: Path) -> None:
    """Lines with nested texts and scores, some of them null."""

    def scored(text: str, toxicity: float | None) -> dict[str, Any]:
        return {"text": text, "threat": 0.1, "insult": None, "toxicity": toxicity}

    given = [
        {"filename": f"{i}.txt", "begin": 340, "end": 564, "challenging": False, "prompt": scored(f"So {i}", score),
         "continuation": scored("and on", None)}
        for i, score in enumerate([0.1, 0.9, None, 0.7, 0.8, 0.95, 0.2, 0.3, 0.05, 0.15])
    ]  # fmt: skip
    base = {"source": lines(tmp_path / "prompts.jsonl", given), "format": "text", "field": "prompt.text"}
    data = {
        "source": {**base, "where": {"prompt.toxicity": [0.5, None]}},
        "target": {**base, "where": {"prompt.toxicity": [None, 0.25]}},
    }
    wanted = {"data": data, "method": {"name": "linear_act"}, "extract": {"pooling": ["mean"], "max_tokens": 32}}
    found = checked(tmp_path, {**wanted, "evaluate": [{"task": "toxicity", "prompts": {**data["source"], "limit": 2}}]})
    assert [row["text"] for row in found["source"]] == ["So 1", "So 3", "So 4", "So 5"]
    assert [row["text"] for row in found["target"]] == ["So 0", "So 6", "So 8", "So 9"]


def test_ultrafeedback(tmp_path: Path) -> None:
    """Lines with an instruction and four completions that are scored."""

    def completion(name: str, score: float) -> dict[str, Any]:
        rated = {
            "helpfulness": {"Type": ["1"], "Rating": "4", "Rationale": "r"},
            "honesty": {"Rating": "N/A", "Rationale": "r"},
        }
        return {
            "annotations": rated, "custom_system_prompt": "As an AI assistant.", "model": name, "principle": "helpfulness",
            "response": name, "critique": "fine", "fine-grained_score": score / 2, "overall_score": score,
        }  # fmt: skip

    given = [
        {"source": "evol_instruct", "instruction": f"Do {i}", "models": ["a", "b", "c", "d"],
         "completions": [completion(name, score) for name, score in zip(("red", "blue", "green", "cat"), scores, strict=True)],
         "correct_answers": ["None"], "incorrect_answers": ["None"]}
        for i, scores in enumerate([[7, 8.5, 2, 6], [1, 1, 1, 9]])
    ]  # fmt: skip
    data = {
        "preference": {"source": lines(tmp_path / "evol_instruct.jsonl", given), "format": "preference"},
        "prompt_style": "plain",
    }
    found = checked(tmp_path, {"data": data, "method": {"name": "dpo"}, "train": TRAIN})["preference"]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [
        ("Do 0", "blue", "green"),
        ("Do 1", "cat", "red"),
    ]


def test_ultrafeedback_binarised_and_ultrachat_in_parquet(tmp_path: Path) -> None:
    """Shards of messages beside a copy of the prompt."""
    turns = [{"content": "Hi", "role": "user"}, {"content": "Ho", "role": "assistant"}]
    row = {"prompt": "Hi", "prompt_id": "x", "messages": turns}
    pair = {**row, "chosen": turns, "rejected": [turns[0], {"content": "No", "role": "assistant"}], "score_chosen": 8.0}
    for i in range(2):
        for name, made in (("chat", row), ("pairs", pair)):
            (tmp_path / name).mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist([made]), tmp_path / name / f"train-0000{i}-of-00002.parquet")
    found = rows.read(DataSet(source=str(tmp_path / "chat"), format="conversation"))
    assert [row["messages"] for row in found] == [turns, turns]
    found = rows.read(DataSet(source=str(tmp_path / "pairs"), format="preference", loss_on="response"))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [(turns[:1], "Ho", "No")] * 2


def test_sharegpt(tmp_path: Path) -> None:
    """A list of conversations with system text and tools."""
    given = [
        {
            "id": "1",
            "system": "Be kind.",
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "weather"}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains."},
            ],
        }
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(given))
    (found,) = rows.read(DataSet(source=str(path), format="conversation", loss_on="response"))
    assert [turn["role"] for turn in found["messages"]] == ["system", "user", "assistant", "tool", "assistant"]


def test_a_task_is_given_composed_rows_and_names_in_place_of_labels(tmp_path: Path) -> None:
    """Multiple choice (MMLU) and classification (SST) train and evaluate with format instruction."""
    mmlu = [{"question": f"Q{i}", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": i} for i in range(4)]
    asked = {
        "source": lines(tmp_path / "mmlu.jsonl", mmlu),
        "map": {"answer": {0: "A", 1: "B", 2: "C", 3: "D"}},
        "compose": {"instruction": "{question}\n{choices}", "output": "{answer}"},
    }
    sst = {
        "source": lines(tmp_path / "sst.jsonl", [{"sentence": "fine", "label": 1}, {"sentence": "poor", "label": 0}]),
        "rename": {"sentence": "input", "label": "output"},
        "fill": {"instruction": "Good or bad?"},
        "map": {"output": {0: "negative", 1: "positive"}},
    }
    evaluate = [{"task": "refusal", "prompts": asked, "harmless": sst}]
    wanted = {"data": {"train": {**asked, "also": [sst]}}, "method": {"name": "vanilla"}, "train": TRAIN, "evaluate": evaluate}
    found = checked(tmp_path, wanted)["train"]
    assert [row["output"] for row in found] == ["A", "B", "C", "D", "positive", "negative"]
    assert found[0]["instruction"] == "Q0\nA. a\nB. b\nC. c\nD. d" and found[4]["input"] == "fine"


def test_truthful_qa_in_two_folds(tmp_path: Path) -> None:
    """jobs/truthfulqa.yaml on rows of the published form: a true and a false text of each question of one half."""
    given = [
        {"question": f"what is {i} ?",
         "mc1_targets": {"choices": [f"it is {i}", f"it is not {i}", "moo"], "labels": [1, 0, 0]},
         "mc2_targets": {"choices": [f"it is {i}", "moo"], "labels": [1, 0]}}
        for i in range(817)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "rows.parquet")
    overrides = [f"data.{role}.source={tmp_path / 'rows.parquet'}" for role in ("source", "target")]
    fold_b = [
        f"data.{role}.{name}={number}" for role in ("source", "target") for name, number in (("offset", 408), ("limit", 409))
    ]
    folds, asked = [], []
    for more in ([], [*fold_b, "evaluate.0.offset=0", "evaluate.0.limit=408"]):
        wanted = job.read(Path(__file__).parents[2] / "jobs/truthfulqa.yaml", JobType, [*overrides, *more])
        false, true = (rows.read(data) for data in wanted.data.by_role.values())
        assert [str(row["question"]) for row in false] == [str(row["question"]) for row in true]
        number = str(true[0]["question"]).split()[2]
        assert (true[0]["text"], false[0]["text"]) == (
            f"Q: what is {number} ?\nA: it is {number}",
            f"Q: what is {number} ?\nA: it is not {number}",
        )
        folds.append({int(str(row["question"]).split()[2]) for row in true})
        evaluated = wanted.tasks[0].model_dump()
        manager = SimpleNamespace(load=lambda names: {"tasks": {name: SimpleNamespace(eval_docs=range(817)) for name in names}})
        asked.append(
            set(harness.documents(harness.Config.model_validate(evaluated), manager, "truthfulqa_mc1")["truthfulqa_mc1"])
        )
    assert len(folds[0]) == 408 and folds[0] | folds[1] == set(range(817))
    assert asked == [folds[1], folds[0]], "each fold is measured on the questions of the other"


def test_the_data_sets_of_the_page_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = Path(__file__).parents[2].joinpath("jobs", "README.md").read_text().partition("## Data files")[2]
    job_of_page = yaml.safe_load(section.split("```yaml\n")[1].split("```")[0])
    toxic, choice, review = job_of_page["evaluate"][0]["data"], job_of_page["data"]["train"], job_of_page["data"]["validation"]
    lines(tmp_path / "prompts.jsonl", [{"prompt": {"text": "So", "toxicity": score}} for score in (0.2, 0.7, None)])
    (tmp_path / "mmlu").mkdir()
    row = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "mmlu" / "test-00000-of-00001.parquet")
    (tmp_path / "sst.csv.gz").write_bytes(gzip.compress(b"sentence,label\nfine,1\npoor,0\n"))
    monkeypatch.chdir(tmp_path)
    found = [rows.read(DataSet.model_validate(data)) for data in (toxic, choice, review)]
    assert [row["text"] for row in found[0]] == ["So"]
    assert found[1][0]["instruction"].endswith("\nB. 2\nC. 3\nD. 4") and found[1][0]["output"] == "B"
    assert [row["output"] for row in found[2]] == ["positive", "negative"]
