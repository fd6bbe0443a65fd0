"""A method that mends another job's result, on a real cluster: moments of the model before, the edit, and its strengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerlab import job, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

TUNED: dict[str, Any] = {
    "name": "tuned",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:arithmetic/train", "limit": 16, "loss_on": "response"}},
    "method": {"name": "vanilla"},
    "train": {"steps": 2, "lr": 1e-3, "max_tokens": 64},
    "scale": {"warm": True},
}
MENDED: dict[str, Any] = {
    "name": "mended",
    "model": {"source": TUNED},
    "data": {"safety": {"source": "tiny:refusals/train", "limit": 16, "loss_on": "response"}},
    "method": {"name": "safe_delta", "target_layers": [0], "budget": 1e3},
    "scale": {"warm": True},
    "evaluate": [{"task": "perplexity", "source": "tiny:arithmetic/test", "limit": 8, "strengths": [1, 0.5, 0]}],
}


def test_a_job_mends_what_another_has_trained(cluster: None, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "root"))
    planned = Plan.of(job.validate(MENDED, JobType, tmp_path / "a.yaml"))
    facts = run.check(planned)
    capacity.check_cluster(planned, store, facts)
    done = run.execute(planned, store, plan.Listener())
    assert [record.stage.name for record in done.records] == ["train", "moments", "edit", "evaluate"]
    values = {s: m["perplexity/value"]["value"] for s, m in done.summary["strengths"].items()}
    assert len(set(values.values())) == 3, "strengths interpolate between the trained weights and the mended ones"

    made = done.records[2].stage
    folder = store.local("edit", made.key)
    about = json.loads((folder / "edit.json").read_text())
    assert about["changed"] > 7 and set(about["by_module"]) == {"kept", "cost", "budget"}
    assert len(about["by_module"]["kept"]) == 7, "one number for each linear layer of the block"
    assert {"base.json", "edit.json", "prompt.json"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "index.json").exists(), "the patch holds the same numbers"
    (patch,) = stacks.load(folder).patches
    assert patch.kind == "weight" and len(patch.shapes) == about["changed"]
    # Strength 0 is the trained model.
    own = Plan.of(
        job.validate({**TUNED, "evaluate": [{**MENDED["evaluate"][0], "strengths": [1]}]}, JobType, tmp_path / "b.yaml")
    )
    trained = run.execute(own, store, plan.Listener())
    assert trained.summary["metrics"]["perplexity/value"]["value"] == values[0.0]
