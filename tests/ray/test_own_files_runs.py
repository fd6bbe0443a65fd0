"""A stranger's own model, template and files, named by relative paths: from the job file through real workers to numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_families import FAMILIES, family
from test_text_requests import model_of

from steerlab import job, run
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

TURNS = [
    {"conversations": [{"from": "human", "value": "say hello"}, {"from": "gpt", "value": "hello"}]},
    {
        "conversations": [
            {"from": "system", "value": "Be quiet."},
            {"from": "human", "value": "say hello"},
            {"from": "gpt", "value": "hello"},
            {"from": "human", "value": "and again"},
            {"from": "gpt", "value": "hello again"},
        ]
    },
]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gemma", {"source": "model"}),
        ("gpt2", {"source": "./model", "chat_template": "chat.jinja", "tokenizer": "model"}),
        pytest.param("qwen3", {"source": "model"}, marks=pytest.mark.slow),
    ],
)
def test_conversations_of_ones_own_train_and_evaluate(
    name: str, model: dict[str, Any], tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in FAMILIES
    here = tmp_path / "here"
    here.mkdir()
    model_of(name, here / "model")
    (here / "chat.jinja").write_text(str(family("zephyr").tokenizer.chat_template))
    (here / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TURNS))
    rows = {"source": "turns.jsonl", "format": "conversation", "loss_on": "last_response"}
    tree = {
        "name": "own",
        "model": model,
        "data": {"train": rows},
        "method": {"name": "vanilla"},
        "train": {"steps": 1, "micro_batch": 2, "max_tokens": 256},
        "scale": {"warm": True},
        "evaluate": [{"task": "perplexity", "data": rows}],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(here)
    wanted = job.read(tmp_path / "job.yaml", JobType)
    store = Store.open(str(tmp_path / "root"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is surprising about a template is said
        run.check(Plan.of(wanted))
    done = run.execute(Plan.of(wanted), store, plan.Listener())
    assert done.summary["metrics"]["perplexity/value"]["value"] > 1
    trained = store.local("train", next(stage.key for stage in Plan.of(wanted).stages if stage.name == "train"))
    loaded = stacks.load(trained)
    prompt = loaded.encoder.encode(loaded.encoder.conversation("say", "hello"))
    used = "<|assistant|>" if "chat_template" in model else str(family(name).end_of_turn)
    assert used in loaded.encoder.tokenizer.decode(prompt.input_ids)
    assert len(json.loads((trained / "prompt.json").read_text()).keys() & {"chat_template", "tokenizer"}) == 0
