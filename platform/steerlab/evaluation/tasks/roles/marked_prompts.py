"""Prompts that are split into parts, to distinguish the tokens of the instruction, the data and a probe."""

from __future__ import annotations

from collections.abc import Sequence

from steerlab.evaluation.asking.items import Numbered
from steerlab.evaluation.tasks.roles import separation
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, INSTRUCTION, Conversation, Message, Part


def marked(encoder: Encoder, instruction: str, data: Sequence[Part]) -> Conversation:
    """Return a prompt whose part 1 is the instruction without its heading and whose last parts are `data`.

    The split into parts does not change the tokenisation. Tokens of headings are in other parts.
    """
    # The template takes the role of a message's first part. An empty part with the role of data makes the role of the template
    # independent of the role of the data.
    system, *rest = encoder.conversation(instruction, (Part("", DATA), *data))
    # The heading is the prompt style's text before the instruction in the same message.
    text = "".join(part.text for part in system.parts)
    heading = text.removesuffix(instruction)
    return (Message(system.speaker, (Part(heading, INSTRUCTION), Part(instruction, INSTRUCTION))), *rest)


def of_row(encoder: Encoder, item: Numbered, exchanged: bool) -> Conversation:
    """Return the prompt of an instruction row; with `exchanged`, instruction and data swap places."""
    first, second = str(item.row["instruction"]), str(item.row["input"])
    instruction, data = (second, first) if exchanged else (first, second)
    return marked(encoder, instruction, (Part(data, DATA),))


def split_probe(item: separation.Item) -> tuple[str, str, str] | None:
    """Split the data with the probe into the text before the probe, the probe, and the text after it.

    The probe is what remains when the clean data are removed from one end. None if the clean data are at neither end.
    """
    data, with_probe = item.data, item.data_with_probe
    # Repetitive data can be at both ends; then the item's `appended_type` gives the place of the probe.
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
    """Return the three texts as parts: the probe with `role`, the others as data."""
    before, probe, after = texts
    return (Part(before, DATA), Part(probe, role), Part(after, DATA))
