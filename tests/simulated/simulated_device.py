"""A simulated GPU: tensors that say they are on `simulated:0` and compute on the CPU, where a program's mistakes show.

What a GPU refuses raises here: an operation on tensors of two devices, `numpy()` of a tensor on the device, a generator of the
CPU for random numbers there. What costs time on a GPU is counted: every wait of the program for the device, and every copy
between main memory and the device, by the line of the program that caused it. Results are those of the CPU to the last bit, so
that a computation on the device is compared with the same one without it.

It shows nothing of a GPU's numerics, memory or speed, and it is not called "cuda": what a program does for CUDA alone does not
run. It needs no compiler: torch lets Python implement its spare backend, and a subclass of Tensor does all operations on it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "simulated"
_aten = torch.ops.aten


class DeviceMix(RuntimeError):
    """An operation got tensors of two devices."""


_in_backward: list[DeviceMix] = []
"""What was refused in backward passes. There, any error ends the process with a device that Python implements (torch 2.13): the
operation goes on, and `present` raises the first of them."""


def _refuse(message: str) -> None:
    """Raise DeviceMix, in a backward pass later."""
    if torch._C._current_graph_task_id() < 0:
        raise DeviceMix(message)
    _in_backward.append(DeviceMix(f"in a backward pass: {message}"))


@dataclass
class Traffic:
    """What went between the program and the device since the start of `counted`."""

    waits: Counter[str] = field(default_factory=Counter)
    """Places in the program that waited for the device to finish all that it was given: reading a value, finding the size of a
    result, a copy from pageable memory. How often, by kind and line."""
    up_bytes: int = 0
    """Bytes copied from main memory to the device."""
    down_bytes: int = 0
    """Bytes copied from the device to main memory."""

    @property
    def num_waits(self) -> int:
        """Number of all waits."""
        return self.waits.total()

    def __str__(self) -> str:
        lines = [f"{count:6d} {place}" for place, count in self.waits.most_common()]
        return "\n".join([f"{self.num_waits} waits, {self.up_bytes} bytes up, {self.down_bytes} bytes down", *lines])


_traffic = Traffic()
_counting = False


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what goes between the program and the device in this context."""
    global _traffic, _counting
    before = _traffic, _counting
    _traffic, _counting = Traffic(), True
    try:
        yield _traffic
    finally:
        _traffic, _counting = before


def _wait(kind: str) -> None:
    if _counting:
        _traffic.waits[f"{kind} at {_place()}"] += 1


def _place() -> str:
    """Return the innermost line of the platform that is running, or of a library that it called."""
    frame, other = sys._getframe(2), "?"
    while frame is not None:
        path = frame.f_code.co_filename
        if "/platform/steerlab/" in path:
            return f"{path.rpartition('/platform/')[2]}:{frame.f_lineno}"
        if other == "?" and "/torch/" not in path and path != __file__:
            other = f"{path.rpartition('/site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other


class OnDevice(Tensor):
    """A tensor of the simulated device; `inner` is the tensor of the CPU that holds its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        assert not isinstance(inner, OnDevice)
        outer = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            # There, composite operations arrive whole and tensors have no versions, which subclasses cannot be without.
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})

    # `Module.to` moves a parameter by exchanging its insides with those of the moved one, as for all such subclasses.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _spec: None, _size: Any, _stride: Any) -> OnDevice:
        return OnDevice(inner["inner"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.inner.detach()!r} on {NAME}"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        if id(self) not in memo:
            copy = OnDevice(self.inner.detach().clone()).requires_grad_(self.requires_grad)
            copy._is_param = isinstance(self, torch.nn.Parameter)  # type: ignore[attr-defined]
            memo[id(self)] = copy
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _wait("tolist")
        _down(self.inner)
        return self.inner.detach().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise DeviceMix("the data of a tensor on the device is replaced by one of the CPU")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner


def _down(value: Tensor) -> None:
    _traffic.down_bytes += value.numel() * value.element_size()


def _up(value: Tensor) -> None:
    _traffic.up_bytes += value.numel() * value.element_size()


_INDEXED = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor, _aten._unsafe_index_put.default,
}  # fmt: skip
"""Operations whose indices may lie on the CPU: they are copied to the device."""
_SIZED_BY_VALUES = {
    _aten.nonzero.default, _aten.masked_select.default, _aten.unique_consecutive.default, _aten._unique2.default,
    _aten.unique_dim.default, _aten.bincount.default, _aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operations whose result has a size that depends on values: the program waits for it."""
_READ = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
"""Operations that return a value to the program."""
_CHECKED = {
    _aten._linalg_eigh.default, _aten._linalg_svd.default, _aten.linalg_inv_ex.default, _aten._linalg_solve_ex.default,
    _aten.linalg_cholesky_ex.default,
}  # fmt: skip
"""Decompositions: CUDA's libraries report failures by a value that the program reads."""
_WAITS = _READ | _SIZED_BY_VALUES | _CHECKED
_NO_NUMBERS = {
    _aten.cat.default, _aten.stack.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.gather.default,
    _aten.embedding.default,
}  # fmt: skip
"""Operations that take no tensor of the CPU at all; others take one without axes as a number."""


def _inner(value: Any) -> Any:
    """Return an argument with the tensors inside of those of the device; torch's own walk over trees takes most of a run."""
    if isinstance(value, OnDevice):
        return value.inner
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value


def _outer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, OnDevice) else OnDevice(value)
    return type(value)(map(_outer, value)) if type(value) in (list, tuple) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the tensors inside, after what a GPU would have refused, and counted what it would wait for."""
    if func is _aten._to_copy.default:
        return _moved(args[0], **kwargs)
    if func is _aten.copy_.default:
        return _copied(*args, **kwargs)
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    inside = [value for value in tensors if isinstance(value, OnDevice)]
    device = kwargs.get("device")
    is_outside = torch.device(device).type == NAME if device is not None else bool(inside)
    _check_devices(func, args, tensors, inside)
    _check_generator(args, kwargs, is_outside)
    if inside and func in _WAITS:
        _wait(func.__name__)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*map(_inner, args), **{name: _inner(value) for name, value in kwargs.items()})
    if not is_outside or func in _READ:
        return result
    return _aliased(func, args, kwargs, _outer(result))


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the place and name of the argument that each result of an operation is, of those that write into arguments."""
    schema = func._schema
    written = {
        name: (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for name in argument.alias_info.before_set
    }
    return tuple(written[next(iter(result.alias_info.before_set))] for result in schema.returns) if written else ()


def _aliased(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return the arguments themselves for results that an operation wrote into them."""
    written = _written(func)
    if not written:
        return result
    own = tuple(args[place] if place < len(args) else kwargs[name] for place, name in written)
    for value in own:
        _refresh(value)
    return own if isinstance(result, tuple) else own[0]


def _refresh(value: Any) -> None:
    """Refuse what changed its shape in place, which the tensor outside would not show."""
    if isinstance(value, OnDevice) and value.shape != value.inner.shape:
        raise NotImplementedError("the simulated device does not resize tensors in place")


def _moved(source: Tensor, *, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    target = source.device if device is None else torch.device(device)
    if target.type == "meta":
        return _aten._to_copy.default(_inner(source), device=target, **options)
    options.pop("pin_memory", None)
    values = _aten._to_copy.default(_inner(source), **options)
    _note(isinstance(source, OnDevice), target.type == NAME, values, non_blocking)
    return OnDevice(values) if target.type == NAME else values


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _note(isinstance(source, OnDevice), isinstance(target, OnDevice), _inner(source), non_blocking)
    _inner(target).copy_(_inner(source))
    return target


def _note(was_on_device: bool, is_on_device: bool, values: Tensor, non_blocking: bool) -> None:
    """Count a copy between main memory and the device."""
    if not values.numel():
        return  # nothing is copied
    if was_on_device and not is_on_device:
        _down(values)
        _wait("copy down")
    elif is_on_device and not was_on_device and values.device.type == "cpu":
        _up(values)
        # torch waits for the stream after a copy, unless it was told not to.
        if not non_blocking:
            _wait("copy up")


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor], inside: list[OnDevice]) -> None:
    """Raise DeviceMix for tensors of two devices that CUDA would refuse."""
    here = [value for value in tensors if not isinstance(value, OnDevice) and value.device.type == "cpu"]
    if func in _INDEXED:
        indexed, indices = args[0], list(_tensors(args[1]))
        outside = isinstance(indexed, OnDevice)
        if not outside and any(isinstance(index, OnDevice) for index in indices):
            _refuse(f"{func}: indices on {NAME}, the indexed tensor on the CPU")
        for index in indices if outside else ():
            if not isinstance(index, OnDevice):
                _up(index)
                _wait("copy of an index up")
            if index.dtype in (torch.bool, torch.uint8):
                _wait("nonzero of a mask")
        values = args[2] if len(args) > 2 else None
        if isinstance(values, Tensor) and isinstance(values, OnDevice) != outside and values.dim():
            _refuse(f"{func}: values on {values.device}, the indexed tensor on {indexed.device}")
        return
    if not inside or not here:
        return
    numbers_only = all(value.dim() == 0 for value in here) and func not in _NO_NUMBERS
    if not numbers_only:
        _refuse(f"{func}: " + ", ".join(f"{tuple(value.shape)} on {value.device}" for value in tensors))


def _check_generator(args: tuple[Any, ...], kwargs: dict[str, Any], is_outside: bool) -> None:
    generators = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
    if generators and is_outside:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


class _Backend:
    """What torch asks of a device's module, `torch.simulated`."""

    available = False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.available

    def device_count(self) -> int:
        return int(self.available)

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # random numbers are drawn on the CPU, whose generator torch seeds itself

    def get_rng_state(self, *_: object) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: object) -> None:
        torch.set_rng_state(state)

    def synchronize(self, *_: object) -> None:
        _wait("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_backend = _Backend()
_library: torch.library.Library | None = None
# Kept for as long as the process: torch (2.13) holds pointers to them and no references.
_hook, _guard = backend_registration._DummyPrivateUse1Hook(), backend_registration._DummyDeviceGuard()


def _empty(size: Any, **options: Any) -> Tensor:
    layout = options.get("memory_format") or torch.contiguous_format
    return OnDevice(torch.empty(size, dtype=options.get("dtype"), memory_format=layout))


def _empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _maker(operation: Any) -> Callable[..., Tensor]:
    """Return a function that makes the result of an operation without tensors, such as arange, on the device."""
    return lambda *args, **kwargs: OnDevice(operation(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": None}))


_MAKERS = (
    "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace", "randperm", "randperm.generator",
    "tril_indices", "triu_indices",
)  # fmt: skip
"""Operations that make tensors by resizing an empty one, which cannot be done to a subclass."""


def _register() -> None:
    """Make the device known to torch, once in a process."""
    global _library
    if _library is not None:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_backend, hook=_hook, device_guard=_guard)
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    # `torch.tensor` copies without asking subclasses.
    _library.impl("_copy_from", lambda source, target, wait=False: _copied(target, source, wait), "PrivateUse1")
    for name in _MAKERS:
        packet, _, overload = name.partition(".")
        _library.impl(name, _maker(getattr(getattr(_aten, packet), overload or "default")), "PrivateUse1")


@contextmanager
def present() -> Iterator[torch.device]:
    """Provide the device in this context; outside of it torch answers that no such device is available."""
    _register()
    _backend.available = True
    try:
        # Backward passes in the thread that asks for them: those of a device have a thread of their own, which torch starts for
        # the devices that it knows at the first backward pass of a process.
        with torch.autograd.set_multithreading_enabled(False):
            yield torch.device(NAME, 0)
        if _in_backward:
            raise _in_backward[0]
    finally:
        _backend.available = False
        _in_backward.clear()
