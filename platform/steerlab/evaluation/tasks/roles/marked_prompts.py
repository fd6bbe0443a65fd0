"""Prompts whose parts say which tokens are the instruction's, the data's and a probe's own."""

from __future__ import annotations

from collections.abc import Sequence

from steerlab.evaluation.asking.items import Numbered
from steerlab.evaluation.tasks.roles import separation
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, INSTRUCTION, Conversation, Message, Part


def marked(encoder: Encoder, instruction: str, data: Sequence[Part]) -> Conversation:
    """Make a prompt whose second part is the instruction's own text and whose last parts are `data`.

    Parts change no tokenisation; they say which tokens are the instruction's and the data's own, headings left out.
    """
    # The template takes the role of a message's first part: an empty data part keeps it whatever role the data get.
    system, *rest = encoder.conversation(instruction, (Part("", DATA), *data))
    text = "".join(part.text for part in system.parts)
    heading = text.removesuffix(instruction)
    return (Message(system.speaker, (Part(heading, INSTRUCTION), Part(instruction, INSTRUCTION))), *rest)


def of_row(encoder: Encoder, item: Numbered, exchanged: bool) -> Conversation:
    """Return the prompt of an instruction row; `exchanged` gives the instruction as data and the data as instruction."""
    first, second = str(item.row["instruction"]), str(item.row["input"])
    instruction, data = (second, first) if exchanged else (first, second)
    return marked(encoder, instruction, (Part(data, DATA),))


def split_probe(item: separation.Item) -> tuple[str, str, str] | None:
    """Cut the data of (D) into what stands before the probe, the probe, and what stands behind it.

    None when the clean data are not found at either end.
    """
    data, with_probe = item.data, item.data_with_probe
    side = str(item.info.get("appended_type", ""))[-1:]
    if with_probe.endswith(data) and not (side == "r" and with_probe.startswith(data)):
        head = with_probe.removesuffix(data)
        probe = head.rstrip()
        return ("", probe, head[len(probe) :] + data) if probe else None
    if with_probe.startswith(data):
        tail = with_probe.removeprefix(data)
        probe = tail.lstrip()
        return (data + tail[: len(tail) - len(probe)], probe, "") if probe else None
    return None


def probe_parts(texts: tuple[str, str, str], role: int) -> tuple[Part, ...]:
    """Give the probe its role; the rest are data."""
    before, probe, after = texts
    return (Part(before, DATA), Part(probe, role), Part(after, DATA))
