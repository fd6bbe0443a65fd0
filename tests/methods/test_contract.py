"""One contract for every entry of the table of methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import generation, models, patches, tinyworld
from steerlab.methods import METHODS
from steerlab.methods.contract import trained_parameters
from steerlab.tokens import Batch, Encoder, collate

each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def batch(encoder: Encoder) -> Batch:
    rows = tinyworld.rows("instructions/train", 6)
    return collate([encoder.encode(encoder.from_row(r, "instruction")) for r in rows], encoder.pad_id)


def make(name: str, model: PreTrainedModel) -> torch.nn.Module:
    torch.manual_seed(0)
    return METHODS[name].module(model, METHODS[name].Config())


@each_method
def test_the_config_knows_its_name_and_round_trips(name: str) -> None:
    config = METHODS[name].Config()
    assert config.name == name
    assert METHODS[name].Config.model_validate(config.model_dump(mode="json")) == config


@each_method
def test_every_field_is_documented(name: str) -> None:
    undocumented = [field for field, info in METHODS[name].Config.model_fields.items() if not info.description]
    assert undocumented == []


@each_method
def test_the_loss_is_a_sum_over_targets(name: str, tiny_model: PreTrainedModel, batch: Batch) -> None:
    """Any split of a batch adds up to the same loss, so passes and workers may be split at will."""
    module = make(name, tiny_model)
    whole = module(batch).total
    parts = [Batch(*(getattr(batch, f)[i : i + 2] for f in batch.__dataclass_fields__)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(module(part).total for part in parts), whole, rtol=1e-5, atol=1e-4)


@each_method
def test_steps_lower_the_loss_and_move_only_what_trains(name: str, tiny_model: PreTrainedModel, batch: Batch) -> None:
    module = make(name, tiny_model)
    trained = trained_parameters(module)
    assert trained
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if n not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for step in range(4):
        module.on_step(step, 10.0)  # type: ignore[operator]
        loss = module(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for n, p in module.named_parameters() if n in frozen)
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(module.named_parameters())[n], value) for n, value in frozen.items())


@each_method
def test_the_saved_result_gives_the_same_logits(
    name: str, tiny_model: PreTrainedModel, batch: Batch, encoder: Encoder, tmp_path: Path
) -> None:
    """What is trained, saved and loaded again is one model: the loss through the loaded patch equals the trained one's."""
    module = make(name, tiny_model).eval()
    with torch.no_grad():
        expected = (
            module.model(**batch.model_inputs, roles=batch.roles).logits
            if module.patch
            else module.model(**batch.model_inputs).logits
        )
    models.save_model(tiny_model, encoder.tokenizer, tmp_path / "model")
    (tmp_path / "prompt.json").write_text('{"prompt_style": "plain", "response_role": "data"}')
    if module.patch is not None:
        patches.save(module.patch, tmp_path / "patch", models.fingerprint(tiny_model))
    loaded = generation.load(tmp_path)
    assert bool(loaded.patches) == METHODS[name].leaves_patch
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch.model_inputs, roles=batch.roles).logits, expected)


@each_method
def test_gradient_checkpointing_changes_no_gradient(name: str, tiny_dir: Path, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.load_model(tiny_dir, seed=0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = make(name, model).train()
        module(batch).total.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][n], rtol=1e-5, atol=1e-5)


@each_method
def test_no_other_file_names_the_method(name: str) -> None:
    """The loop, the stages and the tasks never ask which method they serve."""
    package = Path(generation.__file__).parent
    for folder in ("training", "stages", "evaluation"):
        for file in (package / folder).rglob("*.py"):
            assert f'"{name}"' not in file.read_text(), f"{file} names the method {name}"
