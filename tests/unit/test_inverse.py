"""The inverse of a patch: a key of the job, and an option of the commands that try a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steerlab import cli, models, patches, run
from steerlab.cli import opening
from steerlab.job import JobError, Selection, read
from steerlab.patches.maps import AffineMap, LowRankMap
from steerlab.stages import JobType, Plan
from steerlab.stages.spread import subject
from steerlab.steered import stacks

ACT = Path(__file__).parents[2] / "jobs/tiny/act.yaml"
PLACE = "model.layers.1.mlp"


def planned(*overrides: str) -> Plan:
    return Plan.of(read(ACT, JobType, overrides))


def test_an_inverse_is_another_evaluation_of_the_same_fit() -> None:
    plain, inverse = planned(), planned("inverse=true")
    assert plain.model is not None and inverse.model is not None and plain.model.key == inverse.model.key
    for one, other in zip(plain.evaluations, inverse.evaluations, strict=True):
        assert one.stage.key != other.stage.key
        assert one.baseline is not None and other.baseline is not None and one.baseline.key == other.baseline.key
    assert "inverse" not in plain.job.model_dump(mode="json") and "inverse" not in json.dumps(plain.evaluations[0].stage.params)
    params = subject.OnModel.model_validate(inverse.evaluations[0].stage.params)
    assert params.inverse and not subject.OnModel.model_validate(plain.evaluations[0].stage.params).inverse


@pytest.fixture
def artifact(tiny_dir: Path, tmp_path: Path) -> Path:
    """What a fit leaves: a patch for a model, and how that is prompted."""
    model = models.load_model(tiny_dir, seed=0)
    width = model.config.hidden_size
    found = AffineMap(torch.linspace(0.5, 2, width), torch.linspace(-3, 3, width))
    patch = patches.ActivationPatch.from_maps({PLACE: found}, Selection(modules=PLACE))
    patches.save(patch, tmp_path / "left/patch", models.fingerprint(model))
    (tmp_path / "left/base.json").write_text(json.dumps({"source": str(tiny_dir)}))
    (tmp_path / "left/prompt.json").write_text(json.dumps(stacks.load(tiny_dir).encoder.spec))
    return tmp_path / "left"


def test_a_loaded_inverse_undoes_the_patch(artifact: Path) -> None:
    (patch,), (inverse,) = (stacks.load_stack(artifact, inverse=inverse).patches for inverse in (False, True))
    assert isinstance(patch, patches.ActivationPatch) and isinstance(inverse, patches.ActivationPatch)
    z = torch.randn(4, patch.sizes[PLACE], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inverse.layers()[0](patch.layers()[0](z)), z, rtol=1e-4, atol=1e-4)


def test_a_command_takes_the_inverse(artifact: Path) -> None:
    """The texts differ, and those at strength 0 are those of the model itself."""
    shown = []
    for more in ([], ["--inverse"]):
        asked = ["generate", str(artifact), "--prompt", "the old", "--strength", "0", "--strength", "1", *more]
        done = CliRunner().invoke(cli.app, asked, env={"COLUMNS": "400"})
        assert done.exit_code == 0, done.output
        shown.append([line for line in done.output.splitlines() if line.strip()])
    differing = [(one, other) for one, other in zip(*shown, strict=False) if one != other]
    assert differing, shown


def test_an_inverse_of_an_inverse_is_the_patch(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_run = opening.Artifact(artifact, {"inverse": True}, run.Reported(1.0, None))
    monkeypatch.setattr(opening, "_artifact_of", lambda folder, root: of_run)
    assert opening.artifact_of("run", None).loading == {"inverse": True}
    assert opening.artifact_of("run", None, inverse=True).loading == {"inverse": False}


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (patches.EmbeddingPatch(8, 1.0), "a patch of kind embedding has no inverse: only maps of activations have one"),
        (
            patches.ActivationPatch.from_maps({"a": LowRankMap.without(torch.ones(4))}, Selection(modules="a")),
            "the map erases a direction",
        ),
    ],
)
def test_a_patch_without_an_inverse_is_named(patch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches.inverse(patch)


def test_a_job_without_maps_has_nothing_to_invert() -> None:
    job = read(ACT.parent / "aside.yaml", JobType, ["inverse=true"])
    with pytest.raises(ValueError, match=r"inverse: the job's model has no maps of activations"):
        run.check(Plan.of(job))


def test_a_job_below_says_its_direction_in_its_method(tmp_path: Path) -> None:
    above = tmp_path / "above.yaml"
    below = tmp_path / "below.yaml"
    below.write_text(ACT.read_text().replace("job:base.yaml", f"job:{ACT.parent / 'base.yaml'}") + "inverse: true\n")
    above.write_text(
        "name: above\nmodel: {source: 'job:below.yaml'}\nmethod: {name: none}\n"
        "evaluate: [{task: perplexity, data: {source: 'tiny:topics/test', format: text, limit: 8}}]\n"
    )
    with pytest.raises(
        (ValueError, JobError), match=r"sets inverse, which concerns its own evaluation only; set method.inverse"
    ):
        run.check(Plan.of(read(above, JobType)))
