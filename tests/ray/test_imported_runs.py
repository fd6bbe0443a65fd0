"""Jobs whose patch another program has made, on a real cluster: checked before the start, measured, and exported again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from steerlab import cli, job, models, run, tracking
from steerlab.data import sources
from steerlab.patches.foreign import control_vectors
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def tree(source: Path, **changes: Any) -> dict[str, Any]:
    task = {"task": "perplexity", "source": "tiny:instructions/test", "limit": 8, "strengths": [1.0, 0.0, 0.5]}
    return {
        "name": "theirs",
        "model": {"source": "tiny:model"},
        "data": {"prompt_style": "plain"},
        "method": {"name": "imported", "source": str(source)},
        "evaluate": [task],
        "track": {"wandb": {"project": "p", "mode": "offline"}},
        **changes,
    }


def do(store: Store, folder: Path, source: Path) -> run.Run:
    planned = Plan.of(job.validate(tree(source), JobType, folder / "a.yaml"))
    run.check(planned)
    return run.execute(planned, store, plan.Listener())


def test_a_vector_goes_in_and_comes_out(cluster: None, tmp_path: Path) -> None:
    width = models.facts(sources.fetch("tiny:model")).hidden_size
    vectors = {n: torch.randn(width, generator=torch.Generator().manual_seed(n)) for n in (1, 2)}
    control_vectors.write(tmp_path / "v.gguf", vectors, "llama")
    store = Store.open(str(tmp_path / "root"))
    done = do(store, tmp_path, tmp_path / "v.gguf")
    assert [record.stage.name for record in done.records] == ["assemble", "evaluate"]
    found = {strength: metrics["perplexity/value"]["value"] for strength, metrics in done.summary["strengths"].items()}
    assert len(found) == 3 and len(set(found.values())) == 3, "the strength counts"
    # Moved elsewhere, the same file is the same artifact.
    (tmp_path / "v.gguf").rename(tmp_path / "w.gguf")
    again = do(store, tmp_path, tmp_path / "w.gguf")
    assert {record.status for record in again.records} == {"cached"}
    assert len(tracking.spools_of(tmp_path / "root" / done.folder)) == 3, "a point for each strength"
    out = CliRunner().invoke(cli.app, ["export", f"{store.root}/{done.folder}", str(tmp_path / "out"), "--format", "gguf"])
    assert out.exit_code == 0, out.output
    back = control_vectors.read(tmp_path / "out/vector.gguf").vectors
    assert back.keys() == vectors.keys() and all(torch.equal(back[n], vectors[n]) for n in back)
    assert "| perplexity/value |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({1: torch.ones(7)}, "method.source: .*direction.1 has width 7"),
        ({90: torch.ones(8)}, "method.source: .*direction for layer 90"),
    ],
)
def test_a_file_for_another_model_is_refused_before_the_start(
    vectors: dict[int, torch.Tensor], message: str, tmp_path: Path
) -> None:
    control_vectors.write(tmp_path / "v.gguf", vectors, "llama")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree(tmp_path / "v.gguf")))
    result = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "a.yaml"), "--root", str(tmp_path / "root")])
    assert result.exit_code == 2
    with pytest.raises(ValueError, match=message):
        run.check(Plan.of(job.read(tmp_path / "a.yaml", JobType)))
