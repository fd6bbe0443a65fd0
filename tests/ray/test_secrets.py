"""Keys and passwords that a run can see are found in nothing that it leaves: run folder, W&B files, Ray's logs, output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from steerlab import run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SECRETS = {
    "WANDB_API_KEY": "planted0" * 5,
    "HF_TOKEN": "hf_planted1planted1",
    "AWS_SECRET_ACCESS_KEY": "planted2planted2planted2",
    "AWS_SESSION_TOKEN": "planted3planted3planted3",
    "OPENAI_API_KEY": "sk-planted4planted4",
    "MLFLOW_TRACKING_PASSWORD": "planted5planted5",
}
TREE: dict[str, Any] = {
    "name": "secretive",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 16}},
    "method": {"name": "aside"},
    "train": {"steps": 2, "lr": 2e-3, "micro_batch": 4, "max_tokens": 64},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 4}],
    "track": {"wandb": {"project": "p", "mode": "offline"}, "tensorboard": True},
}


def planted(content: bytes) -> list[str]:
    return [name for name, value in SECRETS.items() if value.encode() in content]


def test_planted_secrets_are_found_nowhere(tmp_path: Path) -> None:
    short = Path(tempfile.mkdtemp(prefix="sl-"))  # the names of Ray's sockets must be short
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(TREE))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "WANDB_MODE")}
    environment |= SECRETS | {"PYTHONPATH": str(Path(run.__file__).parents[2]), "TMPDIR": str(short)}
    command = [sys.executable, "-m", "steerlab", "run", "a.yaml", "--root", str(tmp_path / "root")]
    seen: set[str] = set()
    try:
        with subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            ended = threading.Event()

            def look() -> None:
                while not ended.wait(0.5):
                    for one in psutil.process_iter(["cmdline"]):
                        seen.update(planted(" ".join(one.info["cmdline"] or ()).encode()))

            watch = threading.Thread(target=look)
            watch.start()
            output, _ = process.communicate(timeout=300)
            ended.set()
            watch.join()
        assert process.returncode == 0, output.decode()[-3000:]
        time.sleep(1)
        files = [
            path for top in (tmp_path / "root", short) for path in top.rglob("*") if path.is_file() and not path.is_symlink()
        ]
        assert any("wandb" in path.parts for path in files) and any("logs" in path.parts for path in files)
        found = {str(path): names for path in files if (names := planted(path.read_bytes()))}
        assert found == {}
        assert planted(output) == [] and seen == set()
    finally:
        shutil.rmtree(short, ignore_errors=True)
