"""Taps: the places in a model where activations are read and steered, and a reader of their values.

A `Selection` (job/selection.py) names modules and tokens. `select` returns the modules as taps; token_masks.py finds, for one
call of the model, which of its tokens the selection takes; axes.py finds the axis of neurons in a module's value. A `Reader`
runs the model up to the last tap and returns the values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.guards import expressions
from steerlab.job import Selection
from steerlab.patches import axes

if TYPE_CHECKING:
    from steerlab.models.kinds import Model

# Up to three digits, because no module returns a tuple of a thousand elements.
_ELEMENT = re.compile(r"(?P<modules>.*):(?P<element>\d{1,3})")


class Tap(NamedTuple):
    """One place in a model: a module, and which element of its output or input is meant if that is a tuple."""

    module: str
    element: int | None = None
    """Number of the element of a tuple; None for a tensor, or for the first element of a tuple."""

    @property
    def name(self) -> str:
        """The module's path, followed by `:k` for element k of a tuple."""
        return self.module if self.element is None else f"{self.module}:{self.element}"


def tap(name: str) -> Tap:
    """Return the tap that has this name; the inverse of `Tap.name`."""
    match = _ELEMENT.fullmatch(name)
    return Tap(match["modules"], int(match["element"])) if match else Tap(name)


def select(model: nn.Module, selection: Selection) -> list[Tap]:
    """Return the places that a selection names, in the order of `model.named_modules()`.

    Raises:
        ValueError: a pattern is not a regular expression, no module matches (the message lists similar names), or the selection
            names modules or tokens that a diffusion pipeline does not steer.
    """
    # The `:k` is split off before the rest is matched as a regular expression, since module paths have no colon.
    pattern, element = selection.modules, None
    if match := _ELEMENT.fullmatch(pattern):
        pattern, element = match["modules"], int(match["element"])
    # Leaves out the model itself, whose path is empty, so that `.*` matches only its submodules.
    names = [name for name, _ in model.named_modules() if name]
    matches = expressions.whole(pattern, names)
    part = models.steered_part(model)
    if not matches:
        names = _inside(names, part)
        # A pattern must match a whole path. A path of which it matches only a part is most likely what the user meant.
        near = expressions.part(pattern, names) or difflib.get_close_matches(pattern[:200], names, n=5, cutoff=0.2)
        hint = f"similar: {', '.join(near[:5])}" if near else f"the model has {', '.join(names[:5])}, ..."
        raise ValueError(f"no module path matches {pattern[:200]!r} as a whole; {hint}")
    # In the order in which modules are defined. The order in which they run would be known only from a forward pass.
    chosen = matches
    if selection.exclude_modules is not None:
        excluded = set(expressions.whole(selection.exclude_modules, matches))
        chosen = [name for name in matches if name not in excluded]
        if not chosen:
            raise ValueError(
                f"exclude_modules {selection.exclude_modules!r} excludes all {len(matches)} modules that {pattern!r} matches"
            )
    if part is not None:
        _check_part(chosen, names, part, selection)
    return [Tap(name, element) for name in chosen]


def _inside(names: Sequence[str], part: str | None) -> list[str]:
    """Return the names that lie in one part of a model; all names if `part` is None."""
    return [name for name in names if part is None or name == part or name.startswith(f"{part}.")]


def _check_part(chosen: Sequence[str], names: Sequence[str], part: str, selection: Selection) -> None:
    """Raise ValueError if a selection of a diffusion pipeline names modules outside the part that is steered, or tokens."""
    inside = _inside(chosen, part)
    outside = [name for name in chosen if name not in inside]
    if outside:
        others = ", ".join(dict.fromkeys(name.partition(".")[0] for name in outside))
        which = f"{len(outside)} of {len(chosen)} modules" if inside else "only modules"
        near = ", ".join((inside or _alike(outside, _inside(names, part)))[:5])
        raise ValueError(
            f"modules {selection.modules!r} matches {which} of {others}, where nothing is steered; a pipeline is read and "
            f"steered in its {part}: begin the expression with that name, for modules such as {near}"
        )
    # Language models never get here (`select`): their `part` is None.
    if not selection.takes_all_tokens:
        raise ValueError("phases, roles, positions and token_ids select tokens, which images do not have; remove these keys")


def _alike(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Return the candidates whose last path component resembles that of a name; if there are none, those that are norms."""
    by_leaf: dict[str, list[str]] = {}
    for candidate in candidates:
        by_leaf.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    alike = [leaf for name in leaves for leaf in difflib.get_close_matches(name, by_leaf, n=2)]
    return [name for leaf in dict.fromkeys(alike) for name in by_leaf[leaf]] or [n for n in candidates if "norm" in n]


def value_at(output: object, element: int | None, where: str) -> Tensor:
    """Return the tensor of a tap in a module's output or first argument.

    Args:
        output: the module's output or first argument, a tensor or a tuple.
        element: `Tap.element`; None takes the tensor itself, or the first element of a tuple.
        where: description of the place, for the messages.

    Raises:
        ValueError: the value has no such element, or the element is not a tensor.
    """
    value = output
    if isinstance(output, tuple | list):
        if (element or 0) >= len(output):
            raise ValueError(f"{where} has {len(output)} elements; element {element} does not exist")
        value = output[element or 0]
    elif element:
        raise ValueError(f"{where} is not a tuple; element {element} does not exist")
    # Some modules of transformers return a dataclass, which holds several tensors.
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a tensor")
    return value


def replaced(output: object, element: int | None, value: Tensor) -> object:
    """Return a copy of a module's output in which `value` replaces the tap's tensor."""
    if not isinstance(output, tuple | list):
        return value
    # A copy, because other hooks or the module's own code may hold the original container.
    items = list(output)
    items[element or 0] = value
    return type(output)(items)


def did_not_run(names: Sequence[str], number: int) -> str:
    """Return the message for modules that do not run in a forward pass, out of a number of modules."""
    return f"{len(names)} of {number} modules never run in a forward pass: {models.listed(names)}"


class _AllRead(Exception):
    """Ends a forward pass once the values of all taps are recorded."""


class Reader:
    """Records the values of taps while a model runs. Its hooks stay on the model until `close`.

    Calling a reader runs the model and returns each tap's value of that pass, (B, T, D). Attach patches before the reader is
    made, so that the values include their effect. For a diffusion model the values are (B, pixels, channels), of the rows with
    a prompt; the pixels of all sampler steps that are read are joined in one axis. If a module gives a vector for each
    attention head (the `q_norm` of Qwen 3), the value of a token is the mean of these vectors.

    Args:
        model: the model.
        taps: the places to read.
        side: "output" records the modules' outputs, "input" their first arguments.
        stop: whether the forward pass ends after the last tap.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], side: str = "output", *, stop: bool = True) -> None:
        self._model, self._stop, self._num_taps, self._num_reads = model, stop, len(taps), models.num_reads(model)
        self._names = [place.name for place in taps]
        self._shape_BT: tuple[int, ...] | None = None
        self._values: dict[str, list[Tensor]] | None = None
        """Values by the name of the tap. None outside of a call, when the hooks record nothing: gradient checkpointing, for
        example, runs the modules again in the backward pass."""
        self._handles = [self._hook(place, side) for place in taps]

    def __call__(self, **inputs: object) -> dict[str, Tensor]:
        """Run the model on `inputs` and return the values by the names of the taps.

        Raises:
            ValueError: a module does not run, runs more than once, or has no tensor at its tap.
        """
        self._values = values = {}
        ids_BT = inputs.get("input_ids")
        self._shape_BT = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else None
        try:
            self._model(**inputs)
        # A hook can end a forward pass only by an exception. The model's own `with` blocks end properly on it.
        except _AllRead:
            pass
        finally:
            self._values = None
        missing = [name for name in self._names if len(values.get(name, ())) != self._num_reads]
        if missing:
            raise ValueError(did_not_run(missing, self._num_taps))
        # A diffusion model has one value for each sampler step that is read; their pixels are joined like those of one image.
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in values.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, place: Tap, side: str) -> RemovableHandle:
        module = self._model.get_submodule(place.module)
        if side == "output":
            return module.register_forward_hook(lambda _m, _i, output: self._record(place, module, output))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: self._record(place, module, first_argument(args, kwargs)), with_kwargs=True
        )

    def _record(self, place: Tap, module: nn.Module, output: object) -> None:
        """Record the value of a tap, and end the pass after the last one. Raises ValueError if a module runs twice."""
        call = models.running(self._model)
        # Other runs of the model, such as evaluations between two readings, run the same hooks and are ignored, as are steps of
        # a diffusion sampler that are not read.
        if self._values is None or (call is not None and not call.is_read):
            return
        parts = self._values.setdefault(place.name, [])
        if len(parts) == self._num_reads:
            raise ValueError(f"{place.module} runs more than once in a forward pass, so it has no single value to read")
        value = value_at(output, place.element, f"the value of {place.module}")
        if call is not None:
            value = axes.as_tokens(call.with_prompt(value), axes.feature_axis(module, value.dim()))
        elif self._shape_BT is not None and not place.element:  # later elements are attention weights, keys and values
            value = axes.per_token(value, self._shape_BT)
        parts.append(value)
        # The values of all taps are counted, because modules may run in another order than they are defined in.
        if self._stop and sum(map(len, self._values.values())) == self._num_taps * self._num_reads:
            raise _AllRead


def first_argument(args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """Return a module's first argument, whether it was passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rewritten(
    args: tuple[object, ...], kwargs: dict[str, object], edit: Callable[[object], object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return a module's arguments with the first one edited."""
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: edit(kwargs[name])}


def widths(model: Model, steer: Selection) -> dict[str, int]:
    """Return the width D of each place of a selection, by the place's name, from one small forward pass."""
    places = select(model, steer)
    reader = Reader(model, places, steer.side)
    try:
        with torch.no_grad():
            # A reader returns values whose last axis is that of the neurons.
            return {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    finally:
        reader.close()
