"""jobs/toxicity_published.yaml: planned as it is for the hub's names, and run with small models on files of its form."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from steerlab import job, models, run
from steerlab.cli import app
from steerlab.data.sources import hub
from steerlab.data.worlds import tiny, tiny_checkpoint
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

JOB = Path(__file__).parents[2] / "jobs/toxicity_published.yaml"
BASE, READER, JUDGE = "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"
CLASSIFIER = "s-nlp/roberta_toxicity_classifier"
SENTENCES = [str(row["text"]) for row in tiny.rows("topics/test", 60)]
KINDS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")


def prompts() -> list[dict[str, Any]]:
    """Rows as allenai/real-toxicity-prompts has them: nested texts with scores, some of them null."""
    scores = [0.1, 0.9, None, 0.7, 0.5, 0.49]
    return [
        {"filename": f"{i}.txt", "begin": 0, "end": 9, "challenging": False,
         "prompt": {"text": text, "toxicity": score, "threat": None}, "continuation": {"text": "moo", "toxicity": 0.1}}
        for i, (text, score) in enumerate(zip(SENTENCES, scores, strict=False))
    ]  # fmt: skip


OF_DATASET: dict[str, list[dict[str, Any]]] = {
    "real-toxicity-prompts": prompts(),
    "Thoroughly_Engineered_Toxicity": [
        {"conversation_id": str(i), "metrics": ["toxicity"], "query": text} for i, text in enumerate(SENTENCES[6:10])
    ],
    "wikipedia-en-sentences": [{"sentence": text} for text in SENTENCES[10:20]],
}

OWNERS = {
    "real-toxicity-prompts": "allenai",
    "Thoroughly_Engineered_Toxicity": "convoicon",
    "wikipedia-en-sentences": "sentence-transformers",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models under the names of the published ones; the tiny world has no words for a judge, so it gets a vocabulary."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "config").mkdir()
    tiny_checkpoint.write_model(folder / "config")
    tokenizer = models.load_tokenizer(folder / "config")
    models.save_model(models.load_model(folder / "config", seed=0), tokenizer, folder / "base")
    models.save_model(models.load_model(folder / "config", seed=1), tokenizer, folder / "reader")
    words = ["[UNK]", "[PAD]", "Yes", "No", *sorted({word for text in SENTENCES for word in text.split()})]
    vocabulary = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]", pad_token="[PAD]", model_max_length=128)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shared = {"vocab_size": len(words), "max_position_embeddings": 128, "pad_token_id": 1, **sizes}
    LlamaForCausalLM(LlamaConfig(**shared)).save_pretrained(folder / "judge")
    names = {0: "neutral", 1: "toxic"}
    config = BertConfig(**shared, id2label=names, label2id={name: i for i, name in names.items()})
    BertForSequenceClassification(config).save_pretrained(folder / "classifier")
    for name in ("judge", "classifier"):
        own.save_pretrained(folder / name)
    return {BASE: folder / "base", READER: folder / "reader", JUDGE: folder / "judge", CLASSIFIER: folder / "classifier"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Jigsaw's file and the job; without lm-evaluation-harness the job has no MMLU."""
    with (tmp_path / "train.csv").open("w") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["id", "comment_text", *KINDS])
        for i, text in enumerate(SENTENCES):
            # Some comments have line breaks and quotation marks, as many have in the published file.
            writer.writerow([f"{i:016x}", f'{text}\n"moo" , {text}' if i % 3 == 0 else text, i % 2, 0, 0, 0, 0, 0])
    wanted = yaml.safe_load(JOB.read_text())
    if importlib.util.find_spec("lm_eval") is None:
        wanted["evaluate"] = [entry for entry in wanted["evaluate"] if entry["task"] != "lm_eval"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(wanted))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_job_is_planned_for_the_names_of_the_hub(
    published: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is replaced where it answers: commits, snapshots and rows."""
    asked: list[str] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str) -> Any:
        asked.append(name.rpartition("/")[2])
        return OF_DATASET[asked[-1]]

    monkeypatch.setattr(hub, "_commit", lambda source, repo_type: "1" * 40)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(published[name]))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # Samples of 4, since the file of the test has 60 comments.
    fewer = [word for role in ("source", "target") for word in ("--set", f"data.{role}.limit=4")]
    result = CliRunner().invoke(
        app, ["plan", "job.yaml", "--root", str(folder / "root"), *fewer, "--set", "train.micro_batch=4"]
    )
    assert result.exit_code == 0, result.output
    assert set(asked) == set(OF_DATASET)


def test_its_numbers_are_the_published_ones() -> None:
    wanted = job.read(JOB, JobType)
    assert wanted.train is not None
    trained = wanted.train
    assert (trained.steps, trained.optimizer, trained.lr, trained.lr_floor, trained.rows_per_step) == (
        1000,
        "sgd",
        0.1,
        1e-3,
        32,
    )
    rtp, tet, several, wikipedia, mmlu = (task.model_dump() for task in wanted.tasks)
    assert [rtp[name] for name in ("max_new_tokens", "temperature", "top_p", "repetition_penalty")] == [32, 1.0, 0.3, 1.2]
    assert rtp["prompts"]["limit"] == 1000 and tet["prompts"]["limit"] is None
    assert (several["completions"], several["max_new_tokens"], several["top_p"]) == (25, 20, 0.9)
    assert (wikipedia["data"]["limit"], wikipedia["max_tokens"], mmlu["num_fewshot"]) == (20_000, 128, 5)


@pytest.mark.ray
@pytest.mark.slow
def test_it_runs_with_small_models(cluster: None, published: dict[str, Path], folder: Path) -> None:
    """The training and the evaluations that need no further package, at a smaller size."""
    for name, rows in OF_DATASET.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_names = {f"hf:{name}": str(path) for name, path in published.items()}
    of_names |= {f"hf:{owner}/{name}#train": str(folder / f"{name}.jsonl") for name, owner in OWNERS.items()}
    wanted = yaml.safe_load((folder / "job.yaml").read_text())
    wanted["evaluate"] = [entry for entry in wanted["evaluate"] if entry["task"] != "lm_eval"]
    text = json.dumps(wanted)
    for name, path in of_names.items():
        assert f'"{name}"' in text
        text = text.replace(f'"{name}"', json.dumps(path))
    (folder / "small.yaml").write_text(text)
    smaller = {
        "data.source.limit": 4, "data.target.limit": 4, "train.steps": 3, "train.micro_batch": 4, "scale.warm": "true",
        **{f"evaluate.{number}.max_new_tokens": 4 for number in range(3)}, "evaluate.2.completions": 3,
    }  # fmt: skip
    found = job.read(folder / "small.yaml", JobType, [f"{path}={value}" for path, value in smaller.items()])
    run.check(Plan.of(found))
    store = Store.open(str(folder / "root"))
    done = run.execute(Plan.of(found), store, plan.Listener())
    at_1 = done.summary["strengths"][1.0]
    assert {name for name in at_1 if name.startswith("rtp/share")} == {
        "rtp/share", "rtp/share_after_toxic", "rtp/share_after_harmless"
    }  # fmt: skip
    assert (at_1["rtp/share"]["n"], at_1["rtp/share_after_toxic"]["n"], at_1["rtp/share_after_harmless"]["n"]) == (6, 3, 2)
    assert {
        "rtp/judged",
        "rtp/reader_perplexity",
        "tet/share",
        "rtp_any/any",
        "rtp_any/worst",
        "wikipedia/value",
    } <= at_1.keys()
    assert at_1["rtp_any/any"]["n"] == 6 and at_1["rtp/reader_perplexity"]["value"] != at_1["rtp/base_perplexity"]["value"]
