"""Fit maps one after another in a single pass, each on activations with all earlier maps applied.

The AcT paper (arXiv 2410.23054, section 4) fits the map of place l on activations that are computed with the maps of places 1
to l - 1 applied, for source and target texts alike. Done place by place, this takes one forward pass for each place, O(L^2)
work in L layers. Here every batch of texts runs through the model once, in its own thread, and waits at each place for all
other batches. Then one thread fits the map on all batches, and each thread applies it to its own activations and continues. The
maps are the same as those of the place-by-place procedure.

Only one thread computes at a time, so that the temporary memory is that of one batch. A waiting batch holds the activations of
one layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.job import Pixels, Pooling, Selection
from steerlab.patches import axes, taps, token_masks
from steerlab.patches.maps import Map, mapped_pixels


class Reading(NamedTuple):
    """One batch of texts, and masks of the tokens that the fit uses and that the maps change."""

    inputs: Mapping[str, object]
    """Keyword arguments of the model."""
    read_BT: Tensor
    """True for tokens that are pooled for the fit."""
    steered_BT: Tensor
    """True for tokens on which the maps act."""
    target_B: Tensor | None = None
    """True for target texts, False for source texts; None: the batch has source texts only."""


Fit = Callable[[str, Tensor, Tensor], Map | None]
"""(name of a place, pooled activations of all source texts, (N, D), those of all target texts, (M, D)) -> the map of the place,
or None to leave it unchanged. M is 0 if no batch has target texts."""


def fit_in_order(
    model: nn.Module,
    places: Sequence[taps.Tap],
    selection: Selection,
    batches: Sequence[Reading],
    pooling: Pooling,
    fit: Fit,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    pixels: Pixels = "pixel",
) -> dict[str, Map]:
    """Fit a map at every place, in the order in which the model runs the places, in one pass over the batches.

    Args:
        model: the model, with its other patches attached.
        places: the places to map.
        selection: only its `side` is used: whether the maps act on the inputs or the outputs of modules.
        batches: all texts that run through the model: the source texts, and the target texts too if their activations are to
            be computed with the earlier maps applied.
        pooling: how the activations of a text's `read_BT` tokens become one vector.
        fit: makes the map of one place.
        progress: called after each place with (number of places done, number of places).
        pixels: whether the maps move the mean of a channel of an image, or every pixel.

    Returns:
        The maps by place, in the order in which they were fitted.

    Raises:
        ValueError: `fit` raised it, a forward pass does not reach a place or reaches it twice, or batches reach the places in
            different orders.
    """
    walk = _Walk(list(places), batches, pooling, pixels, fit, progress)
    handles = [walk.hook(model, place, selection.side) for place in places]
    # Threads, because processes could not share the model and the maps. Each batch needs its own thread: a forward pass can
    # only be paused in the middle by blocking the thread that runs it.
    # Daemon threads, because an interrupted process would otherwise not end while threads wait for each other.
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
        # Raised after the hooks are removed, since the caller may go on using the model.
        raise walk.error
    return walk.maps


class _Walk:
    """The shared state of the threads, each of which takes one batch through the model."""

    def __init__(
        self,
        places: list[taps.Tap],
        batches: Sequence[Reading],
        pooling: Pooling,
        pixels: Pixels,
        fit: Fit,
        progress: Callable[[int, int], None],
    ) -> None:
        self._places, self._batches, self._fit, self._progress = places, batches, fit, progress
        self._pooling: Pooling = pooling
        self._pixels: Pixels = pixels
        # The order of the batches is that in which `_meet` joins their pooled activations.
        self._target_N = torch.cat([_targets(batch) for batch in batches])
        # Places in the order in which the model has run them so far. It may differ from the order of `named_modules`.
        self._order: list[str] = []
        self._pooled: dict[int, Tensor] = {}
        # Number of a batch -> place at which its thread waits.
        self._place_of: dict[int, str] = {}
        # The number of each thread's batch, thread-local because all threads run the same hooks.
        self._local = threading.local()
        # The barrier calls `_meet` in one of the threads, after the last thread has arrived and before any thread continues.
        self._barrier = threading.Barrier(len(batches), action=self._meet)
        # Held by the one thread that computes; a thread releases it before it waits at the barrier.
        self._computing = threading.Lock()
        # Needs no lock: only `_meet` writes it, while all other threads wait.
        self.maps: dict[str, Map] = {}
        # The first error of any thread, from `_meet` or `run`.
        self.error: BaseException | None = None

    def run(self, model: nn.Module, number: int) -> None:
        """Run one batch through the model, as the function of a thread."""
        self._local.number = number
        try:
            # Set in each thread, because torch keeps the gradient mode per thread, and new threads start with gradients on.
            with self._computing, torch.inference_mode():
                try:
                    # The hooks do the rest within the model's own forward pass, whatever its architecture.
                    model(**self._batches[number].inputs)
                except _AllFitted:
                    return
            # The pass ended without `_AllFitted`, so it did not reach every place.
            missing = [place.name for place in self._places if place.name not in self._order]
            raise ValueError(taps.did_not_run(missing, len(self._places)))
        except threading.BrokenBarrierError:
            return  # another thread failed, and has stored its error
        except Exception as error:  # `fit_in_order` raises it again in the caller's thread
            # Keeps an error that is stored already: another thread's, or `_meet`'s own, which the barrier raises here.
            self.error = self.error or error
            self._barrier.abort()  # otherwise the other threads would wait for this one forever

    def hook(self, model: nn.Module, place: taps.Tap, side: str) -> RemovableHandle:
        """Register a hook that waits at a place until its map is fitted, and replaces the value by the mapped one."""
        module, where = model.get_submodule(place.module), f"the value of {place.module}"

        def edit(value: object) -> object:
            call = models.running(model)  # the call of a diffusion model's denoiser; None for a language model
            z = taps.value_at(value, place.element, where)
            if call is None:
                # Routers of mixtures of experts take all tokens in one axis, (B * T, D); the masks are (B, T).
                z_BTD = axes.with_rows(z, tuple(self._batches[self._local.number].read_BT.shape))
                return taps.replaced(value, place.element, self._arrive(place.name, z_BTD).reshape(z.shape))
            # In sampler steps that are not read, no thread waits, and no map is applied.
            if not call.is_read:
                return value
            # Only rows with a prompt are read and mapped; with guidance, half of the rows have none.
            axis = axes.feature_axis(module, z.dim())
            # Only values (B, C, H, W) and (B, C, pixels) have channels; `pixels` does not apply to other values.
            pixels = self._pixels if axis == 1 and z.dim() > 2 else None
            mapped_BTD = self._arrive(place.name, axes.as_tokens(z[call.conditional], axis), pixels)
            # A clone is written, because a residual connection may still use the module's own output.
            z_last = z.movedim(axis, -1).clone()
            z_last[call.conditional] = mapped_BTD.reshape(z_last[call.conditional].shape)
            return taps.replaced(value, place.element, z_last.movedim(-1, axis))

        # The input may be passed by name, which a pre-hook sees only with `with_kwargs`.
        if side == "input":
            return module.register_forward_pre_hook(
                lambda _m, args, kwargs: taps.rewritten(args, kwargs, edit), with_kwargs=True
            )
        return module.register_forward_hook(lambda _m, _i, output: edit(output))

    def _arrive(self, place: str, z_BTD: Tensor, pixels: Pixels | None = None) -> Tensor:
        """Store this batch's pooled activations, wait for the place's map, and return the mapped activations."""
        number = self._local.number
        batch = self._batches[number]
        read_BT = batch.read_BT.to(z_BTD.device)
        # The fit needs only the pooled vectors, which take less memory: (B, D) instead of (B, T, D).
        self._pooled[number] = token_masks.pool(axes.per_token(z_BTD, tuple(read_BT.shape)), read_BT, self._pooling)
        self._place_of[number] = place
        # Released before the barrier, or the other batches could never arrive there. The last thread to arrive fits the map
        # while the others wait. Then one thread after another takes the lock, maps its own batch and runs on to the next place.
        self._computing.release()
        try:
            self._barrier.wait()
        finally:
            # Taken again even after an error, because the `with` block of `run` will release it.
            self._computing.acquire()
        # `_meet` has stored the map by now; None if `fit` leaves the place unchanged.
        fitted = self.maps.get(place)
        if len(self._order) == len(self._places):
            raise _AllFitted  # this was the last place, so the rest of the forward pass is not needed
        if fitted is None:
            return z_BTD
        # Mapped in float32, as an attached patch does it, so that later places see the same values as at inference.
        value_BTD = z_BTD.float()
        mapped_BTD = fitted(value_BTD) if pixels is None else mapped_pixels(fitted, value_BTD, pixels)
        # If the value has an axis of attention heads, the mask gets one, so that it broadcasts over heads.
        steered_BT = axes.beside(batch.steered_BT.to(z_BTD.device), z_BTD)
        # The map acts on the tokens on which it will act at inference; the fit may have used other tokens (`read_BT`).
        return torch.where(steered_BT.unsqueeze(-1), mapped_BTD.to(z_BTD.dtype), z_BTD)

    def _meet(self) -> None:
        """Fit the map of the place at which all threads wait; the barrier calls this in one of the threads."""
        places = set(self._place_of.values())
        # The place of any batch: the next lines check that all batches wait at the same one.
        place = self._place_of[0]
        try:
            if len(places) > 1:
                raise ValueError(
                    f"the batches reach {models.listed(sorted(places))} at the same time: the order in which the "
                    "model runs its modules depends on the texts, so maps cannot be fitted one after another; set "
                    "method.incremental: false"
                )
            # A module that layers share runs again: its later values would need maps of their own.
            if place in self._order:
                raise ValueError(f"{place} runs more than once in a forward pass, so it has no single value to fit a map on")
            # Joined in the order of the batches, not of the threads, so that the maps do not depend on scheduling.
            pooled_ND = torch.cat([self._pooled[number] for number in range(len(self._batches))])
            target_N = self._target_N.to(pooled_ND.device)
            # A fit may need gradients. Autograd refuses inference tensors, but not copies that are made outside inference mode.
            with torch.inference_mode(False):
                fitted = self._fit(place, pooled_ND[~target_N].clone(), pooled_ND[target_N].clone())
            # Recorded even if the place gets no map, because `_order` lists the places that have run.
            self._order.append(place)
            if fitted is not None:
                # Some fits compute on the CPU (NumPy, scikit-learn), but the map acts on the model's device.
                self.maps[place] = fitted.to(pooled_ND.device)
            self._progress(len(self._order), len(self._places))
        except BaseException as error:
            # An exception in the barrier's action breaks the barrier: all other threads get BrokenBarrierError.
            self.error = error
            raise


def _targets(batch: Reading) -> Tensor:
    """Return for each text of a batch whether it is a target text, (B,) bool on the CPU."""
    return torch.zeros(len(batch.read_BT), dtype=torch.bool) if batch.target_B is None else batch.target_B.cpu()


class _AllFitted(Exception):
    """Ends a forward pass once the map of the last place is fitted."""
