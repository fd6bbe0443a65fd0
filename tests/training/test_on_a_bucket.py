"""A warm training whose ROOT is a bucket: after a death it goes on from the bucket, and it leaves nothing on the node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import s3_server

# In a process of its own: the process group and DeepSpeed's state are those of a process. Without Ray: the loop is called here.
CODE = """
import sys
from pathlib import Path

import ray
from steerlab.stages import JobType, Plan
from steerlab.stages.spread import warm
from steerlab.storage import plan
from steerlab.storage.store import Store

class Died(Exception):
    pass

deaths = [3]

def fit(request, scale, *, storage, report):
    def tell(metrics):
        if deaths and metrics["step"] > deaths[0]:
            deaths.pop()
            raise Died
        report(metrics)
    warm._loop(request, scale, storage, tell)

ray.get_gpu_ids, warm.fit = list, fit
planned = Plan.of(JobType.model_validate({
    "name": "a", "model": {"source": "tiny:model"}, "method": {"name": "vanilla"},
    "data": {
        "prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 32},
        "validation": {"source": "tiny:pretrain/validation", "limit": 4},
    },
    "train": {"steps": 6, "micro_batch": 4, "max_tokens": 64, "eval_every": 2, "keep": "best"},
    "scale": {"checkpoint_every": 2, "warm": True},
}))
store, steps = Store.open(sys.argv[1]), []
listener = plan.Listener(reported=lambda stage, metrics: steps.append(metrics["step"]))
for _ in range(2):
    try:
        plan.run(planned.stages, store, planned.job.scale, listener, [])
    except Died:
        assert store.list("work/train"), "the checkpoints stay"
(stage,) = planned.stages
assert steps == [1, 2, 3, 1, 2, 3, 4, 5, 6], steps
assert store.has("train", stage.key) and store.list("work/train") == [] and store.list(f"claims/train-{stage.key}") == []
"""


@pytest.mark.slow
def test_a_warm_training_goes_on_from_a_bucket_and_leaves_nothing_on_the_node(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu",
        "STEERLAB_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"),
    }  # fmt: skip
    with s3_server.running() as server:
        command = [sys.executable, "-c", CODE, server.root("x")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []
    names = {path.name for path in (tmp_path / "tmp").iterdir()}
    assert not {name for name in names if name.startswith(("steerlab", "checkpoint", "tmp"))}, names
