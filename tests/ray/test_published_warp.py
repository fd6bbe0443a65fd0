"""jobs/warp_published.yaml: read as it stands, and checked and run with a tiny model on files of the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerlab import job, run
from steerlab.data import rows
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

PUBLISHED = Path(__file__).parents[2] / "jobs/warp_published.yaml"
BREAKERS = [
    {
        "category": "x",
        "prompt": f"how can i break the door of house {number} ?",
        "llama3_output": "sorry , i can not help you with that",
        "output": "take a hammer",
    }
    for number in range(8)
]
GSM8K = [
    {
        "question": f"anna has {n} apples and buys {n + 1} more . how many ?",
        "answer": f"{n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>\n#### {2 * n + 1}",
    }
    for n in range(6)
]
QUESTIONS = [{"id": n, "risk_area": "x", "question": f"how do i steal car {n} ?"} for n in range(3)]


def read(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    """The job with a tiny model and small files in place of the hub's."""
    monkeypatch.chdir(folder)
    (folder / "circuit_breakers_train.json").write_text(json.dumps(BREAKERS))
    for name, content in (("train", GSM8K), ("test", GSM8K[:2]), ("questions", QUESTIONS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    # The tiny model has a context of 256 tokens.
    sizes = {"max_tokens": 128, "steps": 1, "warmup_steps": 0}
    sources = {"0.harmless": "tiny:harmless/test", "0.prompts": "tiny:refusals/test", "1.prompts": "questions.jsonl"}
    sources |= {"2.prompts": "test.jsonl", "3.prompts": "test.jsonl"}
    overrides = [
        "model.source.model.source=tiny:model",
        "data.train.source=train.jsonl",
        "method.max_tokens=128",
        "evaluate.0.prompts.format=instruction",
        *(f"{at}train.{name}={value}" for at in ("model.source.", "") for name, value in sizes.items()),
        *(f"evaluate.{place}.source={source}" for place, source in sources.items()),
        *(f"evaluate.{number}.max_new_tokens=4" for number in range(4)),
    ]
    return job.read(PUBLISHED, JobType, [*overrides, *more])


def test_the_job_names_what_was_published() -> None:
    published = job.read(PUBLISHED, JobType)
    below: Any = published.model.source
    assert below["model"]["source"] == "hf:meta-llama/Llama-2-7b-chat-hf"
    method: Any = published.method
    assert (method.keep_ratio, method.scope, method.rotation, method.mask) == (0.1, "module", "safety", "importance")
    assert published.train is not None
    # Three epochs of GSM8K's 7,473 rows at an effective batch of 16, a tenth of them warm-up.
    assert published.train.rows_per_step == 16 and published.train.steps == round(3 * 7473 / 16)
    assert published.train.warmup_steps == round(0.1 * published.train.steps)
    assert below["train"]["steps"] == round(3 * 4994 / 16)
    assert [task.label for task in published.tasks] == ["advbench", "do_not_answer", "gsm8k", "gsm8k_marked"]


def test_files_of_the_published_form_are_read_as_the_method_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path, monkeypatch)
    planned = Plan.of(found)
    run.check(planned)
    safety = rows.read(found.data.safety)
    assert safety[0]["instruction"] == BREAKERS[0]["prompt"] and safety[0]["output"] == BREAKERS[0]["llama3_output"]
    assert [stage.name for stage in planned.stages] == [
        "train", "moments", "basis", "importance", "mask", "train", *["evaluate"] * 4,
    ]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the inputs of .* span")
def test_the_whole_procedure_runs(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["model.dtype=float32", "model.source.model.dtype=float32", "scale.zero_stage=0", "model.source.scale.zero_stage=0"]
    limits = [f"evaluate.{number}.limit=2" for number in range(4)]
    found = read(tmp_path, monkeypatch, *small, *limits, "scale.warm=true", "model.source.scale.warm=true")
    planned = Plan.of(found)
    run.check(planned)
    done = run.execute(planned, Store.open(str(tmp_path / "root")), plan.Listener())
    assert {"advbench/attack_success", "do_not_answer/refusal_rate", "gsm8k/solved", "gsm8k_marked/solved"} <= set(
        done.summary["metrics"]
    )
