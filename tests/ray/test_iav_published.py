"""jobs/iav_published.yaml: planned as it is for the hub's names, and run with a tiny model on files of the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from steerlab import job, models, report, run
from steerlab.cli import app
from steerlab.data import rows
from steerlab.data.sources import hub
from steerlab.data.worlds import tiny
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

JOB = Path(__file__).parents[2] / "jobs/iav_published.yaml"
BASE, REWARD = "argsearch/llama-7b-sft-float32", "argsearch/llama-7b-rm-float32"


def dialogues(num: int, split: str = "train") -> list[dict[str, str]]:
    """Rows as Anthropic/hh-rlhf has them: two dialogues that part at their last answer."""
    found = []
    for row in tiny.rows(f"preferences/{split}", num):
        begin = f"\n\nHuman: {row['prompt']}\n\nAssistant: the cow\n\nHuman: {row['prompt']}\n\nAssistant: "
        found.append({"chosen": begin + str(row["chosen"]), "rejected": begin + str(row["rejected"])})
    return found


def messages(num: int) -> list[dict[str, Any]]:
    """Rows as HuggingFaceH4/ultrafeedback_binarized has them: a prompt, and both dialogues as messages, with scores."""
    found = []
    for row in tiny.rows("preferences/validation", num):
        asked = {"role": "user", "content": row["prompt"]}
        turns = {name: [asked, {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        found.append(
            {
                "prompt": row["prompt"],
                "prompt_id": "0",
                **turns,
                "messages": turns["chosen"],
                "score_chosen": 8.0,
                "score_rejected": 4.0,
            }
        )
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models under the names of the published ones."""
    folder, found = tmp_path_factory.mktemp("published"), {}
    model = models.load_model(tiny_model(folder / "config"), seed=0)
    tokenizer = models.load_tokenizer(folder / "config")
    models.save_model(model, tokenizer, folder / "base")
    model.config.num_labels, model.config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(model.config).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    found |= {BASE: folder / "base", REWARD: folder / "reward"}
    return found


def tiny_model(folder: Path) -> Path:
    from steerlab.data.worlds import tiny_checkpoint

    folder.mkdir()
    tiny_checkpoint.write_model(folder)
    return folder


def test_the_job_is_planned_for_the_names_of_the_hub(
    published: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file as it is; the hub is replaced where it answers: commits, snapshots and rows."""
    asked: list[tuple[str, str]] = []
    of_split = {"train": dialogues(40), "test": dialogues(12, "test"), "train_prefs": messages(30)}

    def load_dataset(name: str, config: str | None, *, split: str, revision: str) -> Any:
        asked.append((name, split))
        return of_split[split]

    monkeypatch.setattr(hub, "_commit", lambda source, repo_type: "1" * 40)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(published[name]))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # The tiny model's context: the published one has 2,048 tokens.
    fits = ["--set", "train.max_tokens=64"]
    result = CliRunner().invoke(app, ["plan", str(JOB), "--root", str(tmp_path / "root"), *fits])
    assert result.exit_code == 0, result.output
    assert "data.preference mixes" in result.output and "30 of 40 rows" in result.output and "30 of 30 rows" in result.output
    assert set(asked) == {
        ("hf://datasets/Anthropic/hh-rlhf", "train"),
        ("hf://datasets/Anthropic/hh-rlhf", "test"),
        ("hf://datasets/HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
    }


def test_its_numbers_are_the_published_ones() -> None:
    """The optimizer's steps follow from pairs, epochs and batch; alpha's presets are the strengths of every sweep."""
    wanted = job.read(JOB, JobType)
    assert wanted.train is not None and wanted.data.preference is not None
    pairs = 10_000 + 10_000
    assert wanted.train.rows_per_step == 4 * 4 and wanted.train.steps == 3 * pairs // 16
    assert wanted.train.warmup_steps == wanted.train.steps // 10
    assert {task.strengths for task in wanted.tasks if task.task != "efficiency"} == {(1.0, 0.0, 0.5, 1.5, 2.0)}


@pytest.mark.ray
@pytest.mark.slow
def test_it_runs_with_a_tiny_model(cluster: None, published: dict[str, Path], tmp_path: Path) -> None:
    """Everything that the file asks for, at a smaller size: training, five tasks over alphas, and the page."""
    files = {"a": dialogues(40), "b": dialogues(12, "test"), "c": messages(30)}
    for name, given in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    train, test, more = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    smaller = {
        "model.source": published[BASE], "model.dtype": "float32", "data.preference.source": train,
        "data.preference.also.0.source": more, "train.steps": 6, "train.warmup_steps": 1, "train.max_tokens": 64,
        "evaluate.0.pairs.source": test, "evaluate.1.prompts.source": test, "evaluate.1.judge_source": published[REWARD],
        "evaluate.1.max_new_tokens": 4, "evaluate.1.limit": 4, "evaluate.2.of.prompts.source": test, "evaluate.2.of.limit": 4,
        "evaluate.2.of.judge_source": published[REWARD], "evaluate.2.of.max_new_tokens": 4, "evaluate.3.batch_sizes": "[1, 2]",
        "evaluate.3.prompt_tokens": 8, "evaluate.3.new_tokens": 4, "evaluate.3.repeats": 2, "evaluate.3.warmup": 1,
        "evaluate.4.data.source": test, "scale.warm": "true",
    }  # fmt: skip
    wanted = job.read(JOB, JobType, [f"{path}={value}" for path, value in smaller.items()])
    assert {name: portion.taken for name, portion in rows.portions(wanted.data.preference).items()} == {  # type: ignore[arg-type]
        "a.jsonl": 30, "c.jsonl": 30,
    }  # fmt: skip
    run.check(Plan.of(wanted))
    store = Store.open(str(tmp_path / "root"))
    done = run.execute(Plan.of(wanted), store, plan.Listener())
    found = done.summary["strengths"]
    assert [s for s in found if s in (1.0, 0.0, 0.5, 1.5, 2.0)] == [1.0, 0.0, 0.5, 1.5, 2.0]
    assert found[1.0]["preference/kl"]["value"] > 0 == found[0.0]["preference/kl"]["value"]
    named = {metric.partition("/")[0] for metric in found[1.0]}
    assert named == {"preference", "win_rate", "controllability", "efficiency", "token_effect"}
    curves = report.read(store, done.folder).curves
    assert {"train/chosen_logp", "train/rejected_logp", "train/chosen_reward", "train/margin"} <= curves.keys()
    assert '<section id="charts">' in report.page([report.read(store, done.folder)])
