"""Requests of OpenAI's chat and completions API: their fields, and the conversations that they describe.

Beside OpenAI's fields a request may have `strength`, `top_k`, `min_p` and `repetition_penalty` (the `extra_body` of the client
`openai`), and a message may have parts of type `data`, {"type": "data", "text": ...}: text that the model should work on but
not obey. A part's type sets the role of its tokens, so that methods such as ASIDE act on them.

Each message becomes a turn. Only a single user message with a data part is formatted in the prompt style of the model
(`Encoder.conversation`), as `steerlab generate --prompt --data` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerlab.inputs.conversations import checked
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, INSTRUCTION, Conversation, Message, Part
from steerlab.steered.sampling import Sampling

MOST_TOKENS = 4096
"""Largest number of tokens of an answer."""
_MOST_MESSAGES, _MOST_PARTS, _MOST_CHOICES, _MOST_PROMPTS, _MOST_STOPS = 256, 64, 16, 64, 4
DEFAULT_TOKENS = 256
"""Largest number of tokens of an answer if the client sets none; the room in the context may reduce it."""
_LONGEST = 200_000
"""Largest number of characters of a text."""
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier")
"""Fields of clients that do not affect the text."""


class RefusedError(ValueError):
    """A request cannot be answered; the message is for the client."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


Text = Annotated[str, Field(max_length=_LONGEST)]


class _Strict(BaseModel):
    # Unknown fields are refused: a client should learn that a setting has no effect here.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Part(_Strict):
    type: Literal["text", "data"]
    text: Text


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[tuple[_Part, ...], Field(max_length=_MOST_PARTS)]
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def parts(self) -> tuple[_Part, ...]:
        return (_Part(type="text", text=self.content),) if isinstance(self.content, str) else self.content


class _Generation(_Strict):
    """Fields of both kinds of request."""

    model: Annotated[str, Field(max_length=500)]
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    n: int = Field(1, ge=1, le=_MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[tuple[Text, ...], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    strength: float | None = None
    # These fields are accepted only at their neutral value.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def sampling(self) -> Sampling:
        """Sampling settings of the request. OpenAI's default temperature is 1."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer; an empty text would end it at once and is skipped."""
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(text for text in given if text)

    @property
    def includes_usage(self) -> bool:
        """Whether the last chunk of a stream reports the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def num_tokens(self) -> int | None:
        """Largest number of tokens of an answer; None if the client sets none."""
        return self.max_tokens

    def conversations(self, encoder: Encoder) -> list[Conversation]:
        """Return the prompts of the request. Raises RefusedError."""
        raise NotImplementedError


class Chat(_Generation):
    """A request of `/v1/chat/completions`."""

    messages: Annotated[tuple[_Turn, ...], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def num_tokens(self) -> int | None:
        """Largest number of tokens of an answer; None if the client sets none."""
        return self.max_completion_tokens or self.max_tokens

    def conversations(self, encoder: Encoder) -> list[Conversation]:
        """Return the conversation of the messages, which the assistant will continue."""
        turns = self.messages
        if turns[-1].role == "assistant":
            raise RefusedError("the last message is the assistant's; end with a message to answer", param="messages")
        *before, last = turns
        if last.role == "user" and all(turn.role in ("system", "developer") for turn in before):
            data = tuple(Part(checked(part.text), DATA) for part in last.parts if part.type == "data")
            if data:
                return [self._worded(encoder, before, last, data)]
        return [tuple(_message(turn, encoder.response_role_id) for turn in turns)]

    def _worded(self, encoder: Encoder, before: list[_Turn], last: _Turn, data: tuple[Part, ...]) -> Conversation:
        system = "\n\n".join(part.text for turn in before for part in turn.parts)
        instruction = "".join(part.text for part in last.parts if part.type == "text")
        # If the user's message has only data, the system message is the instruction.
        if not instruction.strip():
            return encoder.conversation(system, data)
        return encoder.conversation(instruction, data, system=system)


class Completion(_Generation):
    """A request of `/v1/completions`: prompts to continue without a chat template."""

    prompt: Text | Annotated[tuple[Text, ...], Field(min_length=1, max_length=_MOST_PROMPTS)]
    echo: Literal[False] | None = None
    logprobs: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    def conversations(self, encoder: Encoder) -> list[Conversation]:
        """Return each prompt as a plain text."""
        prompts = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        if any(not prompt for prompt in prompts):
            raise RefusedError("the prompt is empty", param="prompt")
        return [(Message("text", (Part(checked(prompt), INSTRUCTION),)),) for prompt in prompts]


def _message(turn: _Turn, response_role: int) -> Message:
    # Outputs of tools always have the role of data, as in `PromptStyle.from_row`.
    role = {"assistant": response_role, "tool": DATA}.get(turn.role, INSTRUCTION)
    speaker = "system" if turn.role == "developer" else turn.role
    parts = tuple(Part(checked(part.text), DATA if part.type == "data" else role) for part in turn.parts)
    return Message(speaker, parts or (Part("", role),))


def read(body: object, kind: type[Chat] | type[Completion]) -> Chat | Completion:
    """Return a request from its JSON. Raises RefusedError that names the field."""
    if not isinstance(body, dict):
        raise RefusedError("the body of a request must be a JSON object")
    given = {name: value for name, value in body.items() if name not in _IGNORED}
    # A client may send null for fields that it does not set.
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        # The deepest error is reported: for a value that may be a text or a list, an error inside the list is more precise.
        first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
        place = ".".join(_named(first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(kind.model_fields)) if len(first["loc"]) == 1 else "type and text, role and content"
            raise RefusedError(f"{place} is not supported here; the fields are {known}", param=place) from None
        raise RefusedError(f"{place}: {first['msg']}", param=place) from None


def _named(place: tuple[int | str, ...]) -> Iterator[str]:
    """Yield the parts of a place in a request, without those that pydantic adds for the branches of a union."""
    for part in place:
        if isinstance(part, int) or (not any(mark in part for mark in "[](),") and part not in ("str", "constrained-str")):
            yield str(part)[:60]
