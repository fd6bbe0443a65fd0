"""Read conversations in the forms that data sets store them in.

| form | fields |
|---|---|
| messages | `messages`, `conversations` or `conversation`: a list of {role, content} or {from, value}, or a dialogue |
| prompt and answer | `prompt` and `completion`: texts, or messages |

The text of a field `system` becomes the first message. A null field counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping

from steerlab.data import turns, values
from steerlab.data.turns import Messages
from steerlab.data.values import Row

_LISTS = ("messages", "conversations", "conversation")
KNOWN_BY = (*_LISTS, "completion")
"""Fields that identify an object as a row in one of these forms."""
# Common data sets have these columns; rows with them are read, but with a warning.
_UNUSED = ("system_prompt", "tools", "images", "videos", "audios")


def conversation(row: Row) -> Messages:
    """Return the messages of a row up to its last assistant turn; later turns have no answer and are dropped.

    Raises:
        ValueError: the row has neither form, an entry is not a message, or no turn is the assistant's.
    """
    fields = _without_nulls(row)
    messages = turns.with_system(_turns(fields), _system(fields))
    # The last answer ends the row, because nothing after it is predicted.
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        raise ValueError("no turn of the conversation is the assistant's, so there is no answer to learn")
    if not messages[ends[-1]]["content"].strip():
        raise ValueError("the conversation's last answer is empty")
    return messages[: ends[-1] + 1]


def unused(row: Row, messages: Messages) -> list[str]:
    """List the non-empty fields of a row that `conversation` did not read; `messages` is its result for the row."""
    fields = {name: value for name, value in _without_nulls(row).items() if value not in ("", [])}
    names = [name for name in _UNUSED if name in fields]
    lists = [name for name in (*_LISTS, "prompt", "completion") if name in fields]
    names += [key for name in lists for key in turns.unused(fields[name], name)]
    if "system" in fields and messages[0] != {"role": "system", "content": fields["system"]}:
        names.append("system")
    all_turns = turns.with_system(_turns(fields), _system(fields))
    return names if len(all_turns) == len(messages) else [*names, "turns after the last answer"]


def _without_nulls(row: Row) -> dict[str, object]:
    # Data sets merged from several sources have the columns of every source, null in the rows of all others.
    return {name: value for name, value in row.items() if not values.is_null(value)}


def _system(fields: Row) -> str:
    return values.text(fields["system"], "system") if "system" in fields else ""


def _turns(fields: Row) -> Messages:
    """Return the messages of a row: of the first field that holds a list of them, or of a prompt with its completion."""
    for name in _LISTS:
        if name in fields and (messages := _messages_of(fields[name], name, "")):
            return messages
    if "prompt" in fields and "completion" in fields:
        prompt = _messages_of(fields["prompt"], "prompt", "user")
        return [*prompt, *_messages_of(fields["completion"], "completion", "assistant")]
    if empty := [name for name in _LISTS if name in fields]:
        raise ValueError(f"{empty[0]} is an empty list")
    raise ValueError(
        f"the row holds no conversation: neither messages ({', '.join(_LISTS)}) nor prompt and completion "
        f"(it has: {values.names(fields)})"
    )


def _messages_of(value: object, name: str, role: str) -> Messages:
    """Return the messages in a field: a list, the turns of a dialogue, or a plain text as one turn of `role`.

    With an empty `role` a plain text is refused.
    """
    if isinstance(value, str) and (turns.is_dialogue(value) or role):
        content = values.text(value, name)
        if turns.is_dialogue(content):
            # HH-RLHF prompts end with the header of the answer that follows, which is not a turn of its own.
            return turns.dialogue(content.removesuffix("\n\nAssistant:"))
        return [{"role": role, "content": content}]
    if isinstance(value, str):
        raise ValueError(f"{name} is {values.kind(value)}, neither a list of messages nor turns of Human and Assistant")
    return turns.messages([value] if isinstance(value, Mapping) else value, name)
