"""The way of a user as the commands that she types, from a fresh clone to a result that she can use.

A command that fails ends the journey with its output. The number of commands stands in README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_families import family
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.ray]

REPOSITORY = Path(__file__).parents[2]
_COMMAND_S = 1800
"""Longest time of a command, on a machine on which much else runs."""


class Shell:
    """A fresh clone, and the commands that are typed in it."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.typed = folder / "clone", 0
        self.noted = ""
        """What the last command wrote to its error stream: warnings and notes."""
        # Tracked files as they are, committed or not: a journey tests what is about to be committed.
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
            (self.clone / name).write_bytes((REPOSITORY / name).read_bytes())
        self.environment = {**os.environ, "STEERLAB_ROOT": str(folder / "root"), "PYTHONPATH": str(self.clone / "platform")}
        self.environment.pop("RAY_ADDRESS", None)
        # Ray would join a cluster that other tests on this machine have started.
        self.environment["RAY_TMPDIR"] = str(folder / "ray")
        (folder / "ray").mkdir()

    def steerlab(self, *arguments: str) -> str:
        """Type a command of steerlab in the clone, and return what it prints."""
        self.typed += 1
        command = [sys.executable, "-m", "steerlab", *arguments]
        done = subprocess.run(
            command, cwd=self.clone, env=self.environment, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        assert done.returncode == 0, f"steerlab {' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        self.noted = " ".join(done.stderr.split())
        return done.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def qwen(folder: Path) -> None:
    """Write a checkpoint of one's own, as transformers saves it: Qwen's architecture, tokenizer and chat template."""
    tokenizer = family("qwen3").tokenizer
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pairs(file: Path) -> None:
    """Write conversations with a preferred and a rejected answer, one a line."""
    asked = ["Say hello.", "Summarise the text.", "What is quiet?", "Answer in one word."]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{asked[n % 4]} {n}"}],
            "chosen": [{"role": "assistant", "content": "the garden was quiet, please"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for n in range(48)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_researcher_with_a_model_and_conversations_of_her_own(shell: Shell) -> None:
    """From a checkpoint and a file of conversations to a sweep, a page, and a model that plain transformers loads."""
    qwen(shell.clone / "my-model")
    pairs(shell.clone / "pairs.jsonl")
    start_s = time.monotonic()
    said = shell.steerlab("init", "iav", "--model", "my-model", "--data", "pairs.jsonl", "-o", "mine.yaml")
    assert "data.preference: pairs.jsonl is read as format preference" in said
    assert "preference/accuracy" in shell.steerlab("sweep", "mine.yaml", "mine_space.py", "--set", "train.steps=20")
    shell.steerlab("report", "my-iav", "-o", "page.html")
    page = (shell.clone / "page.html").read_text()
    assert "strength" in page.partition('class="answer"')[2][:200], "the first screen says which strength was chosen"
    trials = json.loads((newest(shell, "sweeps/my-iav") / "summary.json").read_text())
    run = trials["best"]["runs"][0]
    shell.steerlab("export", f"{shell.environment['STEERLAB_ROOT']}/{run}", "exported", "--strength", "1")
    assert shell.typed == 4
    print(f"{shell.typed} commands, {time.monotonic() - start_s:.0f} s")
    loaded, tokenizer = (kind.from_pretrained(shell.clone / "exported") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert loaded.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


def newest(shell: Shell, below: str) -> Path:
    return max(Path(shell.environment["STEERLAB_ROOT"], below).iterdir())
