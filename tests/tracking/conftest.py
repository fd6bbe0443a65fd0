"""The stand-in for W&B's server that the tests of this folder talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import standin

from steerlab.tracking import writer_process


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Standin]:
    """A server on this machine, and the environment that leads the client to it."""
    with standin.serving() as state:
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        writer_process.close(30)  # a writer has its server from the environment that it starts in
        yield state
        writer_process.close(120)
