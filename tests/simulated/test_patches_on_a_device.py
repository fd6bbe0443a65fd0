"""Every kind of patch, and every pair of kinds, on a simulated GPU: nothing mixes devices, and the results are the CPU's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patch_zoo
import pytest
import torch

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation
from steerlab.steered.language import SteeredModel

each_form = pytest.mark.parametrize("form", patch_zoo.FORMS)
Stack = Callable[..., SteeredModel]
Models = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tiny_dir: Path, device: torch.device) -> Models:
    """The tiny model without a device and on it. Eager attention, because torch has other kernels for it on other devices."""
    return {str(place): models.load_model(tiny_dir, seed=0, attention="eager").to(place) for place in ("cpu", device)}  # type: ignore[arg-type]


@pytest.fixture
def stack(plain: Models, encoder: Encoder, tmp_path: Path) -> Iterator[Stack]:
    """A function (device, *forms) -> the tiny model there with a stack of patches that were made on the CPU, as loaded ones."""
    attached: list[SteeredModel] = []

    def made(place: torch.device | str, *forms: str) -> SteeredModel:
        torch.manual_seed(0)
        parts = tuple(patch_zoo.FORMS[form](plain["cpu"], tmp_path) for form in forms)
        attached.append(SteeredModel(plain[str(place)], encoder, parts))
        return attached[-1]

    yield made
    for steered in attached:
        steered.detach()


@pytest.fixture(scope="module")
def prompts(encoder: Encoder) -> list[Conversation]:
    """Prompts of different lengths."""
    rows = tiny.rows("instructions/test", 2)
    return [encoder.conversation(row["instruction"], row["input"] * number) for number, row in enumerate(rows)]


@each_form
def test_a_patch_writes_scores_and_is_read_as_without_a_device(
    form: str, stack: Stack, prompts: list[Conversation], device: torch.device
) -> None:
    found: list[list[Any]] = []
    for place in ("cpu", device):
        steered = stack(place, form)
        sampled = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
        found.append([
            steered.generate(prompts, max_new_tokens=3, strengths=(0.0, 0.5, 1.0), **sampled),  # type: ignore[arg-type]
            steered.token_log_probs(prompts, strength=0.5),
            *(states.tolist() for states, _ in steered.hidden_states(prompts[:1], strength=0.5)),
            steered.embeddings([5, 6, 7], 1).tolist(),
            *(weights.tolist() for weights, _ in steered.attention(prompts[:1])),
        ])  # fmt: skip
    assert found[0] == found[1]


def test_one_of_each_kind_is_one_of_each_kind(tiny_model: Any, tmp_path: Path) -> None:
    assert {patch_zoo.FORMS[form](tiny_model, tmp_path).kind for form in patch_zoo.ONE_OF_EACH} == set(patches.KINDS)


@pytest.mark.parametrize("forms", list(itertools.combinations_with_replacement(patch_zoo.ONE_OF_EACH, 2)), ids=" and ".join)
def test_a_stack_of_two_patches(
    forms: tuple[str, str], stack: Stack, prompts: list[Conversation], device: torch.device
) -> None:
    found = [stack(place, *forms).generate(prompts, max_new_tokens=3, strengths=(0.5,)) for place in ("cpu", device)]
    assert found[0] == found[1]


@each_form
def test_a_patch_on_a_device_is_saved_for_machines_without_one(
    form: str, stack: Stack, device: torch.device, tmp_path: Path
) -> None:
    steered = stack(device, form)
    patches.save(steered.patches[0], tmp_path / "patch", models.fingerprint(steered.model))
    loaded = patches.load(tmp_path / "patch")
    own = steered.patches[0].tensors()
    assert loaded.tensors().keys() == own.keys()
    for name, value in loaded.tensors().items():
        assert value.device.type == "cpu" and torch.equal(value, own[name].cpu())


def test_attention_as_torch_computes_it_takes_nothing_of_the_cpu(
    tiny_dir: Path, encoder: Encoder, prompts: list[Conversation], device: torch.device
) -> None:
    """Its masks are made by another part of transformers than eager attention's."""
    found = []
    for place in ("cpu", device):
        steered = SteeredModel(models.load_model(tiny_dir, seed=0).to(place), encoder)  # type: ignore[arg-type]
        steered.generate(prompts, max_new_tokens=2)
        found.append([torch.tensor(scored.log_prob) for scored in steered.token_log_probs(prompts)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
