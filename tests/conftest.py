"""Small real models, made from configs, shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated_device
import torch
from transformers import PreTrainedModel

from steerlab.data.worlds import pixels, tiny_checkpoint
from steerlab.inputs.encoding import Encoder
from steerlab.models import load_model, load_tokenizer


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each file of tests on a cluster in one process where several run the suite: its tests share what they have made.

    pytest-xdist's own groups (3.8, --dist loadgroup) have no effect with pytest 9.2, in which a test's id cannot be changed.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if nodeid.startswith("tests/ray/") else nodeid

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """A simulated GPU; torch has no such device outside of the tests of a file that uses it."""
    with simulated_device.present() as device:
        yield device


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the tiny world: config and tokenizer, no weights."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write_model(directory)
    return directory


@pytest.fixture
def tiny_model(tiny_dir: Path) -> PreTrainedModel:
    """The tiny world's architecture with random weights, the same in every test."""
    return load_model(tiny_dir, seed=0)


@pytest.fixture(scope="session")
def encoder(tiny_dir: Path) -> Encoder:
    """The tiny world's tokenizer with plain prompts."""
    return Encoder(load_tokenizer(tiny_dir), prompt_style="plain")


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that draws 8 x 8 digits from captions: configs, no weights."""
    directory = tmp_path_factory.mktemp("digits")
    pixels.write_model("digits-model", directory)
    return directory


@pytest.fixture
def weights_equal() -> object:
    """A comparison of two state dicts, bit for bit."""

    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return equal
