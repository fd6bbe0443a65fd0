"""Fit maps one after another in a single pass: each on what the source texts cause behind all maps before it.

The AcT paper (arXiv 2410.23054, section 4) fits place l on activations produced with the maps of places 1..l-1 in force. Done
place by place that is a forward pass each, O(L^2) in work. Here every batch of source texts runs through the model once, in a
thread of its own, and stops at each place until all batches are there; the map is fitted on all of them, each applies it to
what it holds and goes on. One thread computes at a time, so temporary memory is that of one batch; what waits is one layer's
state a batch. The result is the naive procedure's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.job import Pooling, Selection
from steerlab.patches import taps
from steerlab.patches.maps import Map


class Reading(NamedTuple):
    """One batch of source texts: the model's inputs, and which tokens are pooled and which are mapped."""

    inputs: Mapping[str, object]
    read_BT: Tensor
    steered_BT: Tensor


Fit = Callable[[str, Tensor], Map | None]
"""(place, pooled activations of all source texts) -> its map; None leaves the place alone."""


def fit_in_order(
    model: nn.Module,
    places: Sequence[taps.Tap],
    selection: Selection,
    batches: Sequence[Reading],
    pooling: Pooling,
    fit: Fit,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Map]:
    """Fit a map at every place, in the order in which the model runs them, in one pass over the batches.

    Raises:
        ValueError: what `fit` raised, or a place that a forward pass does not reach or reaches twice.
    """
    walk = _Walk(list(places), batches, pooling, fit, progress)
    handles = [walk.hook(model, place, selection.side) for place in places]
    threads = [threading.Thread(target=walk.run, args=(model, number), daemon=True) for number in range(len(batches))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for handle in handles:
            handle.remove()
    if walk.error is not None:
        raise walk.error
    return walk.maps


class _Walk:
    """Batches that go through the model side by side."""

    def __init__(
        self,
        places: list[taps.Tap],
        batches: Sequence[Reading],
        pooling: Pooling,
        fit: Fit,
        progress: Callable[[int, int], None],
    ) -> None:
        self._places, self._batches, self._fit, self._progress = places, batches, fit, progress
        self._pooling: Pooling = pooling
        self._order: list[str] = []
        self._pooled: dict[int, Tensor] = {}
        self._here = threading.local()
        self._barrier = threading.Barrier(len(batches), action=self._meet)
        self._computing = threading.Lock()
        self.maps: dict[str, Map] = {}
        self.error: BaseException | None = None

    def run(self, model: nn.Module, number: int) -> None:
        """Take one batch through the model."""
        self._here.number, self._here.place = number, None
        try:
            with self._computing, torch.inference_mode():
                try:
                    model(**self._batches[number].inputs)
                except _Arrived:
                    return
            missing = [place.name for place in self._places if place.name not in self._order]
            raise ValueError(taps.did_not_run(missing, len(self._places)))
        except threading.BrokenBarrierError:
            return  # another batch failed, and said why
        except Exception as error:  # raised again in the caller's thread
            self.error = self.error or error
            self._barrier.abort()

    def hook(self, model: nn.Module, place: taps.Tap, side: str) -> RemovableHandle:
        """Stop at a place, and go on with the mapped value."""
        module, where = model.get_submodule(place.module), f"the value of {place.module}"

        def edit(value: object) -> object:
            call = models.running(model)
            z = taps.value_at(value, place.element, where)
            if call is None:
                z_BTD = taps.with_rows(z, tuple(self._batches[self._here.number].read_BT.shape))
                return taps.replaced(value, place.element, self._arrive(place.name, z_BTD).reshape(z.shape))
            if not call.is_read:
                return value
            axis = taps.feature_axis(module, z.dim())
            mapped_BTD = self._arrive(place.name, taps.as_tokens(z[call.conditional], axis))
            z_last = z.movedim(axis, -1).clone()
            z_last[call.conditional] = mapped_BTD.reshape(z_last[call.conditional].shape)
            return taps.replaced(value, place.element, z_last.movedim(-1, axis))

        if side == "input":
            return module.register_forward_pre_hook(
                lambda _m, args, kwargs: taps.rewritten(args, kwargs, edit), with_kwargs=True
            )
        return module.register_forward_hook(lambda _m, _i, output: edit(output))

    def _arrive(self, place: str, z_BTD: Tensor) -> Tensor:
        batch = self._batches[self._here.number]
        self._here.place = place
        read_BT = batch.read_BT.to(z_BTD.device)
        self._pooled[self._here.number] = taps.pool(taps.per_token(z_BTD, tuple(read_BT.shape)), read_BT, self._pooling)
        self._meeting = place
        self._computing.release()
        try:
            self._barrier.wait()
        finally:
            self._computing.acquire()
        fitted = self.maps.get(place)
        if len(self._order) == len(self._places):
            raise _Arrived
        if fitted is None:
            return z_BTD
        mapped_BTD = fitted(z_BTD.float()).to(z_BTD.dtype)
        steered_BT = taps.beside(batch.steered_BT.to(z_BTD.device), z_BTD)
        return torch.where(steered_BT.unsqueeze(-1), mapped_BTD, z_BTD)

    def _meet(self) -> None:
        """Fit the place where all batches wait; runs in one of their threads."""
        place = self._meeting
        try:
            if place in self._order:
                raise ValueError(f"{place} runs more than once in a forward pass: which of its values is meant is not clear")
            pooled_ND = torch.cat([self._pooled[number] for number in range(len(self._batches))])
            with torch.inference_mode(False):
                fitted = self._fit(place, pooled_ND.clone())
            self._order.append(place)
            if fitted is not None:
                self.maps[place] = fitted.to(pooled_ND.device)
            self._progress(len(self._order), len(self._places))
        except BaseException as error:
            self.error = error
            raise


class _Arrived(Exception):
    """Ends a forward pass behind the last place."""
