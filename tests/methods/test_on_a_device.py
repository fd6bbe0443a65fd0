"""Training steps of every method on a simulated GPU: nothing mixes devices, and the steps are those without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import patch_zoo
import pytest
import torch
from simulated_device import Traffic, counted
from test_contract import ADAPTED, SAMPLER, TRAINED, Make, batch, config_of, lora_of, make, model_dir  # noqa: F401

from steerlab import models
from steerlab.methods import METHODS
from steerlab.methods.contract import trained_parameters

each_trained = pytest.mark.parametrize(("name", "kind"), TRAINED)


@pytest.fixture
def model(model_dir: Path) -> Any:  # noqa: F811
    """The model on the CPU, with eager attention: torch has other kernels for its own attention on other devices."""
    return models.load_model(model_dir, seed=0, sampler=SAMPLER, attention="eager")


def two_steps(module: Any, batch: Any, place: torch.device | str) -> tuple[list[torch.Tensor], Traffic]:  # noqa: F811
    """Return the losses of two steps and the weights that they end in, and what went to the device in the second step."""
    optimizer = torch.optim.SGD(trained_parameters(module).values(), lr=1e-2)
    losses = []
    for step in range(2):
        with counted() as traffic:
            module.on_step(step, 10.0)
            module.before_pass(True)
            loss = module(batch.to(place)).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.after_step(1e-2)
        losses.append(loss.detach().cpu())
    if module.patch is None:
        return losses, traffic
    finished = module.finished(module.patch.state_dict())
    return [*losses, *(value.cpu() for _, value in sorted(finished.tensors().items()))], traffic


def on(
    place: torch.device | str,
    name: str,
    kind: str,
    make: Make,  # noqa: F811
    model_dir: Path,  # noqa: F811
    below: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Any:
    """Return a trainee as the training loop makes it: its model was on a device before, patches below it are as loaded."""
    model: Any = models.load_model(model_dir, seed=0, sampler=SAMPLER, attention="eager")
    torch.manual_seed(0)
    carried = () if below is None else (below(model),)
    return make(name, kind, model.to(place), carried, **settings).to(place)


def assert_same(found: list[list[torch.Tensor]]) -> None:
    # Not to the last bit: torch takes other kernels for tensors of a subclass, such as a product and a sum instead of both.
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@each_trained
def test_a_step(name: str, kind: str, make: Make, model_dir: Path, batch: Any, device: torch.device) -> None:  # noqa: F811
    found = [two_steps(on(place, name, kind, make, model_dir), batch, place) for place in ("cpu", device)]
    assert_same([results for results, _ in found])
    traffic = found[1][1]
    # A pass draws images where LinEAS trains on a pipeline: its scheduler looks at numbers in each of its steps (diffusers).
    assert traffic.num_waits <= (1 if (name, kind) != ("lineas", "diffusion") else 4 * SAMPLER["steps"]), traffic
    # The rows, and nothing that stays the same, such as the bases of WaRP: they alone are 3.7 MB here.
    assert traffic.up_bytes < 50_000, traffic


SEVERAL_MODELS = ("dpo", "genarm", "iav")
"""Methods with a second model, or that run the model before they train: the others are tested with `-m slow`."""


def first(pairs: Iterable[tuple[str, ...]]) -> list[Any]:
    return [pytest.param(*pair, marks=() if pair[0] in SEVERAL_MODELS else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("name", "kind"), first(ADAPTED))
def test_adapters(name: str, kind: str, make: Make, model_dir: Path, batch: Any, device: torch.device) -> None:  # noqa: F811
    two_steps(on(device, name, kind, make, model_dir, **lora_of(name)), batch, device)


ON_PATCHES = [pair for pair in TRAINED if not METHODS[pair[0]].leaves_model and pair[1] == "causal_lm"]
CARRIES = [
    (*pair, trains, form)
    for pair in ON_PATCHES
    for trains in ("itself", "adapters")
    for form in ("maps with bounds on some roles", "second model")
    if trains == "itself" or pair in ADAPTED
]


@pytest.mark.parametrize(("name", "kind", "trains", "form"), first(CARRIES))
def test_a_model_that_carries_a_patch(
    name: str,
    kind: str,
    trains: str,
    form: str,
    make: Make,  # noqa: F811
    model_dir: Path,  # noqa: F811
    batch: Any,  # noqa: F811
    device: torch.device,
    tmp_path: Path,
) -> None:
    """Some methods run the model before they train, others copy it: its patches are on its device by then."""
    settings = lora_of(name) if trains == "adapters" else {}
    module = on(device, name, kind, make, model_dir, lambda model: patch_zoo.FORMS[form](model, tmp_path), **settings)
    module(batch.to(device)).total.backward()


@pytest.mark.parametrize("pooling", ["max", "min"])
@pytest.mark.parametrize(("name", "kind"), [("lineas", "diffusion")])
def test_poolings_of_images(
    name: str,
    kind: str,
    pooling: str,
    make: Make,  # noqa: F811
    model_dir: Path,  # noqa: F811
    batch: Any,  # noqa: F811
    device: torch.device,
) -> None:
    module = on(device, name, kind, make, model_dir, pooling=pooling)
    module(batch.to(device)).total.backward()
