"""Turn prompts that are given in Python into conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation

Prompt: TypeAlias = str | tuple[str, str] | Sequence[Mapping[str, str]]
"""A text; a pair (instruction, its data); or chat messages, [{"role": "user", "content": ...}, ...]."""


class Asked(NamedTuple):
    """A conversation, with the parts of the prompt that tables show."""

    conversation: Conversation
    prompt: str
    """The instruction, or the last message."""
    data: str
    """The data; empty for a text and for messages."""


def asked(encoder: Encoder, prompts: Prompt | Sequence[Prompt]) -> list[Asked]:
    """Return prompts as conversations, in the prompt style with which the model was trained.

    Raises:
        ValueError: a prompt has none of the three forms; the message names it, counted from 0.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts: give a list, not a {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts: the list is empty")
    if isinstance(prompts[0], Mapping):
        raise ValueError("prompts: these are the messages of one chat; put them into another list, [[{'role': ...}, ...]]")
    return [_asked(encoder, prompt, number) for number, prompt in enumerate(prompts)]


def _asked(encoder: Encoder, prompt: object, number: int) -> Asked:
    match prompt:
        case str():
            return Asked(encoder.conversation(prompt), prompt, "")
        case (str() as instruction, str() as data):
            return Asked(encoder.conversation(instruction, data), instruction, data)
        case [Mapping(), *_] if isinstance(prompt, Sequence):
            return _of_messages(encoder, prompt, number)
    raise ValueError(
        f"prompt {number} is a {type(prompt).__name__}: give a text, a pair (instruction, data), or a list of messages "
        '[{"role": "user", "content": "..."}]'
    )


def _of_messages(encoder: Encoder, messages: Sequence[object], number: int) -> Asked:
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'prompt {number}: a message is {{"role": "user", "content": "..."}}, not {message!r:.80}')
    last = messages[-1]
    assert isinstance(last, Mapping)
    if last["role"] == "assistant":
        raise ValueError(f"prompt {number} ends with the assistant's message; end with the message to answer")
    return Asked(encoder.from_row({"messages": list(messages)}, "conversation"), last["content"], "")
