"""A job on two nodes with ROOT in a folder that both see, in a process of its own: Ray allows one cluster in each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import steerlab

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CODE = """
import os
import sys
import ray
from ray.cluster_utils import Cluster
from steerlab import job, run
from steerlab.run import capacity, sharing
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
tree = {
    "name": "a", "model": {"source": "tiny:model"}, "method": {"name": "vanilla"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 32}},
    "train": {"steps": 4, "micro_batch": 4, "max_tokens": 64}, "scale": {"workers": 2, "zero_stage": 1, "checkpoint_every": 2},
}
store, planned = Store.open(sys.argv[1]), Plan.of(JobType.model_validate(tree))
capacity.check_cluster(planned, store, run.check(planned))
done = run.execute(planned, store, plan.Listener())
assert [record.status for record in done.records] == ["ran"]
nodes = [node["NodeID"] for node in ray.nodes()]
assert sharing._read_on(nodes, "/no/such/file") == {node: "" for node in nodes}
print("nodes:", len(nodes), "left:", store.list("tmp"), store.list("work/train"), flush=True)
# Not through the exit handlers of `Cluster`, which fail where Ray has ended already.
os._exit(0)
"""


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_two_nodes_train_in_a_shared_folder(tmp_path: Path, scheme: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(steerlab.__file__).parent.parent)
    command = [sys.executable, "-c", CODE, f"{scheme}{tmp_path}/root"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes: 2 left: [] []" in done.stdout
