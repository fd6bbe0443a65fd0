"""Pairs of a preferred and another response to one prompt, in the forms in which data sets hold them.

A form is known by the shape of a row, never by a file's name:

| form | prompt | chosen, rejected |
|---|---|---|
| texts | `prompt`, a text | texts |
| dialogues (HH-RLHF) | none: all before the last "\\n\\nAssistant:" | texts "\\n\\nHuman: ... \\n\\nAssistant: ..." |
| texts after a dialogue | `prompt`, a dialogue that ends in "\\n\\nAssistant:" | texts |
| conversations | none, messages, or a text (UltraFeedback binarised) | messages {role, content} with the same beginning |
| LLaMA-Factory | `conversations`, messages {from, value} | one message |

All become {"prompt": a text, or messages {role, content}; "chosen": a text; "rejected": a text}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = ("prompt", "chosen", "rejected")
Messages = list[dict[str, str]]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in the one form.

    Raises:
        ValueError: the row is of none of the forms, a response is empty, or both are equal.
    """
    prompt = _prompt(row)
    chosen, rejected = (_response(row[name], name, prompt) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _parted(prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError("chosen and rejected are of two forms: one is a text, the other holds messages")
    if not prompt:
        raise ValueError("the pair has no prompt: neither a field prompt nor a dialogue before the responses")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"the response in {name} is empty")
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same text, so neither is preferred")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant's turn, so that no response can follow")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt(row: Mapping[str, Any]) -> str | Messages:
    """Return what stands in a prompt field; nothing where the responses hold it."""
    found = row.get("conversations", row.get("prompt")) or ""
    if not isinstance(found, str):
        return _messages(found, "prompt")
    # A prompt that is a dialogue ends with the header of the response that follows.
    return _dialogue(found.removesuffix("\n\nAssistant:")) if _TURN.match(found) else found


def _response(value: Any, name: str, prompt: str | Messages) -> str | Messages:
    if not isinstance(value, str):
        return _messages([value] if isinstance(value, Mapping) else value, name)
    return _dialogue(value) if not prompt and _TURN.match(value) else value


def _dialogue(text: str) -> Messages:
    """Take a text of turns apart; a turn's header inside of another's text cannot be told from one."""
    _, *pieces = _TURN.split(text)
    return [
        {"role": _SPEAKERS[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _messages(found: Any, name: str) -> Messages:
    if not isinstance(found, Sequence) or not all(isinstance(message, Mapping) for message in found):
        raise ValueError(f"{name} is neither a text nor a list of messages but a {type(found).__name__}")
    messages = []
    for message in found:
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if speaker not in _SPEAKERS or not isinstance(content, str):
            raise ValueError(
                f"a message of {name} has the speaker {speaker!r} and the keys {', '.join(message)}; known are role and "
                f"content, or from and value, with the speakers {', '.join(_SPEAKERS)}"
            )
        messages.append({"role": _SPEAKERS[speaker], "content": content})
    return messages


def _parted(prompt: str | Messages, chosen: Messages, rejected: Messages) -> tuple[Messages, str, str]:
    """Cut what two conversations begin with from the response that each ends with."""
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same text, so neither is preferred")
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt)
    begin, texts = chosen[:common], []
    for name, rest in (("chosen", chosen[common:]), ("rejected", rejected[common:])):
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            raise ValueError(f"behind the beginning that both share, {name} holds {len(rest)} turns, not one of the assistant")
        texts.append(rest[0]["content"])
    held = all(message in begin for message in given)
    return (begin if held else [*given, *begin]), texts[0], texts[1]  # type: ignore[list-item]
