"""Split renderings of chat templates into messages and the template's literal text between them.

A template is a program, so it is probed instead of parsed. It first renders a private character for each message, which shows
its literal pieces and the order of the messages. The rendering of the real texts is then matched against these pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from steerlab.inputs.rendering import Renderer, TemplateError, Turn

_FIRST_SENTINEL = 0xE000
"""First character of Unicode's private use area, which templates do not print; users' texts are never part of a probe."""


class UnlikeError(TemplateError):
    """A rendering does not match the literal pieces of its shape."""


class Piece(NamedTuple):
    """A piece of a rendering: a message, or literal text of the template."""

    text: str
    message: int | None
    """Number of the message; None for the template's text."""
    leads: bool = False
    """True for the template's text between the end of a prompt and the answer `message`, usually a space."""


class Form(NamedTuple):
    """The properties of a conversation that decide which literal pieces a template prints around its messages."""

    speakers: tuple[str, ...]
    fixed: tuple[str | None, ...]
    """For each message its text if the template may treat it differently, such as an empty one; None for any other text."""

    @classmethod
    def of_any_texts(cls, speakers: tuple[str, ...]) -> Form:
        """Return the form of conversations of these speakers with any texts."""
        return cls(speakers, (None,) * len(speakers))


class Shape(NamedTuple):
    """The literal pieces of a rendering, and the order of the messages between them."""

    literals: list[str]
    """Template text before, between and after the messages: one more than `order` has messages."""
    order: list[int]
    """Numbers of the messages as they are printed; a message may be printed more than once."""

    @property
    def opening(self) -> str:
        """Text between the last message of the prompt and the answer."""
        return self.literals[-2]

    @property
    def before_answer(self) -> str:
        """The rendering before `opening`, with "text" for every message."""
        return "text".join(self.literals[:-2]) + ("text" if len(self.literals) > 2 else "")


@dataclass
class Shapes:
    """The shapes of a template's renderings, each determined once."""

    renderer: Renderer
    _shapes: dict[tuple[bool, Form, bool], Shape] = field(default_factory=dict)

    def of(self, form: Form, prompt: bool = False) -> Shape:
        """Return the shape of conversations of a form; with `prompt`, followed by the header of an answer.

        Raises:
            TemplateError: the template refuses such conversations, drops a message, or prints an answer twice.
        """
        # `wraps` changes the rendering, so it is part of the key.
        key = (self.renderer.wraps, form, prompt)
        if key not in self._shapes:
            self._shapes[key] = self._cut(form, prompt)
        return self._shapes[key]

    def exists(self, form: Form) -> bool:
        """Return whether the template prints conversations of a form, with all of their messages."""
        try:
            self.of(form)
        except TemplateError:
            return False
        return True

    def generation_prompt(self, form: Form) -> str | None:
        """Return the template's own text at the end of a prompt (`add_generation_prompt`); None if it refuses the prompt.

        `form` is that of the complete row, with its answer.
        """
        try:
            return self.of(Form(form.speakers[:-1], form.fixed[:-1]), prompt=True).literals[-1]
        except TemplateError:
            return None

    def _cut(self, form: Form, prompt: bool) -> Shape:
        """Render a private character for each message, or its text if that is fixed, and split the rendering at them."""
        speakers, fixed = form
        # A private character is used instead of a word, because no template prints it by itself, strips it or changes its case.
        marks = [sentinel(i) for i, text in enumerate(fixed) if text is None]
        texts = [sentinel(i) if text is None else text for i, text in enumerate(fixed)]
        rendered = self.renderer.render([Turn(*turn) for turn in zip(speakers, texts, strict=True)], prompt)
        # Templates may print messages in another order, or repeat one.
        order = [ord(c) - _FIRST_SENTINEL for c in rendered if c in marks]
        dropped = [speaker for i, speaker in enumerate(speakers) if fixed[i] is None and i not in order]
        if dropped:
            raise TemplateError(
                f"the chat template drops the {dropped[0]}'s message of {', '.join(speakers)}; remove such messages from the "
                "rows, or give another template (model.chat_template)"
            )
        answers = [i for i in order if speakers[i] == "assistant"]
        if len(answers) != len(set(answers)):
            raise TemplateError(
                f"the chat template prints the assistant's message of {', '.join(speakers)} twice, so that its tokens "
                "cannot be assigned; give another template (model.chat_template)"
            )
        return Shape(re.split("|".join(marks) or "(?!)", rendered), order)


def sentinel(number: int) -> str:
    """Return the private character that represents a message in probes."""
    return chr(_FIRST_SENTINEL + number)


def followed(rendered: str, shape: Shape, turns: Sequence[Turn]) -> Iterator[Piece]:
    """Yield the pieces of a rendering: the literal pieces of its shape and the messages between them.

    Raises:
        UnlikeError: the rendering does not match the shape.
    """
    place = 0
    for number, literal in enumerate(shape.literals):
        if not rendered.startswith(literal, place):
            raise UnlikeError
        yield Piece(literal, None)
        place += len(literal)
        if number < len(shape.order):
            message = shape.order[number]
            text = _printed(rendered, place, shape, number, turns[message])
            yield Piece(text, message)
            place += len(text)
    # Text after the last piece would have no role.
    if place != len(rendered):
        raise UnlikeError


def _printed(rendered: str, place: int, shape: Shape, number: int, turn: Turn) -> str:
    """Return the text that the rendering has at `place` for a message, which the template may have stripped or filtered."""
    following = shape.literals[number + 1]
    last = number + 1 == len(shape.order)
    # The unchanged text is tried first, so that white space counts as the template's only if it was stripped.
    for text in _trimmed(turn.text):
        end = place + len(text)
        ends = not last or end + len(following) == len(rendered)
        if ends and rendered.startswith(text, place) and rendered.startswith(following, end):
            return text
    # A filter (`tojson`, `upper`) has changed the text, which ends where the next literal piece begins, if that occurs nowhere
    # else.
    if following and not last and rendered.count(following, place) == shape.literals[number + 1 :].count(following):
        return rendered[place : rendered.index(following, place)]
    raise UnlikeError


def _trimmed(text: str) -> tuple[str, ...]:
    """Return a text as it is and with the white space removed that templates strip (`trim`, `strip`, `lstrip('\\n')`)."""
    # All of them are tried: a template is a program, and which of them it applies cannot be seen in its source.
    return (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))


def after(opening: str, literal: str) -> str:
    """Return the template text between the end of a prompt and a stored answer: `literal` without its beginning `opening`."""
    return literal.removeprefix(opening) if literal.startswith(opening) else ""


def parted(pieces: Sequence[Piece], turns: Sequence[Turn], lead: str) -> Iterator[Piece]:
    """Split `lead`, the text between the end of a prompt and an answer, off the template text before every answer."""
    for number, piece in enumerate(pieces):
        following = pieces[number + 1].message if number + 1 < len(pieces) else None
        answers = lead and following is not None and turns[following].speaker == "assistant" and piece.text.endswith(lead)
        # The text is split only if it ends with the lead, because a template may lead the last answer in another way than
        # earlier ones.
        if answers:
            yield Piece(piece.text[: -len(lead)], None)
            yield Piece(lead, following, leads=True)
        else:
            yield piece
