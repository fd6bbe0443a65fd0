"""Memory and disk of a training before it starts, reckoned again by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerlab import models
from steerlab.stages import JobType, train
from steerlab.storage.plan import Estimate

TOKENS = 8 * 64  # rows of a micro-batch, tokens of a row


def job(method: dict[str, Any], *, pairs: bool = False, **more: Any) -> JobType:
    rows = {"source": "tiny:preferences/train", "format": "preference"} if pairs else {"source": "tiny:instructions/train"}
    tree = {
        "name": "a", "model": {"source": "tiny:model", "dtype": more.pop("dtype", "float32")},
        "data": {"prompt_style": "plain", "preference" if pairs else "train": rows}, "method": method,
        "train": {"steps": 1, "micro_batch": 8, "max_tokens": 64}, "evaluate": [], **more,
    }  # fmt: skip
    return JobType.model_validate(tree)


@pytest.fixture
def sizes(tiny_dir: Path) -> tuple[models.ModelFacts, Any]:
    return models.facts(tiny_dir), models.skeleton(tiny_dir)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_of_all_weights(sizes: Any, zero: int, dtype: str) -> None:
    """ZeRO divides first Adam's moments among the workers, then the gradients, then the weights."""
    facts, skeleton = sizes
    own, state = (4, 8) if dtype == "float32" else (2, 12)  # in bfloat16 Adam keeps a float32 copy of the weights
    workers = 4
    per_parameter = (
        own / (workers if zero == 3 else 1) + 4 / (workers if zero >= 2 else 1) + state / (workers if zero >= 1 else 1)
    )
    activations = 16 * own * TOKENS * facts.hidden_size * facts.num_layers
    logits = 3 * 4 * TOKENS * facts.vocab_size
    num = facts.num_parameters
    found = train.estimate(
        job({"name": "vanilla"}, dtype=dtype, scale={"workers": workers, "zero_stage": zero}), facts, skeleton
    )
    assert found == Estimate(int(num * per_parameter + logits + activations), num * own, work_bytes=3 * num * (own + state))


def test_a_head_on_a_frozen_model(sizes: Any) -> None:
    """The head's parameters train, in float32; the model lies beside them, and pairs have two sequences a row."""
    facts, skeleton = sizes
    trained = facts.hidden_size * facts.vocab_size
    found = train.estimate(job({"name": "iav"}, pairs=True), facts, skeleton)
    assert found.disk_bytes == 4 * trained and found.work_bytes == 3 * 12 * trained
    more = found.memory_bytes - (16 * trained + 4 * facts.num_parameters)
    chunk = 16 * 4 * 2 * TOKENS * facts.hidden_size * facts.num_layers
    assert more > chunk, "the activations of both sequences, and a chunk of logits"
