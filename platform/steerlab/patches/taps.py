"""Choose modules and tokens, read what a model computes there, and pool it: the same words for reading and for steering.

A `Selection` (job/data_set.py) says where. `select` turns it into taps, `token_mask` into the tokens of one call, `pool`
makes one vector a row of them. A `Reader` runs the model no further than the last module that is read. All of it stands in one
file because reading and steering must agree on what a place, its tokens and its neurons are.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.guards import expressions
from steerlab.inputs.drawings import Drawings
from steerlab.inputs.tokens import GENERATION, PADDING, PHASES, PROMPT, ROLES, Batch
from steerlab.job import Pooling, Selection, Span

_ELEMENT = re.compile(r"(?P<modules>.*):(?P<element>\d{1,3})")


class Tap(NamedTuple):
    """One place in a model: a module's output or input, or one element of it."""

    module: str
    element: int | None = None
    """Element of a tuple output; None for the tensor itself, or the first element of a tuple."""

    @property
    def name(self) -> str:
        """Return the module's path, with `:k` where an element is picked."""
        return self.module if self.element is None else f"{self.module}:{self.element}"


def tap(name: str) -> Tap:
    """Take a tap's name apart."""
    match = _ELEMENT.fullmatch(name)
    return Tap(match["modules"], int(match["element"])) if match else Tap(name)


def select(model: nn.Module, selection: Selection) -> list[Tap]:
    """Return the places that a selection names, in the model's order.

    Raises:
        ValueError: when a pattern is no regular expression or nothing is left; near misses are listed.
    """
    pattern, element = selection.modules, None
    if match := _ELEMENT.fullmatch(pattern):
        pattern, element = match["modules"], int(match["element"])
    names = [name for name, _ in model.named_modules() if name]
    found = expressions.whole(pattern, names)
    part = models.steered_part(model)
    if not found:
        names = _inside(names, part)
        near = expressions.part(pattern, names) or difflib.get_close_matches(pattern[:200], names, n=5, cutoff=0.2)
        hint = f"near: {', '.join(near[:5])}" if near else f"there are: {', '.join(names[:5])}, ..."
        raise ValueError(f"no module path matches {pattern[:200]!r} as a whole; {hint}")
    left = found
    if selection.exclude_modules is not None:
        excluded = set(expressions.whole(selection.exclude_modules, found))
        left = [name for name in found if name not in excluded]
        if not left:
            raise ValueError(f"exclude_modules {selection.exclude_modules!r} takes out all {len(found)} modules of {pattern!r}")
    if part is not None:
        _check_part(left, names, part, selection)
    return [Tap(name, element) for name in left]


def _inside(names: Sequence[str], part: str | None) -> list[str]:
    """Return the modules of one part of a model; None is all of it."""
    return [name for name in names if part is None or name == part or name.startswith(f"{part}.")]


def _check_part(chosen: Sequence[str], names: Sequence[str], part: str, selection: Selection) -> None:
    """Refuse modules outside of the one part of a pipeline that is read and steered."""
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
    if not selection.takes_all_tokens:
        raise ValueError("phases, roles and positions select tokens; an image has none: leave them out")


def _alike(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Return the candidates whose last name is most like one of the names' last names, or else the norms among them."""
    by_leaf: dict[str, list[str]] = {}
    for candidate in candidates:
        by_leaf.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    alike = [leaf for name in leaves for leaf in difflib.get_close_matches(name, by_leaf, n=2)]
    return [found for leaf in dict.fromkeys(alike) for found in by_leaf[leaf]] or [n for n in candidates if "norm" in n]


def token_mask(selection: Selection, roles_BT: Tensor, phases_BT: Tensor, position_BT: Tensor, prompt_B: Tensor) -> Tensor:
    """Say which tokens of a call are selected, (B, T); padding never is.

    Args:
        selection: what to select.
        roles_BT: roles, `PADDING` where there is no token.
        phases_BT: `PROMPT` or `GENERATION`.
        position_BT: position of each token in its row, counted from 0 without padding.
        prompt_B: tokens of each row's prompt, from whose end negative positions count.
    """
    mask_BT = roles_BT != PADDING
    if selection.roles is not None:
        mask_BT = mask_BT & _one_of(roles_BT, selection.roles, ROLES)
    mask_BT = mask_BT & ~_one_of(roles_BT, selection.exclude_roles, ROLES) & _one_of(phases_BT, selection.phases, PHASES)
    back_BT = torch.where(phases_BT == PROMPT, position_BT - prompt_B[:, None], 0)
    if selection.positions is not None:
        mask_BT = mask_BT & _within(selection.positions, position_BT, back_BT)
    return mask_BT & ~_within(selection.exclude_positions, position_BT, back_BT)


def _one_of(values_BT: Tensor, names: Sequence[str], table: dict[str, int]) -> Tensor:
    chosen = torch.tensor([table[name] for name in names], dtype=values_BT.dtype, device=values_BT.device)
    return torch.isin(values_BT, chosen)


def _within(spans: Sequence[Span], position_BT: Tensor, back_BT: Tensor) -> Tensor:
    """Say which tokens lie in one of the spans; `back_BT` is the position from the prompt's end, 0 for other tokens."""
    inside_BT = torch.zeros_like(position_BT, dtype=torch.bool)
    for start, end in spans:
        here_BT = torch.ones_like(inside_BT)
        if start is not None:
            here_BT &= position_BT >= start if start >= 0 else (back_BT >= start) & (back_BT < 0)
        if end is not None:
            here_BT &= position_BT < end if end >= 0 else back_BT < end
        inside_BT |= here_BT
    return inside_BT


def prompt_lengths(roles_BT: Tensor, phases_BT: Tensor) -> Tensor:
    """Count the tokens of each row's prompt, (B,)."""
    return ((roles_BT != PADDING) & (phases_BT != GENERATION)).sum(1)


def selected(batch: Batch | Drawings, selection: Selection) -> Tensor:
    """Say which tokens of a padded batch are selected, (B, T); (B, 1) where all of a row are, as in images."""
    if isinstance(batch, Drawings):
        return torch.ones(len(batch.prompts), 1, dtype=torch.bool)
    prompt_B = prompt_lengths(batch.roles, batch.phases)
    return token_mask(selection, batch.roles, batch.phases, batch.position_ids, prompt_B)


def pool(z_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Reduce each row's selected tokens to one vector, (B, D), in float32; the other tokens do not count, whatever they hold.

    Every row must have a selected token. Images come as (B, pixels, channels), with a mask of (B, 1) for all of them.
    """
    if mask_BT.shape[1] == 1 and pooling == "mean":
        return z_BTD.float().sum(1) / z_BTD.shape[1]  # the same, without a pass over the mask; its gradient is none either
    mask_BT = mask_BT.expand(z_BTD.shape[:2])
    mask_BT1 = mask_BT.unsqueeze(-1)
    match pooling:
        case "mean":
            return z_BTD.float().where(mask_BT1, 0.0).sum(1) / mask_BT1.sum(1)
        case "max":
            return z_BTD.where(mask_BT1, -torch.inf).amax(1).float()
        case "min":
            return z_BTD.where(mask_BT1, torch.inf).amin(1).float()
        case "last":
            last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)
            return z_BTD[torch.arange(len(z_BTD), device=z_BTD.device), last_B].float()
        case "none":
            raise ValueError("pooling none keeps every token: there is nothing to pool")


def value_at(output: object, element: int | None, where: str) -> Tensor:
    """Return the tensor that a tap means in a module's output or arguments.

    Raises:
        ValueError: there is no tensor at that place.
    """
    value = output
    if isinstance(output, tuple | list):
        if (element or 0) >= len(output):
            raise ValueError(f"{where} has {len(output)} elements; there is no element {element}")
        value = output[element or 0]
    elif element:
        raise ValueError(f"{where} is no tuple: there is no element {element}")
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a tensor")
    return value


def replaced(output: object, element: int | None, value: Tensor) -> object:
    """Return the output with the tap's tensor replaced, in the container it came in."""
    if not isinstance(output, tuple | list):
        return value
    items = list(output)
    items[element or 0] = value
    return type(output)(items)


def feature_axis(module: nn.Module, rank: int, images: bool = True) -> int:
    """Return the axis of a module's neurons: that of channels, 1, in convolutions and what normalises them, else the last one.

    In a model of images a value of four axes is one, (B, C, H, W), unless a linear layer or a norm of the last axis made it; in
    a language model it has an axis of attention heads. A GroupNorm inside an attention block sees (B, C, pixels).
    """
    if isinstance(module, nn.GroupNorm | nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase):
        return 1
    if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
        return rank - 1
    return 1 if images and rank == 4 else rank - 1


def head_axis(z: Tensor, num_tokens: int) -> int | None:
    """Return the axis of attention heads in a language model's value, (B, T, H, D) or (B, H, T, D); None where it has none."""
    if z.dim() != 4 or num_tokens not in z.shape[1:3]:
        return None
    if z.shape[1] != z.shape[2]:
        return 2 if z.shape[1] == num_tokens else 1
    # As many heads as tokens: what was transposed keeps its order in memory.
    return 2 if z.stride(1) >= z.stride(2) else 1


def with_rows(z: Tensor, shape_BT: tuple[int, ...]) -> Tensor:
    """Return a value (B * T, D) of a module that is given all tokens of a call in one axis as (B, T, D), others as they are."""
    return z.unflatten(0, shape_BT) if z.dim() == 2 and len(z) == math.prod(shape_BT) else z


def per_token(z: Tensor, shape_BT: tuple[int, ...]) -> Tensor:
    """Return one vector a token, (B, T, D), the mean of those of its attention heads; a value of no such form as it is."""
    axis = head_axis(z, shape_BT[1])
    return with_rows(z, shape_BT) if axis is None else z.mean(axis)


def beside(tokens_BT: Tensor, z: Tensor) -> Tensor:
    """Return a mask of tokens with an axis for the heads that a value (B, T, H, D) or (B, H, T, D) has."""
    axis = head_axis(z, tokens_BT.shape[1])
    return tokens_BT if axis is None else tokens_BT.unsqueeze(axis)


def as_tokens(z: Tensor, axis: int) -> Tensor:
    """Return a value with its neurons on the last axis and all others but the first as one, (B, T, D)."""
    last = z.movedim(axis, -1)
    return last.flatten(1, -2) if last.dim() > 2 else last.unsqueeze(1)


def did_not_run(names: Sequence[str], number: int) -> str:
    """Say which of a number of modules take no part in a forward pass."""
    return f"{len(names)} of {number} modules never run in a forward pass: {models.listed(names)}"


class _Done(Exception):
    """Ends a forward pass whose last module has been read."""


class Reader:
    """Reads taps of a model while it runs.

    Calling it runs the model and returns each tap's value of that pass; with `stop` no further than the last tap. Patches
    that are to be seen must be attached before. `close` removes the hooks. Of a drawing the steps that the sampler reads give
    values, each image's pixels of all of them as (B, pixels, channels), from the rows that have a prompt. Where a module of a
    language model gives a vector for each attention head (the `q_norm` of Qwen 3), a token's value is their mean.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], side: str = "output", *, stop: bool = True) -> None:
        self._model, self._stop, self._number, self._reads = model, stop, len(taps), models.num_reads(model)
        self._names = [place.name for place in taps]
        self._shape_BT: tuple[int, ...] | None = None
        self._values: dict[str, list[Tensor]] | None = None
        """None outside of a call: gradient checkpointing runs modules again, which is nothing to read."""
        self._handles = [self._hook(place, side) for place in taps]

    def __call__(self, **inputs: object) -> dict[str, Tensor]:
        """Run the model on `inputs` and return {tap name: value}."""
        self._values = values = {}
        ids_BT = inputs.get("input_ids")
        self._shape_BT = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else None
        try:
            self._model(**inputs)
        except _Done:
            pass
        finally:
            self._values = None
        missing = [name for name in self._names if len(values.get(name, ())) != self._reads]
        if missing:
            raise ValueError(did_not_run(missing, self._number))
        return {name: found[0] if len(found) == 1 else torch.cat(found, 1) for name, found in values.items()}

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
        call = models.running(self._model)
        if self._values is None or (call is not None and not call.is_read):
            return
        found = self._values.setdefault(place.name, [])
        if len(found) == self._reads:
            raise ValueError(
                f"{place.module} runs more than once in a forward pass, so what is meant by its value is not clear"
            )
        value = value_at(output, place.element, f"the value of {place.module}")
        if call is not None:
            value = as_tokens(call.with_prompt(value), feature_axis(module, value.dim()))
        elif self._shape_BT is not None and not place.element:  # later elements are attention weights, keys and values
            value = per_token(value, self._shape_BT)
        found.append(value)
        if self._stop and sum(map(len, self._values.values())) == self._number * self._reads:
            raise _Done


def first_argument(args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """Return a module's first argument, named or not."""
    return args[0] if args else next(iter(kwargs.values()))


def rewritten(
    args: tuple[object, ...], kwargs: dict[str, object], edit: Callable[[object], object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return a module's arguments with the first one edited."""
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: edit(kwargs[name])}


def widths(model: nn.Module, steer: Selection) -> dict[str, int]:
    """Return the widths of the places that a selection takes, by one forward pass over a token or an image."""
    places = select(model, steer)
    reader = Reader(model, places, steer.side)
    try:
        with torch.no_grad():
            return {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    finally:
        reader.close()
