"""The simulated GPU itself: it refuses what CUDA refuses, counts what the program waits for, and computes what the CPU does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import simulated_device
import torch
from simulated_device import DeviceMix, counted
from torch import Tensor, nn

CPU = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + CPU,
        lambda x: torch.cat([x, CPU]),
        lambda x: x @ CPU.T,
        lambda x: torch.where(x > 0, x, CPU),
        lambda x: x.index_copy(0, torch.tensor([0]), x[:1]),
        lambda x: CPU[x.long()],
        lambda x: nn.functional.linear(x, CPU),
        lambda x: x.clone().masked_fill_(CPU > 0, 1.0),
        lambda x: nn.functional.embedding(torch.tensor([0]), x),
    ],
)  # fmt: skip
def test_tensors_of_two_devices_do_not_mix(mix: Callable[[Tensor], Tensor], device: torch.device) -> None:
    with pytest.raises(DeviceMix):
        mix(CPU.to(device))
    with torch.inference_mode(), pytest.raises(DeviceMix):
        mix(CPU.to(device))


def test_what_cuda_allows_is_allowed(device: torch.device) -> None:
    x = CPU.to(device)
    for allowed in (x * torch.tensor(2.0), x[torch.tensor([1])], torch.where(x > 1, x, torch.tensor(0.0)), x / 2):
        assert allowed.device == device
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())


WAITS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "a number": (lambda x: float(x[0, 0]), 1),
    "a condition": (lambda x: bool((x > 0).all()), 1),
    "a list": (lambda x: x.tolist(), 1),
    "a copy down": (lambda x: x.cpu(), 1),
    "a copy up": (lambda x: CPU.to(x.device), 1),
    "a copy up that is not waited for": (lambda x: CPU.to(x.device, non_blocking=True), 0),
    "a new tensor of values": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
    "a new tensor without values": (lambda x: torch.zeros(3, device=x.device), 0),
    "a mask as an index": (lambda x: x[x > 1], 1),
    "a number written": (lambda x: x.masked_fill(x > 1, 0.0), 0),
    "the places of a mask": (lambda x: (x > 1).nonzero(), 1),
    "what two have in common": (lambda x: torch.equal(x, x), 1),
    "arithmetic": (lambda x: (x @ x.T).softmax(-1).sort().values, 0),
}


@pytest.mark.parametrize("what", WAITS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_waits_are_counted(what: str, mode: Callable[[], torch.inference_mode], device: torch.device) -> None:
    x, (work, num_waits) = CPU.to(device), WAITS[what]
    with mode(), counted() as traffic:
        work(x)
    assert traffic.num_waits == num_waits, traffic


def test_bytes_are_counted_and_their_places_named(device: torch.device) -> None:
    with counted() as traffic:
        CPU.to(device).cpu()
    assert (traffic.up_bytes, traffic.down_bytes) == (24, 24)
    assert all("test_simulated_device.py" in place for place in traffic.waits)


def test_a_module_trains_as_without_the_device(device: torch.device) -> None:
    """Parameters keep their identity when the module moves, as optimizers made before it need."""
    trained = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1))
        first = module[0].weight
        optimizer = torch.optim.Adam(module.parameters(), 0.1)
        module.to(place)
        assert module[0].weight is first and isinstance(first, nn.Parameter)
        for _ in range(3):
            optimizer.zero_grad()
            out = module(CPU.to(place))
            out[:, 0] = 2 * out[:, 0]  # written through a view
            out.sum().backward()
            optimizer.step()
        trained.append({name: value.cpu() for name, value in module.state_dict().items()})
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], msg=name)


def test_a_mix_in_a_backward_pass_is_raised_at_its_end() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * CPU

    with pytest.raises(DeviceMix, match="in a backward pass"), simulated_device.present() as device:
        Wrong.apply(CPU.to(device).requires_grad_()).sum().backward()


def test_torch_knows_no_device_outside() -> None:
    with simulated_device.present():
        assert torch.accelerator.is_available()
    assert not torch.accelerator.is_available() and not torch.cuda.is_available()
