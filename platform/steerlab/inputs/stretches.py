"""Split the rendered text of a conversation into stretches of one role: parts of messages, and template text between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steerlab.inputs.special_tokens import AddedTokens, TurnMarkers
from steerlab.inputs.templates import ChatTemplate, Turn
from steerlab.inputs.tokens import Conversation, Message, Part

TEMPLATE_PART = -1
"""Part number of template text."""


class Stretch(NamedTuple):
    """Consecutive characters of a row with the same role."""

    text: str
    role: int
    """Id of the role, as in tokens.py."""
    part: int
    """Number of the message part, counted over the conversation, or `TEMPLATE_PART`."""
    answers: bool = False
    """True for the text of an assistant's message and for the end of its turn."""
    final: bool = False
    """True for the text of the conversation's last message and for the end of its turn."""


class Layout:
    """Splits the renderings of a chat template into stretches."""

    def __init__(self, template: ChatTemplate, added: AddedTokens, markers: TurnMarkers) -> None:
        self._template, self._added, self._markers = template, added, markers

    def stretches(self, conversation: Conversation) -> list[Stretch]:
        """Return the stretches of a conversation; their texts, joined, are the template's rendering.

        Raises:
            ValueError: the template refuses the conversation or changes one of its texts.
        """
        conversation, following = _folded(conversation, self._template.takes_system)
        turns = [Turn(message.speaker, "".join(part.text for part in message.parts)) for message in conversation]
        # Parts are joined for the template, which does not handle roles, and separated again in its output.
        pieces = self._template.pieces(turns)
        firsts = [sum(len(message.parts) for message in conversation[:i]) for i in range(len(conversation))]
        # Template text before the first message has that message's role. Templates may print messages in another order.
        printed = [piece.message for piece in pieces if piece.message is not None]
        role = conversation[printed[0] if printed else 0].parts[0].role
        answers = final = False
        stretches: list[Stretch] = []
        for text, number, leads in pieces:
            if number is None or leads:
                stretches += self._literal(text, role, answers, final) if number is None else [_led(text, conversation, number)]
                continue
            parts = _as_printed(conversation[number].parts, turns[number].text, text)
            answers, final = turns[number].speaker == "assistant", number == len(conversation) - 1
            role = following[number]
            stretches += [Stretch(part.text, part.role, firsts[number] + i, answers, final) for i, part in enumerate(parts)]
        return stretches

    def _literal(self, text: str, role: int, after_answer: bool, final: bool) -> list[Stretch]:
        """Split template text after an answer into the end of the answer's turn, which is trained, and the rest.

        An earlier answer may end with another token than the last one (gpt-oss), or without a token before the next turn.
        """
        ended = self._added.leading.match(text) if after_answer else None
        if ended is None or (ended[1] != self._markers.end and (self._markers.end is None or ended[1] == self._markers.first)):
            return [Stretch(text, role, TEMPLATE_PART)]
        closing = Stretch(ended[0], role, TEMPLATE_PART, answers=True, final=final)
        # The end of the turn is part of the answer, because a model that never learns it would never stop.
        return [closing, Stretch(text[ended.end() :], role, TEMPLATE_PART)]


def of_text(conversation: Conversation) -> list[Stretch]:
    """Return the stretches of a plain text without a template: one for each part."""
    parts = [part for message in conversation for part in message.parts]
    return [Stretch(part.text, part.role, number) for number, part in enumerate(parts)]


def _folded(conversation: Conversation, takes_system: bool) -> tuple[Conversation, list[int]]:
    """Move system messages into the user's turn that follows, unless the template has a system turn.

    Returns:
        The messages, and for each the role of the template text after it: that of the first part of the original message.
    """
    # The first part decides, because a message may have data with a part of another role at its end, or a system text put
    # before it, and the assistant's header must have the role that it has without them.
    messages: list[Message] = []
    roles: list[int] = []
    # These are the system parts seen so far that have not yet been put into a user's turn.
    waiting: tuple[Part, ...] = ()
    for message in conversation:
        if not takes_system and message.speaker == "system":
            waiting = _apart(waiting, message.parts)
            continue
        if waiting and message.speaker != "user":
            messages.append(Message("user", waiting))
            roles.append(waiting[0].role)
            waiting = ()
        messages.append(Message(message.speaker, _apart(waiting, message.parts)))
        roles.append(message.parts[0].role)
        waiting = ()
    if waiting:
        messages.append(Message("user", waiting))
        roles.append(waiting[0].role)
    return tuple(messages), roles


def melts(stretches: Sequence[Stretch], owners: Sequence[Stretch], offsets: Sequence[tuple[int, int]]) -> bool:
    """Return whether the first token of the last answer begins with characters of the prompt."""
    first = next((t for t, stretch in enumerate(owners) if stretch.answers and stretch.final), None)
    if first is None:
        return False
    # The comparison is in characters, since the first token of the answer may also hold the end of the prompt.
    place = 0
    for stretch in stretches:
        if stretch.answers and stretch.final:
            return offsets[first][0] < place
        place += len(stretch.text)
    return False


def _led(text: str, conversation: Conversation, number: int) -> Stretch:
    """Return the stretch of template text between the prompt and the answer `number`.

    It counts as part of the answer, because the model has to write it before its answer.
    """
    return Stretch(text, conversation[number].parts[0].role, TEMPLATE_PART, True, number == len(conversation) - 1)


def _apart(first: tuple[Part, ...], second: tuple[Part, ...]) -> tuple[Part, ...]:
    """Join the parts of two messages, with a blank line between them if both have text."""
    if not any(part.text for part in first) or not any(part.text for part in second):
        return (*first, *second)
    return (*first[:-1], Part(f"{first[-1].text}\n\n", first[-1].role), *second)


def _as_printed(parts: tuple[Part, ...], text: str, printed: str) -> tuple[Part, ...]:
    """Return the parts of a message as the template prints them: stripped of white space, or changed by a filter (one part)."""
    if printed == text:
        return parts
    # With a single role it does not matter how the template changed the text.
    if len(parts) == 1:
        return (Part(printed, parts[0].role),)
    # If white space was stripped, the parts are cut by the same number of characters.
    at = text.find(printed)
    if at < 0:
        raise ValueError(
            f"the chat template changes a text of several roles ({text[:40]!r}), so that its roles cannot be separated"
        )
    printed_parts, start = [], 0
    for part in parts:
        begin, end = max(start, at), min(start + len(part.text), at + len(printed))
        printed_parts.append(Part(text[begin : max(begin, end)], part.role))
        start += len(part.text)
    return tuple(printed_parts)
