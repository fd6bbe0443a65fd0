"""Fit maps one after another in a single pass, each on activations with all earlier maps applied.

The AcT paper (arXiv 2410.23054, section 4) fits place l on activations that are computed with the maps of places 1 to l - 1
applied, to source and target texts alike. Place by place that takes one forward pass for each place, O(L^2) work in L layers.
Here every batch of texts runs through the model once, in a thread of its own, and waits at each place for all other batches.
The map is then fitted on all batches, and each thread applies it to its own activations and continues. The maps are the same
as those of the place-by-place procedure.

Only one thread computes at a time, so that temporary memory is that of one batch; a waiting batch holds the activations of one
layer.
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
    """One batch of texts, and which of its tokens the fit reads and the maps change."""

    inputs: Mapping[str, object]
    """Keyword arguments of the model."""
    read_BT: Tensor
    """True for tokens that are pooled for the fit."""
    steered_BT: Tensor
    """True for tokens on which the maps act."""
    target_B: Tensor | None = None
    """True for target texts, False for source texts; None: the batch has source texts only."""


Fit = Callable[[str, Tensor, Tensor], Map | None]
"""(place, pooled activations of all source texts, (N, D), and of all target texts, (M, D)) -> the place's map; None leaves the
place as it is. M is 0 where no batch has target texts."""


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
    """Fit a map at every place, in the order in which the model runs them, in one pass over the batches.

    Args:
        model: the model, with other patches attached if it has any.
        places: the places to map.
        selection: only its `side` is read: whether the maps act on a module's input or output.
        batches: all texts that run through the model: the source texts, and the target texts if they are to be read with the
            earlier maps applied.
        pooling: how the activations of a text's `read_BT` tokens become one vector.
        fit: makes the map of one place.
        progress: called after each place with (number of places done, number of places).
        pixels: whether the maps move the mean of a channel of an image, or every pixel.

    Returns:
        The maps by place, in the order in which they were fitted.

    Raises:
        ValueError: `fit` raised it, or a forward pass does not reach a place or reaches it twice.
    """
    walk = _Walk(list(places), batches, pooling, pixels, fit, progress)
    handles = [walk.hook(model, place, selection.side) for place in places]
    # Daemon threads: an interrupted process must not wait for threads that wait for each other.
    # Threads and not processes: all batches run through the one model, and their hooks share the maps.
    # As many threads as batches, each with the stack of one forward pass; all but one of them wait.
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
        # After the hooks are gone: the caller may go on with the model.
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
        # In the order of the batches, in which their pooled activations are joined.
        self._target_N = torch.cat([_targets(batch) for batch in batches])
        # The order in which places run, known only now: modules may run in another order than they are defined in.
        self._order: list[str] = []
        self._pooled: dict[int, Tensor] = {}
        # By the batch's number: the place at which its thread waits.
        self._waiting: dict[int, str] = {}
        # Hooks are shared by all threads: each thread keeps the number of its batch here.
        self._here = threading.local()
        # The barrier calls `_meet` in one of the threads, after the last has arrived and before any of them continues.
        self._barrier = threading.Barrier(len(batches), action=self._meet)
        # Held by the one thread that computes; a thread that waits at the barrier has released it.
        self._computing = threading.Lock()
        # Written by `_meet` alone, while all threads wait: no lock of its own.
        self.maps: dict[str, Map] = {}
        self.error: BaseException | None = None

    def run(self, model: nn.Module, number: int) -> None:
        """Run one batch through the model; the target of a thread."""
        self._here.number = number
        try:
            # Each thread for itself: torch keeps the gradient mode for each thread, and a new one starts with gradients on.
            with self._computing, torch.inference_mode():
                try:
                    # The model's own forward pass, whatever its architecture: no list of its layers has to be walked.
                    model(**self._batches[number].inputs)
                except _Arrived:
                    return
            # The pass has ended by itself, and not by `_Arrived`: some place was never reached.
            missing = [place.name for place in self._places if place.name not in self._order]
            raise ValueError(taps.did_not_run(missing, len(self._places)))
        except threading.BrokenBarrierError:
            return  # another thread failed, and has stored its error
        except Exception as error:  # `fit_in_order` raises it again in the caller's thread
            # The first error is the cause; others follow from the broken barrier.
            self.error = self.error or error
            self._barrier.abort()  # otherwise the other threads would wait for this one for ever

    def hook(self, model: nn.Module, place: taps.Tap, side: str) -> RemovableHandle:
        """Register the hook that waits at a place and continues with the mapped value."""
        module, where = model.get_submodule(place.module), f"the value of {place.module}"

        def edit(value: object) -> object:
            call = models.running(model)  # None in a language model
            z = taps.value_at(value, place.element, where)
            if call is None:
                # Routers of mixtures of experts take all tokens in one axis; a mask of tokens needs rows.
                z_BTD = axes.with_rows(z, tuple(self._batches[self._here.number].read_BT.shape))
                return taps.replaced(value, place.element, self._arrive(place.name, z_BTD).reshape(z.shape))
            # The walk follows the sampler's steps that are read; in the others nothing waits, and no map is applied.
            if not call.is_read:
                return value
            # Only the rows with a prompt are read and mapped; with guidance the other half of the batch has none.
            axis = axes.feature_axis(module, z.dim())
            # Only (B, C, H, W) and (B, C, pixels) have channels whose mean may move; other values are mapped as tokens are.
            pixels = self._pixels if axis == 1 and z.dim() > 2 else None
            mapped_BTD = self._arrive(place.name, axes.as_tokens(z[call.conditional], axis), pixels)
            # A clone, since the next line writes: residual connections may still read the module's own output.
            z_last = z.movedim(axis, -1).clone()
            z_last[call.conditional] = mapped_BTD.reshape(z_last[call.conditional].shape)
            return taps.replaced(value, place.element, z_last.movedim(-1, axis))

        # A pre-hook sees what the module would read, and its arguments may be named.
        if side == "input":
            return module.register_forward_pre_hook(
                lambda _m, args, kwargs: taps.rewritten(args, kwargs, edit), with_kwargs=True
            )
        return module.register_forward_hook(lambda _m, _i, output: edit(output))

    def _arrive(self, place: str, z_BTD: Tensor, pixels: Pixels | None = None) -> Tensor:
        """Hand over this batch's pooled activations, wait for the place's map, and return the mapped activations."""
        batch = self._batches[self._here.number]
        read_BT = batch.read_BT.to(z_BTD.device)
        # Only the pooled vector is kept for the fit, (B, D) instead of (B, T, D).
        self._pooled[self._here.number] = token_masks.pool(axes.per_token(z_BTD, tuple(read_BT.shape)), read_BT, self._pooling)
        self._waiting[self._here.number] = place
        # Before the barrier, or the other batches could never arrive at it.
        # Order of a place: pool, release the lock, wait at the barrier; the last to arrive fits while the others wait; then one
        # after another takes the lock, maps its own batch and runs on to the next place.
        self._computing.release()
        try:
            self._barrier.wait()
        finally:
            # Also after an error: the `with` block of `run` releases the lock once more.
            self._computing.acquire()
        # None if `fit` left the place as it is.
        # Read after the barrier, when `_meet` has stored it.
        fitted = self.maps.get(place)
        if len(self._order) == len(self._places):
            raise _Arrived  # the rest of the forward pass computes nothing that a fit reads
        if fitted is None:
            return z_BTD
        # In float32, as an attached patch computes it: later places must see the same values as at inference.
        value_BTD = z_BTD.float()
        mapped_BTD = fitted(value_BTD) if pixels is None else mapped_pixels(fitted, value_BTD, pixels)
        # With an axis for attention heads where the value has one, so that the mask broadcasts over heads and not over tokens.
        steered_BT = axes.beside(batch.steered_BT.to(z_BTD.device), z_BTD)
        # The map acts where it will act at inference; the fit reads `read_BT`, which may be other tokens.
        return torch.where(steered_BT.unsqueeze(-1), mapped_BTD.to(z_BTD.dtype), z_BTD)

    def _meet(self) -> None:
        """Fit the place at which all threads wait; the barrier runs this in one of them."""
        places = set(self._waiting.values())
        # Any of them: all wait at one place, as the next lines check.
        place = self._waiting[0]
        try:
            if len(places) > 1:
                raise ValueError(
                    f"the batches reach {models.listed(sorted(places))} at the same time: the model runs its modules in "
                    "another order for other texts, so maps cannot be fitted one after another; set "
                    "method.incremental: false"
                )
            # A module that is shared between layers: its second run would get the map that was fitted on the first.
            if place in self._order:
                raise ValueError(f"{place} runs more than once in a forward pass: which of its values is meant is not clear")
            # In the order of the batches, not of the threads: the maps do not depend on scheduling.
            pooled_ND = torch.cat([self._pooled[number] for number in range(len(self._batches))])
            target_N = self._target_N.to(pooled_ND.device)
            # A fit may differentiate, and inference tensors cannot be used in autograd: indexing outside of it makes copies.
            with torch.inference_mode(False):
                fitted = self._fit(place, pooled_ND[~target_N].clone(), pooled_ND[target_N].clone())
            # Recorded even without a map: it says that the place has run.
            self._order.append(place)
            if fitted is not None:
                # Some fits compute on the CPU (NumPy, scikit-learn); the map acts where the model is.
                self.maps[place] = fitted.to(pooled_ND.device)
            self._progress(len(self._order), len(self._places))
        except BaseException as error:
            # Raised in the barrier's action, it breaks the barrier, and all other threads get BrokenBarrierError.
            self.error = error
            raise


def _targets(batch: Reading) -> Tensor:
    """Return which texts of a batch are target texts, (B,) bool."""
    return torch.zeros(len(batch.read_BT), dtype=torch.bool) if batch.target_B is None else batch.target_B.cpu()


class _Arrived(Exception):
    """Ends a forward pass at the last place."""
