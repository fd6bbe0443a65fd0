"""Messages in the forms in which data sets hold them; all become {"role": ..., "content": a text}.

Roles are named `role` or `from`, contents `content` or `value`; a content may be a list of parts of type text. A dialogue may
also be one text of turns "\\n\\nHuman: ... \\n\\nAssistant: ..." (HH-RLHF).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized

from steerlab.data import values
from steerlab.data.values import Row

Messages = list[dict[str, str]]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
    "function_call": "assistant",  # the assistant's request of a tool, as a text
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
}  # fmt: skip
"""Names of speakers in data sets and the roles of chat templates that they stand for."""

_UNUSED = ("reasoning_content", "reasoning", "thinking", "images", "audios", "videos")
_CALLS = ("tool_calls", "function_call")

_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_dialogue(text: str) -> bool:
    """Say whether a text is a dialogue of Human and Assistant."""
    return _TURN.match(text) is not None


def dialogue(text: str) -> Messages:
    """Take a text of turns apart; a turn's header inside of another's text cannot be told from one."""
    _, *pieces = _TURN.split(text)
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def unused(found: object, name: str) -> list[str]:
    """Name the fields of messages that hold something and are not read."""
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    messages = [message for message in found if isinstance(message, Mapping)]
    names = [key for key in _UNUSED if any(_holds_something(message.get(key)) for message in messages)]
    names += ["weight"] if any(message.get("weight") == 0 for message in messages) else []
    return [f"{name}.{key}" for key in names]


def _holds_something(value: object) -> bool:
    """Say whether a field of a message holds something: no null, and no empty text, list or object, written as text or not."""
    if values.is_null(value):
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    return not isinstance(value, Sized) or len(value) > 0


def messages(found: object, name: str) -> Messages:
    """Return messages in the one form; `name` is that of their field, for messages to people.

    Raises:
        ValueError: these are no messages, a speaker is unknown, or a content is no text.
    """
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise ValueError(f"{name} is neither a text nor a list of messages but a {type(found).__name__}")
    for i, entry in enumerate(found):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}.{i} is {values.kind(entry)}, not a message")
    return [_message(entry, name, f"{name}.{i}") for i, entry in enumerate(found)]


def _message(message: Row, field: str, name: str) -> dict[str, str]:
    for calls in _CALLS:
        if _holds_something(message.get(calls)):
            raise ValueError(
                f"{name} asks for tools ({calls}), which is not read: write what the model is to write into content"
            )
    speaker, content = (_first(message, keys) for keys in (("role", "from"), ("content", "value")))
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None or content is values.MISSING:
        speaker = None if speaker is values.MISSING else speaker
        raise ValueError(
            f"a message of {field} has the speaker {speaker!r} and the keys {', '.join(message)}; known are role and content, "
            f"or from and value, with the speakers {', '.join(ROLES)}"
        )
    if not values.is_null(calls := message.get("tool_calls")) and calls != []:
        raise ValueError(
            f"{name} asks for tools (tool_calls), which is not read: write what the model is to write into content"
        )
    return {"role": role, "content": _content(content, f"{name}.content")}


def _first(message: Row, keys: tuple[str, ...]) -> object:
    """Return what stands under the first of `keys` that has something; null if they all hold nothing, MISSING without a key."""
    held = [message[key] for key in keys if key in message]
    return next((value for value in held if not values.is_null(value)), None if held else values.MISSING)


def _content(content: object, name: str) -> str:
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        return values.text(content, name)
    return "".join(_part(part, f"{name}.{i}") for i, part in enumerate(content))


def _part(part: object, name: str) -> str:
    if not isinstance(part, Mapping):
        return values.text(part, name)
    if part.get("type", "text") != "text" or "text" not in part:
        raise ValueError(f"{name} is a part of type {part.get('type')!r}; only parts of type 'text', with a text, are read")
    return values.text(part["text"], f"{name}.text")


def with_system(found: Messages, system: str) -> Messages:
    """Put a system text first, unless the messages begin with a system turn of their own."""
    own = bool(found) and found[0]["role"] == "system"
    return found if own or not system else [{"role": "system", "content": system}, *found]


def history(found: object, name: str = "history") -> list[list[str]]:
    """Return earlier turns as pairs [user, assistant] of texts. Raises ValueError for anything else."""
    if not isinstance(found, list | tuple):
        raise ValueError(f"{name} is {values.kind(found)}, not a list of pairs [user, assistant]")
    for i, pair in enumerate(found):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name}.{i} is {values.kind(pair)}, not a pair [user, assistant]")
    return [[values.text(turn, f"{name}.{i}.{j}") for j, turn in enumerate(pair)] for i, pair in enumerate(found)]


def of_history(found: Sequence[Sequence[str]]) -> Messages:
    """Return earlier turns as messages."""
    return [{"role": role, "content": turn} for pair in found for role, turn in zip(("user", "assistant"), pair, strict=True)]
