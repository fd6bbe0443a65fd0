"""Diffusion jobs that cannot work are refused before anything starts, with what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from steerlab import cli, job, run
from steerlab.stages import JobType, Plan

JOBS = Path(__file__).parents[2] / "jobs/tiny"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The tiny LinEAS job on the small untrained pipeline itself, and a file with subsets of prompts beside it."""
    tree = yaml.safe_load((JOBS / "diffusion_lineas.yaml").read_text())
    tree["model"]["source"] = "pixels:digits-model"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "prompts.json").write_text(json.dumps({"none": ["three", "two"], "thin lines": ["thin three", "thin two"]}))
    return tmp_path / "a.yaml"


NO_SUCH_SUBSET = r"subset 'bold': .*prompts.json has no such subset; it has none, thin lines"


def subset(key: str, folder: Path) -> list[str]:
    return [f"{key}.source={folder / 'prompts.json'}", f"{key}.subset=bold", f"{key}.equals={{}}", f"{key}.compose={{}}"]


def test_the_job_itself_is_fine(path: Path) -> None:
    run.check(Plan.of(job.read(path, JobType)))


@pytest.mark.parametrize("key", ["data.source", "data.target", "evaluate.0.data"])
def test_a_subset_that_is_not_there_lists_those_that_are(path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: {NO_SUCH_SUBSET}"):
        run.check(Plan.of(job.read(path, JobType, subset(key, path.parent))))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["extract.select.modules=words.*"],
            r"extract.select: modules 'words\.\*' matches only modules of words, where nothing is steered; .* such as unet\.",
        ),
        (["method.steer.modules=words.*"], r"method.steer: .* only modules of words"),
        (
            ["model.sampler.scheduler=FlowMatchEulerDiscreteScheduler"],
            r"sampler.scheduler FlowMatch.*: the pipeline cannot use it instead of its DDIMScheduler; it can use .*DDIM",
        ),
        (["model.sampler.scheduler=EulerSchedule"], "is not a scheduler of diffusers"),
        (["model.sampler.read=[8]"], "read: step 8 does not exist; the steps are 0 to 7"),
        (["model.kind=causal_lm"], "sampler applies to drawing images"),
        (["data.source.format=instruction"], "data.source: "),
        (["extract.pooling=[none]"], "pooling"),
        (
            ["method={name: linear_act}", "train=null"],
            r"model.sampler.read \[0, 3\]: method.incremental fits along one step",
        ),
    ],
)
def test_what_cannot_work_is_refused(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.check(Plan.of(job.read(path, JobType, overrides)))


def test_tasks_of_the_other_kind_are_refused(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    tree["evaluate"] = [{"task": "perplexity", "source": "tiny:topics/test", "format": "text"}]
    with pytest.raises(ValueError, match=r"task perplexity does not work on models of kind diffusion; .*: image_concept"):
        run.check(Plan.of(job.validate(tree, JobType, path)))


def test_other_weights_of_a_denoiser_that_a_job_leaves_are_refused(tmp_path: Path) -> None:
    """They would take the place of what that job has trained."""
    for name in ("digits.yaml", "diffusion_act.yaml"):
        (tmp_path / name).write_text((JOBS / name).read_text())
    wanted = job.read(tmp_path / "diffusion_act.yaml", JobType, ["model.sampler.denoiser=unet.safetensors"])
    with pytest.raises(ValueError, match=r"model\.sampler\.denoiser: the job tiny-digits trains its denoiser"):
        run.check(Plan.of(wanted))


def test_the_command_line_says_it_in_one_message(path: Path) -> None:
    arguments = [part for override in subset("data.source", path.parent) for part in ("--set", override)]
    found = CliRunner().invoke(cli.app, ["plan", str(path), "--root", str(path.parent / "root"), *arguments])
    assert found.exit_code == 2
    assert "it has none, thin lines" in " ".join(found.output.split()) and "Traceback" not in found.output
