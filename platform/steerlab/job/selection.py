"""Config of the places in a model that are read or steered: modules and tokens."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from steerlab.job.typed import Frozen

Role = Literal["instruction", "data", "response"]
Phase = Literal["prompt", "generation", "prompt_end"]
Span = tuple[int | None, int | None]


def _joined(modules: object) -> object:
    """Turn a list of expressions into one that matches what any of them matches; `:k` after all of them stays at the end.

    Raises:
        ValueError: the list is empty, or its expressions take different elements of tuples.
    """
    if not isinstance(modules, list | tuple) or not all(isinstance(pattern, str) for pattern in modules):
        return modules
    split = [re.fullmatch(r"(.*?)(:\d{1,3})?", pattern, re.DOTALL) for pattern in modules]
    parts = [(match[1], match[2] or "") for match in split if match is not None]
    if len({element for _, element in parts}) != 1:
        raise ValueError(f"modules {list(modules)}: give one expression or more, with the same element (:k) after each")
    return "|".join(f"(?:{pattern})" for pattern, _ in parts) + parts[0][1] if len(parts) > 1 else modules[0]


class Selection(Frozen):
    """Modules and tokens at which a model is read or steered. An exclusion always wins over a selection.

    A token is in phase `generation` if the model generated it or, in a row with a response, if it belongs to the response; all
    others are in phase `prompt`, and the last of these is the `prompt_end`, at which the first token of the answer is computed.
    Positions count a row's tokens from 0, without padding; negative ones count back from the end of the prompt.
    """

    modules: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[str])] = r".*post_attention_layernorm"
    """Regular expression that matches whole module paths, or a list of them; `:k` after it takes element k of a module's tuple
    output."""
    exclude_modules: str | None = None
    """Regular expression of modules that are excluded; null excludes no module."""
    side: Literal["output", "input"] = "output"
    """Tensor that is read or changed: the module's output, or its first argument."""
    phases: tuple[Phase, ...] = ("prompt", "generation")
    """Phases whose tokens are selected. [prompt_end, generation] are the tokens at which an answer is computed."""
    roles: tuple[Role, ...] | None = None
    """Roles whose tokens are selected; null selects every role."""
    exclude_roles: tuple[Role, ...] = ()
    """Roles whose tokens are excluded."""
    positions: tuple[Span, ...] | None = None
    """Spans [start, end) of positions, a null end is open: [[-1, null]] is the last token of the prompt. Null selects all."""
    exclude_positions: tuple[Span, ...] = ()
    """Spans of positions that are excluded: [[0, 1]] excludes the first token."""
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, exclude_if=lambda ids: ids is None)
    """Ids of the vocabulary whose tokens are selected, such as those of the letters of choices; null selects every id."""
    exclude_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), exclude_if=lambda ids: not ids)
    """Ids of the vocabulary whose tokens are excluded, such as those of marks of a chat template."""

    @property
    def takes_all_tokens(self) -> bool:
        """Whether every token is selected, so that no mask is needed."""
        every = {"prompt", "generation"} <= set(self.phases) and self.roles is None and self.positions is None
        return every and not self.exclude_roles and not self.exclude_positions and not self.asks_ids

    @property
    def asks_ids(self) -> bool:
        """Whether the ids of tokens decide which are selected."""
        return self.token_ids is not None or bool(self.exclude_token_ids)

    @model_validator(mode="after")
    def _check(self) -> Selection:
        if not self.phases:
            raise ValueError("phases is empty, so no token is selected")
        if not set(self.roles or get_args(Role)) - set(self.exclude_roles):
            raise ValueError("exclude_roles excludes every selected role, so no token is selected")
        for span in (*(self.positions or ((None, None),)), *self.exclude_positions):
            start, end = span
            if start is not None and end is not None and (start < 0) == (end < 0) and start >= end:
                raise ValueError(f"the span [{start}, {end}) of positions is empty")
        if self.token_ids is not None and not set(self.token_ids) - set(self.exclude_token_ids):
            raise ValueError("exclude_token_ids excludes every id in token_ids, so no token is selected")
        if self.positions == () or any(span in self.exclude_positions for span in self.positions or ()):
            raise ValueError("the positions select no token")
        return self
