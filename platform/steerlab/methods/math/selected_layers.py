"""Linear layers of a decoder, selected by their type and by the number of their block: `attn_q`, `ffn_up`; all, 8-15, last."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from steerlab import models
from steerlab.models import LayerType, WeightPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names instead of numbers let one job work for models of any depth.
_RANGES = ("all", "early", "middle", "late", "last")
# One pattern matches both forms: a number is a span that ends where it starts.
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")
_LAYER = rf"({'|'.join(_RANGES)}|[0-9]+(-[0-9]+)?)"
_TYPES = f"({'|'.join(get_args(LayerType))})"


def _listed(value: object) -> object:
    """Return a list for one item, or for several items in a text with commas."""
    # `--set method.target_layers=8-15,last` arrives as one text, a list in YAML as a list.
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    # `target_layers: 3` in YAML is an int.
    return (value,) if isinstance(value, int) else value


def _known(value: tuple[int | str, ...]) -> tuple[int | str, ...]:
    # A list in YAML holds numbers and texts, the command line gives texts only.
    for item in value:
        # The pattern is also in the JSON schema, so that an editor and the job accept the same values.
        if not re.fullmatch(_LAYER, str(item)):
            # The error is not a ValueError, because pydantic would write "Value error, " before its text.
            message = f"{item!r} is not one of {', '.join(_RANGES)}, a number, or a span such as 8-15"
            raise PydanticCustomError("layers", "{message}", {"message": message})
    return value


# These are the forms that a job may contain, for the JSON schema: a list, one item, or a text with commas.
_ListOfLayers = tuple[Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=f"^{_LAYER}$")], ...]
_WrittenLayers = (
    Annotated[_ListOfLayers, Field(min_length=1)] | int | Annotated[str, Field(pattern=f"^ *{_LAYER} *(, *{_LAYER} *)*$")]
)
_ListOfTypes = Annotated[tuple[LayerType, ...], Field(min_length=1)]
_WrittenTypes = _ListOfTypes | Annotated[str, Field(pattern=f"^ *{_TYPES} *(, *{_TYPES} *)*$")]

# Without `json_schema_input_type` pydantic's schema for editors would refuse the short forms, which the validator accepts.
Types = Annotated[_ListOfTypes, BeforeValidator(_listed, json_schema_input_type=_WrittenTypes)]
"""Types of linear layers; in a job a list, or a text with commas."""
Layers = Annotated[
    tuple[int | str, ...],
    Field(min_length=1),
    AfterValidator(_known),
    BeforeValidator(_listed, json_schema_input_type=_WrittenLayers),
]
"""Blocks of a decoder: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""


def numbers(layers: tuple[int | str, ...], num_layers: int) -> list[int]:
    """Return the numbers of the named blocks in ascending order, from 0, in a decoder of `num_layers` blocks."""
    # The bounds are rounded up, so that the thirds together are all blocks, whatever their number.
    third, two_thirds = -(-num_layers // 3), -(-2 * num_layers // 3)
    named = {
        "all": range(num_layers),
        "early": range(third),
        "middle": range(third, two_thirds),
        "late": range(two_thirds, num_layers),
        "last": range(num_layers - 1, num_layers),
    }
    blocks: set[int] = set()
    for item in layers:
        if str(item) in named:
            blocks.update(named[str(item)])
        else:
            # `_known` has checked the form.
            first, last = _SPAN.fullmatch(str(item)).groups()  # type: ignore[union-attr]
            blocks.update(range(int(first), int(last or first) + 1))
    # Spans may overlap, so the numbers are a set; they are sorted, so that files list the layers in the model's order.
    return sorted(blocks)


def places(model: PreTrainedModel, types: tuple[LayerType, ...], layers: tuple[int | str, ...]) -> list[WeightPlace]:
    """Return the selected linear layers. Raises ValueError if the model lacks a type of layer, or a block."""
    # The order is that of blocks, and within each block that of the types; files, parameters and stages follow it.
    return models.weight_places(model, types, numbers(layers, len(models.layer_names(model))))
