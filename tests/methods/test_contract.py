"""One contract for every entry of the table of methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import generation, models, patches, tinyworld
from steerlab.methods import METHODS
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.tokens import Batch, Encoder, collate, encode_data

each_method = pytest.mark.parametrize("name", METHODS)
each_trained = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.module])
each_fitted = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.fit])
# LinEAS compares whole distributions; WaRP's gradients of a step are one, its loss is vanilla's.
additive = pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.module and n not in ("lineas", "warp")])


@pytest.fixture
def batch(name: str, encoder: Encoder) -> Batch:
    """Rows of the kind that the method trains on."""
    kind, data_format = KINDS.get(METHODS[name].trains_on, ("instructions", "instruction"))
    rows = encode_data(encoder, tinyworld.rows(f"{kind}/train", 6), data_format, 64).rows
    return collate(rows, encoder.pad_id, loss_on="response" if data_format == "preference" else "all", numbers=range(6))


KINDS = {"preference": ("preferences", "preference")}


Make = Callable[[str, PreTrainedModel], Any]


@pytest.fixture
def make(extracted: Any, prepared: Any) -> Make:
    """A function (name, model) -> trainee, with what the method reads and prepares, of other texts."""

    def trainee(name: str, model: PreTrainedModel) -> torch.nn.Module:
        method = METHODS[name]
        texts = [row["text"] for row in tinyworld.rows("topics/train", 8)]
        read = {role: extracted(model, texts) for role in method.reads(method.Config())}
        before = prepared(method, method.Config(), model, tinyworld.rows("refusals/train", 8))
        torch.manual_seed(0)
        assert method.module is not None
        return method.module(model, method.Config(), Inputs(activations=read, prepared=before))

    return trainee


@each_method
def test_the_config_knows_its_name_and_round_trips(name: str) -> None:
    config = METHODS[name].Config()
    assert config.name == name
    assert METHODS[name].Config.model_validate(config.model_dump(mode="json")) == config


@each_method
def test_every_field_is_documented(name: str) -> None:
    undocumented = [field for field, info in METHODS[name].Config.model_fields.items() if not info.description]
    assert undocumented == []


@additive
def test_the_loss_is_a_sum_over_targets(name: str, make: Make, tiny_model: PreTrainedModel, batch: Batch) -> None:
    """Any split of a batch adds up to the same loss, so passes and workers may be split at will."""
    module = make(name, tiny_model)
    whole = module(batch).total
    parts = [Batch(*(getattr(batch, f)[i : i + 2] for f in batch.__dataclass_fields__)) for i in range(0, len(batch.labels), 2)]
    torch.testing.assert_close(sum(module(part).total for part in parts), whole, rtol=1e-5, atol=1e-4)


@each_trained
def test_steps_lower_the_loss_and_move_only_what_trains(
    name: str, make: Make, tiny_model: PreTrainedModel, batch: Batch
) -> None:
    module = make(name, tiny_model)
    trained = trained_parameters(module)
    assert trained
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if n not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for step in range(4):
        module.on_step(step, 10.0)  # type: ignore[operator]
        METHODS[name].before_pass(module, True)
        loss = module(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for n, p in module.named_parameters() if n in frozen)
        optimizer.step()
        METHODS[name].after_step(module, 1e-3)
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(module.named_parameters())[n], value) for n, value in frozen.items())


@each_trained
def test_the_saved_result_gives_the_same_logits(
    name: str, make: Make, tiny_model: PreTrainedModel, batch: Batch, encoder: Encoder, tmp_path: Path
) -> None:
    """What is trained, saved and loaded again is one model: the loss through the loaded patch equals the trained one's."""
    method, fingerprint = METHODS[name], models.fingerprint(tiny_model)
    models.save_model(tiny_model, encoder.tokenizer, tmp_path / "model")
    (tmp_path / "prompt.json").write_text('{"prompt_style": "plain", "response_role": "data"}')
    module = make(name, tiny_model).eval()
    inputs = batch.patched_inputs if module.patch else batch.model_inputs
    with torch.no_grad():
        expected = module.model(**inputs).logits
    if module.patch is not None:
        patch = method.finished(module, module.patch.state_dict()) if method.finished else module.patch
        patches.save(patch, tmp_path / "patch", fingerprint)
    loaded = generation.load(tmp_path)
    assert bool(loaded.patches) == METHODS[name].leaves_patch
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch.patched_inputs).logits, expected)


@each_fitted
def test_a_fit_maps_every_place_it_names_and_moves_source_towards_target(name: str) -> None:
    """Linear in each neuron: after the map the source's mean lies nearer to the target's, at strength 1."""
    generator = torch.Generator().manual_seed(0)
    source = {place: torch.randn(16, 6, generator=generator).abs() + 1 for place in ("a", "b", "c")}
    target = {place: 0.5 * torch.randn(12, 6, generator=generator).abs() for place in ("a", "b", "c")}
    method = METHODS[name]
    assert method.fit is not None
    maps = method.fit(method.Config(), source, target)
    assert maps and set(maps) <= set(source)
    for place, fitted in maps.items():
        before, after = (x.mean(0).sub(target[place].mean(0)).norm() for x in (source[place], fitted(source[place])))
        assert after < before
    again = method.fit(method.Config(), source, target)
    assert all(torch.equal(maps[place].shift_D, again[place].shift_D) for place in maps)


@each_fitted
def test_a_fit_refuses_what_says_nothing(name: str) -> None:
    method = METHODS[name]
    assert method.fit is not None
    few, many = {"a": torch.randn(3, 4)}, {"a": torch.randn(8, 4)}
    with pytest.raises(ValueError, match="3 samples"):
        method.fit(method.Config(), few, many)
    broken = {"a": torch.full((8, 4), torch.nan)}
    with pytest.raises(ValueError, match="row 0, neuron 0 is nan"):
        method.fit(method.Config(), broken, many)


@each_trained
def test_gradient_checkpointing_changes_no_gradient(name: str, make: Make, tiny_dir: Path, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.load_model(tiny_dir, seed=0).train()
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = make(name, model).train()
        module(batch).total.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])  # which is a pooling, too
def test_no_other_file_names_the_method(name: str) -> None:
    """The loop, the stages and the tasks never ask which method they serve."""
    package = Path(generation.__file__).parent
    for folder in ("training", "stages", "evaluation"):
        for file in (package / folder).rglob("*.py"):
            assert f'"{name}"' not in file.read_text(), f"{file} names the method {name}"
