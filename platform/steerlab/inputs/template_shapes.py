"""Renderings of chat templates, cut into messages and the literal text between them.

A template is a program, so it is asked and never read: one rendering with a private character in the place of every message
shows its literal pieces and the order of the messages, and the rendering of real texts is then followed along these pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from steerlab.inputs.rendering import Renderer, TemplateError, Turn

_FIRST_SENTINEL = 0xE000
"""Private use area: no template writes these characters, and texts are filled in after the cut."""


class UnlikeError(TemplateError):
    """A rendering that does not have the pieces of its shape."""


class Piece(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    message: int | None
    """Number of the message whose text this is; None for the template's own."""
    leads: bool = False
    """The template's own text between the end of a prompt and the answer `message`: a space, as a rule."""


class Form(NamedTuple):
    """What conversations have in common that a template prints with the same literal pieces."""

    speakers: tuple[str, ...]
    fixed: tuple[str | None, ...]
    """A text for each message of which it is known, such as an empty one; None for each that may be any text."""

    @classmethod
    def of_any_texts(cls, speakers: tuple[str, ...]) -> Form:
        """Return the form of conversations of some speakers, whatever they say."""
        return cls(speakers, (None,) * len(speakers))


class Shape(NamedTuple):
    """The literal pieces of a rendering, and the messages between them in the order in which they are printed."""

    literals: list[str]
    order: list[int]

    @property
    def opening(self) -> str:
        """Text between the last message of the prompt and the answer."""
        return self.literals[-2]

    @property
    def before_answer(self) -> str:
        """The rendering up to what opens its answer, every message "text"."""
        return "text".join(self.literals[:-2]) + ("text" if len(self.literals) > 2 else "")


@dataclass
class Shapes:
    """The shapes of a template's renderings, each found once."""

    renderer: Renderer
    _known: dict[tuple[bool, Form, bool], Shape] = field(default_factory=dict)

    def of(self, form: Form, prompt: bool = False) -> Shape:
        """Return the shape of conversations of a form; of a `prompt` with the header of an answer after it.

        Raises:
            TemplateError: the template refuses such conversations, or leaves out or repeats a message.
        """
        key = (self.renderer.wraps, form, prompt)
        if key not in self._known:
            self._known[key] = self._cut(form, prompt)
        return self._known[key]

    def exists(self, form: Form) -> bool:
        """Say whether the template prints all messages of conversations of a form."""
        try:
            self.of(form)
        except TemplateError:
            return False
        return True

    def generation_prompt(self, form: Form) -> str | None:
        """Return what the template itself writes after the last message before an answer; None where it refuses."""
        try:
            return self.of(Form(form.speakers[:-1], form.fixed[:-1]), prompt=True).literals[-1]
        except TemplateError:
            return None

    def _cut(self, form: Form, prompt: bool) -> Shape:
        """Render with one private character in the place of every message, those aside that are `fixed` to a blank text."""
        speakers, fixed = form
        marks = [sentinel(i) for i, text in enumerate(fixed) if text is None]
        texts = [sentinel(i) if text is None else text for i, text in enumerate(fixed)]
        rendered = self.renderer.render([Turn(*turn) for turn in zip(speakers, texts, strict=True)], prompt)
        order = [ord(c) - _FIRST_SENTINEL for c in rendered if c in marks]
        dropped = [speaker for i, speaker in enumerate(speakers) if fixed[i] is None and i not in order]
        if dropped:
            raise TemplateError(
                f"the chat template drops the {dropped[0]}'s message of {', '.join(speakers)}; leave such messages out of the "
                "rows, or give another template (model.chat_template)"
            )
        answers = [i for i in order if speakers[i] == "assistant"]
        if len(answers) != len(set(answers)):
            raise TemplateError(
                f"the chat template prints the assistant's message of {', '.join(speakers)} twice, so that its tokens "
                "cannot be told apart; give another template (model.chat_template)"
            )
        return Shape(re.split("|".join(marks) or "(?!)", rendered), order)


def sentinel(number: int) -> str:
    """Return the private character that stands for a message."""
    return chr(_FIRST_SENTINEL + number)


def followed(rendered: str, shape: Shape, turns: Sequence[Turn]) -> Iterator[Piece]:
    """Follow a rendering along its literal pieces, each message as it is or without the white space that templates trim."""
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
    if place != len(rendered):
        raise UnlikeError


def _printed(rendered: str, place: int, shape: Shape, number: int, turn: Turn) -> str:
    """Return a message as it stands in the rendering."""
    following = shape.literals[number + 1]
    last = number + 1 == len(shape.order)
    for text in _trimmed(turn.text):
        end = place + len(text)
        ends = not last or end + len(following) == len(rendered)
        if ends and rendered.startswith(text, place) and rendered.startswith(following, end):
            return text
    # A filter (`tojson`, `upper`): the text ends where the next literal piece begins, if that cannot be mistaken.
    if following and not last and rendered.count(following, place) == shape.literals[number + 1 :].count(following):
        return rendered[place : rendered.index(following, place)]
    raise UnlikeError


def _trimmed(text: str) -> tuple[str, ...]:
    """Return the forms in which templates print a text."""
    return (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))


def after(opening: str, literal: str) -> str:
    """Return what a template prints between the end of a prompt and a stored answer."""
    return literal.removeprefix(opening) if literal.startswith(opening) else ""


def parted(pieces: Sequence[Piece], turns: Sequence[Turn], lead: str) -> Iterator[Piece]:
    """Part what stands between a prompt and its answer from the template text before every answer."""
    for number, piece in enumerate(pieces):
        following = pieces[number + 1].message if number + 1 < len(pieces) else None
        answers = lead and following is not None and turns[following].speaker == "assistant" and piece.text.endswith(lead)
        if answers:
            yield Piece(piece.text[: -len(lead)], None)
            yield Piece(lead, following, leads=True)
        else:
            yield piece
