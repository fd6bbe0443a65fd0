"""Read messages in the forms that data sets store them in; all become {"role": ..., "content": a text}.

The speaker is in `role` or `from`, the text in `content` or `value`; a content may be a list of parts of type text. A dialogue
may also be a single text of turns "\\n\\nHuman: ... \\n\\nAssistant: ..." (HH-RLHF).
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
"""Speaker names in data sets -> roles of chat templates."""

# These fields hold thoughts and media besides the text of a message; only the text is read.
_UNUSED = ("reasoning_content", "reasoning", "thinking", "images", "audios", "videos")
_CALLS = ("tool_calls", "function_call")

_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_dialogue(text: str) -> bool:
    """Return whether a text begins as a dialogue of Human and Assistant (HH-RLHF)."""
    return _TURN.match(text) is not None


def dialogue(text: str) -> Messages:
    """Split the text of a dialogue into messages."""
    # The format has no escape, so a message that itself contains "\n\nHuman:" is split there as well.
    _, *pieces = _TURN.split(text)
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def unused(entries: object, name: str) -> list[str]:
    """List the non-empty fields of messages that are not read, as `name.field`."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return []
    messages = [message for message in entries if isinstance(message, Mapping)]
    names = [key for key in _UNUSED if any(_is_filled(message.get(key)) for message in messages)]
    # In OpenAI's fine-tuning format an answer of weight 0 is not trained on, but here it is.
    names += ["weight"] if any(message.get("weight") == 0 for message in messages) else []
    return [f"{name}.{key}" for key in names]


def _is_filled(value: object) -> bool:
    """Return whether a field of a message is neither null nor empty; an empty list or object may be written as a text."""
    if values.is_null(value):
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    return not isinstance(value, Sized) or len(value) > 0


def messages(entries: object, name: str) -> Messages:
    """Return a list of messages as {role, content}; `name` is their field, for error messages.

    Raises:
        ValueError: an entry is not a message, its speaker is unknown, it calls tools, or its content is not a text.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise ValueError(f"{name} is neither a text nor a list of messages but a {type(entries).__name__}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}.{i} is {values.kind(entry)}, not a message")
    return [_message(entry, name, f"{name}.{i}") for i, entry in enumerate(entries)]


def _message(message: Row, field: str, name: str) -> dict[str, str]:
    # Tool calls are structured data that each chat template prints in its own way; dropping them would train an empty answer.
    for calls in _CALLS:
        if _is_filled(message.get(calls)):
            raise ValueError(
                f"{name} calls tools ({calls}), which is not supported: put the text that the model should write into content"
            )
    # Some tables have all four columns, with the unused pair null.
    speaker, content = (_first(message, keys) for keys in (("role", "from"), ("content", "value")))
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None or content is values.MISSING:
        speaker = None if speaker is values.MISSING else speaker
        raise ValueError(
            f"a message of {field} has the speaker {speaker!r} and the keys {', '.join(message)}; known are role and content, "
            f"or from and value, with the speakers {', '.join(ROLES)}"
        )
    return {"role": role, "content": _content(content, f"{name}.content")}


def _first(message: Row, keys: tuple[str, ...]) -> object:
    """Return the first non-null value among `keys`; None if all that are present are null, MISSING if none is present."""
    present = [message[key] for key in keys if key in message]
    return next((value for value in present if not values.is_null(value)), None if present else values.MISSING)


def _content(content: object, name: str) -> str:
    if isinstance(content, Mapping):
        # Some tables store the only part of a message without its list.
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


def with_system(turns: Messages, system: str) -> Messages:
    """Put a system text first, unless it is empty or the messages already begin with a system turn."""
    has_own = bool(turns) and turns[0]["role"] == "system"
    return turns if has_own or not system else [{"role": "system", "content": system}, *turns]


def history(value: object, name: str = "history") -> list[list[str]]:
    """Return earlier turns as pairs [user, assistant] of texts. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {values.kind(value)}, not a list of pairs [user, assistant]")
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name}.{i} is {values.kind(pair)}, not a pair [user, assistant]")
    return [[values.text(turn, f"{name}.{i}.{j}") for j, turn in enumerate(pair)] for i, pair in enumerate(value)]


def of_history(exchanges: Sequence[Sequence[str]]) -> Messages:
    """Return earlier turns, as pairs [user, assistant], as messages."""
    roles = ("user", "assistant")
    return [{"role": role, "content": turn} for pair in exchanges for role, turn in zip(roles, pair, strict=True)]
