"""Taps: the places in a model where activations are read and steered, and a reader of their values.

A `Selection` (job/selection.py) names modules and tokens. `select` returns its modules as taps; token_masks.py has its tokens
of one call, axes.py says which axis of a value are the neurons. A `Reader` runs the model up to the last module that is read.
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

# Up to three digits: longer numbers are no element of an output, and `int` of an endless one would take long.
_ELEMENT = re.compile(r"(?P<modules>.*):(?P<element>\d{1,3})")


class Tap(NamedTuple):
    """One place in a model: a module's output or input, or one element of it."""

    module: str
    element: int | None = None
    """Element of a tuple output; None for the tensor itself, or the first element of a tuple."""

    @property
    def name(self) -> str:
        """Return the module's path, with `:k` after it for element k of a tuple."""
        return self.module if self.element is None else f"{self.module}:{self.element}"


def tap(name: str) -> Tap:
    """Return the tap with a name, the inverse of `Tap.name`."""
    match = _ELEMENT.fullmatch(name)
    return Tap(match["modules"], int(match["element"])) if match else Tap(name)


def select(model: nn.Module, selection: Selection) -> list[Tap]:
    """Return the places that a selection names, in the order of the model's modules.

    Raises:
        ValueError: a pattern is not a regular expression, or no module is left; the message lists similar names.
    """
    # Apart from the expression: a colon in one would be matched against module paths, which have none.
    pattern, element = selection.modules, None
    if match := _ELEMENT.fullmatch(pattern):
        pattern, element = match["modules"], int(match["element"])
    # Without the model itself, whose path is empty: an expression such as `.*` should take its parts.
    names = [name for name, _ in model.named_modules() if name]
    matches = expressions.whole(pattern, names)
    part = models.steered_part(model)
    if not matches:
        names = _inside(names, part)
        # A pattern must match a whole path; modules that it matches in part are what was most likely meant.
        near = expressions.part(pattern, names) or difflib.get_close_matches(pattern[:200], names, n=5, cutoff=0.2)
        hint = f"near: {', '.join(near[:5])}" if near else f"there are: {', '.join(names[:5])}, ..."
        raise ValueError(f"no module path matches {pattern[:200]!r} as a whole; {hint}")
    # The order of `named_modules`, in which modules are defined; the order in which they run is known only from a pass.
    chosen = matches
    if selection.exclude_modules is not None:
        excluded = set(expressions.whole(selection.exclude_modules, matches))
        chosen = [name for name in matches if name not in excluded]
        if not chosen:
            raise ValueError(
                f"exclude_modules {selection.exclude_modules!r} takes out all {len(matches)} modules of {pattern!r}"
            )
    if part is not None:
        _check_part(chosen, names, part, selection)
    return [Tap(name, element) for name in chosen]


def _inside(names: Sequence[str], part: str | None) -> list[str]:
    """Return the modules of one part of a model; None stands for the whole model."""
    return [name for name in names if part is None or name == part or name.startswith(f"{part}.")]


def _check_part(chosen: Sequence[str], names: Sequence[str], part: str, selection: Selection) -> None:
    """Raise ValueError for modules outside of the part of a pipeline that is read and steered, and for a choice of tokens."""
    inside = _inside(chosen, part)
    outside = [name for name in chosen if name not in inside]
    if outside:
        others = ", ".join(dict.fromkeys(name.partition(".")[0] for name in outside))
        which = f"{len(outside)} of {len(chosen)} modules" if inside else "only modules"
        near = ", ".join((inside or _alike(outside, _inside(names, part)))[:5])
        raise ValueError(
            f"modules {selection.modules!r} matches {which} of {others}, where nothing is steered; a pipeline is read and "
            f"steered in its {part}: let the expression begin with it, for modules such as {near}"
        )
    # `part` is None for language models, so that this is a diffusion pipeline.
    if not selection.takes_all_tokens:
        raise ValueError("phases, roles, positions and token_ids select tokens; an image has none: leave them out")


def _alike(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Return the candidates whose last path component is similar to that of one of the names; else the norms among them."""
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
        where: the place, as messages name it.

    Raises:
        ValueError: there is no such element, or it is not a tensor.
    """
    value = output
    if isinstance(output, tuple | list):
        if (element or 0) >= len(output):
            raise ValueError(f"{where} has {len(output)} elements; there is no element {element}")
        value = output[element or 0]
    elif element:
        raise ValueError(f"{where} is no tuple: there is no element {element}")
    # Modules of transformers return tensors, tuples, or dataclasses with several of them.
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a tensor")
    return value


def replaced(output: object, element: int | None, value: Tensor) -> object:
    """Return the output with the tap's tensor replaced by `value`, in the same container."""
    if not isinstance(output, tuple | list):
        return value
    # A copy: other hooks, or the module's own code, may hold the container.
    items = list(output)
    items[element or 0] = value
    return type(output)(items)


def did_not_run(names: Sequence[str], number: int) -> str:
    """Return a message that names modules, out of `number`, that do not run in a forward pass."""
    return f"{len(names)} of {number} modules never run in a forward pass: {models.listed(names)}"


class _Done(Exception):
    """Ends a forward pass as soon as its last module has been read."""


class Reader:
    """Reads the values of taps while a model runs; it holds hooks on the model until `close`.

    Calling it runs the model and returns each tap's value of that pass, (B, T, D). Attach patches before, so that their effect
    is read. In a diffusion model the sampler's steps that are read give (B, pixels, channels) for the rows with a prompt, the
    pixels of all these steps in one axis. If a module gives a vector for each attention head (the `q_norm` of Qwen 3), the
    value of a token is their mean.

    Args:
        model: the model.
        taps: the places to read.
        side: read the modules' "output" or their first "input".
        stop: end the forward pass after the last tap.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], side: str = "output", *, stop: bool = True) -> None:
        self._model, self._stop, self._number, self._reads = model, stop, len(taps), models.num_reads(model)
        self._names = [place.name for place in taps]
        self._shape_BT: tuple[int, ...] | None = None
        self._values: dict[str, list[Tensor]] | None = None
        """Values by tap; None outside of a call, because gradient checkpointing runs the modules again in the backward pass."""
        self._handles = [self._hook(place, side) for place in taps]

    def __call__(self, **inputs: object) -> dict[str, Tensor]:
        """Run the model on `inputs` and return the values by the taps' names.

        Raises:
            ValueError: a tap does not run, or runs more than once.
        """
        self._values = values = {}
        ids_BT = inputs.get("input_ids")
        self._shape_BT = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else None
        try:
            self._model(**inputs)
        # An exception, as a hook has no other way to end a pass; it unwinds through the model's own `with` blocks.
        except _Done:
            pass
        finally:
            self._values = None
        missing = [name for name in self._names if len(values.get(name, ())) != self._reads]
        if missing:
            raise ValueError(did_not_run(missing, self._number))
        # Several parts are the steps of a sampler: their pixels join as if they were one larger image.
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in values.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, place: Tap, side: str) -> RemovableHandle:
        module = self._model.get_submodule(place.module)
        if side == "output":
            return module.register_forward_hook(lambda _m, _i, output: self._keep(place, module, output))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: self._keep(place, module, first_argument(args, kwargs)), with_kwargs=True
        )

    def _keep(self, place: Tap, module: nn.Module, output: object) -> None:
        """Store a tap's value; after the last one of all taps, end the pass. Raises ValueError if a module runs twice."""
        call = models.running(self._model)
        # Ignored and not refused: evaluations between two readings run the same hooks.
        if self._values is None or (call is not None and not call.is_read):
            return
        parts = self._values.setdefault(place.name, [])
        if len(parts) == self._reads:
            raise ValueError(
                f"{place.module} runs more than once in a forward pass, so what is meant by its value is not clear"
            )
        value = value_at(output, place.element, f"the value of {place.module}")
        if call is not None:
            value = axes.as_tokens(call.with_prompt(value), axes.feature_axis(module, value.dim()))
        elif self._shape_BT is not None and not place.element:  # later elements are attention weights, keys and values
            value = axes.per_token(value, self._shape_BT)
        parts.append(value)
        # Counted over all taps: modules may run in another order than they are defined in.
        if self._stop and sum(map(len, self._values.values())) == self._number * self._reads:
            raise _Done


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
            # The neurons are the last axis in whatever a reader returns.
            return {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    finally:
        reader.close()
