"""Conversations, in the forms in which data sets hold them.

| form | fields |
|---|---|
| messages | `messages`, `conversations` or `conversation`: a list of {role, content} or {from, value}, or a dialogue |
| prompt and answer | `prompt` and `completion`: texts, or messages |

With a field `system` its text is the first message. What holds nothing (null) counts as absent: merged tables are full of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from steerlab.data import turns, values
from steerlab.data.turns import Messages
from steerlab.data.values import Row

_LISTS = ("messages", "conversations", "conversation")
KNOWN_BY = (*_LISTS, "completion")
"""Fields by which an object is known to be a row of one of the forms."""
_UNUSED = ("system_prompt", "tools", "images", "videos", "audios")


def conversation(row: Row) -> Messages:
    """Return the messages of a row, the last of them the assistant's: turns after it that nobody answers are left out.

    Raises:
        ValueError: the row is of neither form, a message is none, or no turn is an answer.
    """
    held = {name: value for name, value in row.items() if not values.is_null(value)}
    found = turns.with_system(_turns(held), _system(held))
    ends = [i for i, message in enumerate(found) if message["role"] == "assistant"]
    if not ends:
        raise ValueError("no turn of the conversation is the assistant's, so there is no answer to learn")
    if not found[ends[-1]]["content"].strip():
        raise ValueError("the conversation's last answer is empty")
    return found[: ends[-1] + 1]


def unused(row: Row, found: Messages) -> list[str]:
    """Name what a row holds beside its messages and nobody reads."""
    held = {name: value for name, value in row.items() if not values.is_null(value) and value not in ("", [])}
    names = [name for name in _UNUSED if name in held]
    names += [said for name in (*_LISTS, "prompt", "completion") if name in held for said in turns.unused(held[name], name)]
    if "system" in held and found[0] != {"role": "system", "content": held["system"]}:
        names.append("system")
    given = turns.with_system(_turns(held), _system(held))
    return names if len(given) == len(found) else [*names, "turns after the last answer"]


def _system(held: Row) -> str:
    return values.text(held["system"], "system") if "system" in held else ""


def _turns(held: Row) -> Messages:
    for name in _LISTS:
        if name in held and (found := _of(held[name], name, "")):
            return found
    if "prompt" in held and "completion" in held:
        return [*_of(held["prompt"], "prompt", "user"), *_of(held["completion"], "completion", "assistant")]
    if empty := [name for name in _LISTS if name in held]:
        raise ValueError(f"{empty[0]} is an empty list")
    raise ValueError(
        f"the row holds no conversation: neither messages ({', '.join(_LISTS)}) nor prompt and completion "
        f"(it has: {values.names(held)})"
    )


def _of(value: object, name: str, role: str) -> Messages:
    """Return messages, the turns of a dialogue, or a text as the one turn of `role`."""
    if isinstance(value, str) and (turns.is_dialogue(value) or role):
        content = values.text(value, name)
        if turns.is_dialogue(content):
            return turns.dialogue(content.removesuffix("\n\nAssistant:"))
        return [{"role": role, "content": content}]
    if isinstance(value, str):
        raise ValueError(f"{name} is {values.kind(value)}, neither a list of messages nor turns of Human and Assistant")
    return turns.messages([value] if isinstance(value, Mapping) else value, name)
