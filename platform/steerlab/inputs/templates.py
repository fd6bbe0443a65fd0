"""What a chat template makes of a conversation: the text that it prints, cut into messages and what stands between them.

Every row is exactly what `apply_chat_template` gives; a template that changes a text in a way that cannot be followed is
refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

from steerlab.inputs.prompt_ends import PromptEnds
from steerlab.inputs.rendering import DATE, Renderer, TemplateError, Turn, prints_date, short, speakers_of
from steerlab.inputs.template_shapes import Form, Piece, Shape, Shapes, UnlikeError, after, followed, parted, sentinel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = (("system", "user"), ("system", "user", "assistant"))
_NO_SYSTEM = (("user",), ("user", "assistant"))


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, asked for its text."""

    tokenizer: PreTrainedTokenizerBase
    date: str = DATE
    heading: InitVar[str] = ""
    """Written before an answer where the tokenizer has no template."""
    thinking: bool = False
    """Prompts end with the template's own generation prompt, after which a model opens a thought; answers may hold thoughts."""
    takes_system: bool = field(init=False)
    """The template prints a system message; where it has none, the system text belongs into the user's turn."""

    def __post_init__(self, heading: str) -> None:
        self._renderer = Renderer(self.tokenizer, self.date, heading, self.thinking)
        self._shapes = Shapes(self._renderer)
        self._ends = PromptEnds(self._shapes)
        for takes_system, wraps in ((True, False), (True, True), (False, False), (False, True)):
            self.takes_system, self._renderer.wraps = takes_system, wraps
            if all(self._shapes.exists(Form.of_any_texts(speakers)) for speakers in self._exchange):
                return
            if self._renderer.endless is not None:
                break
        # The template prints no form that is known here: its first use says why.
        self.takes_system, self._renderer.wraps = True, False

    @property
    def _exchange(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Speakers of a prompt and of the complete row."""
        return _SYSTEM if self.takes_system else _NO_SYSTEM

    @property
    def _row(self) -> Form:
        """Form of one exchange, the answer included."""
        return Form.of_any_texts(self._exchange[1])

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Cut the rendering of a conversation; joined, the pieces are the text that the template prints.

        A conversation that no assistant's turn ends is a prompt, and ends where the answer of a complete row begins.

        Raises:
            TemplateError: the template refuses the conversation or changes one of its texts.
        """
        # Templates may leave out an empty message; an empty answer keeps its place, so that its end is learnt.
        fixed = tuple("" if not turn.text and turn.speaker != "assistant" else None for turn in turns)
        try:
            return self._pieces(turns, fixed)
        except TemplateError:
            blank = tuple(turn.text if turn.text.isspace() else text for turn, text in zip(turns, fixed, strict=True))
            if blank == fixed:
                raise
            return self._pieces(turns, blank)  # a template that trims a blank text with what stands before it

    def _pieces(self, turns: Sequence[Turn], fixed: tuple[str | None, ...]) -> list[Piece]:
        prompt = turns[-1].speaker != "assistant"
        if prompt:
            turns, fixed = [*turns, Turn("assistant", sentinel(len(turns)))], (*fixed, None)
        form = Form(tuple(turn.speaker for turn in turns), fixed)
        shape = self._shapes.of(form)
        if shape.order[-1] != len(turns) - 1:
            raise TemplateError(f"the chat template prints other messages after the answer to {speakers_of(turns)}")
        opening = self._ends.of(form, shape)
        if self.thinking and not prompt:
            return self._thinking_row(turns, shape, opening)
        pieces = self._follow(turns, shape)
        lead = after(opening, shape.opening)
        if prompt:
            return [*parted(pieces[:-3], turns, lead), Piece(opening, None)]
        return list(parted(pieces, turns, lead))

    def _follow(self, turns: Sequence[Turn], shape: Shape) -> list[Piece]:
        """Cut the rendering of real texts; where it cannot be followed, name the text without which it could."""
        rendered = self._renderer.render(turns)
        try:
            return list(followed(rendered, shape, turns))
        except UnlikeError:
            if not self.thinking and self._holds_thought(turns, shape):
                raise TemplateError(_thinks(turns[-1])) from None
            for number in sorted(set(shape.order)):
                others = [Turn(turn.speaker, sentinel(number)) if i == number else turn for i, turn in enumerate(turns)]
                try:
                    list(followed(self._renderer.render(others), shape, others))
                except TemplateError:
                    continue
                raise TemplateError(_changed(turns[number], rendered)) from None
            raise TemplateError(_changed(turns[shape.order[-1]], rendered)) from None

    def _thinking_row(self, turns: Sequence[Turn], shape: Shape, opening: str) -> list[Piece]:
        """Cut a row after a prompt that ends with `opening`, where a thought begins: all that follows it is the answer.

        Of an answer without a thought that is the empty one which the template prints, if it prints one.
        """
        *before, literal, _, end = self._follow([*turns[:-1], Turn("assistant", sentinel(len(turns) - 1))], shape)
        rendered, text = self._renderer.render(turns), turns[-1].text
        start = "".join(piece.text for piece in before) + opening
        stop = len(rendered) - len(end.text)
        if not rendered.startswith(start) or not rendered.endswith(end.text) or stop < len(start):
            raise TemplateError(
                f"data.thinking: the chat template prints the answer {short(text)} without a thought, and a prompt opens one "
                f"({short(opening)}): give the answer a thought, or where the template drops it, give another template "
                "(model.chat_template)"
            )
        answer, empty = rendered[len(start) : stop], after(opening, literal.text)
        if not _prints(answer, text, opening, empty):
            raise TemplateError(_changed(turns[-1], rendered))
        earlier = list(parted(before, turns, empty))
        last = len(turns) - 1
        if empty and answer.startswith(empty):
            return [*earlier, Piece(opening, None), Piece(empty, last, leads=True), Piece(answer[len(empty) :], last), end]
        return [*earlier, Piece(opening, None), Piece(answer, last), end]

    def _holds_thought(self, turns: Sequence[Turn], shape: Shape) -> bool:
        """Say whether the last answer holds a thought, which could be trained after the template's own generation prompt."""
        fixed = tuple(None if turn.text else "" for turn in turns)
        own = self._shapes.generation_prompt(Form(tuple(turn.speaker for turn in turns), fixed))
        if own is None or turns[-1].speaker != "assistant" or turns[-1].text == sentinel(len(turns) - 1):
            return False
        try:
            self._thinking_row(turns, shape, own)
        except TemplateError:
            return False
        return True

    def literals(self) -> list[str]:
        """Return what the template prints of its own before, between and after the messages of an exchange.

        Raises:
            TemplateError: the template prints no exchange.
        """
        return self._shapes.of(self._row).literals

    def remarks(self) -> list[str]:
        """Return what a user of this template should know, a sentence each."""
        said = []
        if not self.takes_system:
            said.append("the chat template has no system turn: the system text begins the user's turn, a blank line after it")
        if prints_date(self.tokenizer):
            said.append(f"the chat template prints the date: it is {self.date} in every row and prompt")
        used, own = self._ends.of(self._row, self._shapes.of(self._row)), self._shapes.generation_prompt(self._row)
        if own is not None and own.strip() != used.strip():
            related = used.startswith(own) or own.startswith(used)
            thinks = " (data.thinking: true opens them as the template does)" if related else ""
            said.append(
                f"the chat template opens a stored answer with {short(used)} and a prompt with {short(own)}: prompts are "
                f"opened as stored answers are, so that what is trained is what is asked{thinks}"
            )
        return said


_TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")


def _prints(answer: str, text: str, opening: str, empty: str) -> bool:
    """Say whether what stands in a row is a text, white space aside, as a template with thoughts prints it.

    `<think>a</think>b` may stand there without its first tag, where the opening holds that; `a</think>b` may get one; before an
    answer without a thought there may be an empty one.
    """
    wanted, printed, opened = ("".join(one.split()) for one in (text, answer, opening))
    if printed in (wanted, "".join(empty.split()) + wanted):
        return True
    if wanted.endswith(printed):
        return (opened + printed).endswith(wanted)
    return printed.endswith(wanted) and _TAG.fullmatch(printed.removesuffix(wanted)) is not None


def _thinks(turn: Turn) -> str:
    return (
        f"the chat template prints a thought of the answer {short(turn.text)}, and prompts end after an empty one; "
        "data.thinking: true ends them before a thought, so that thoughts are trained and asked for"
    )


def _changed(turn: Turn, rendered: str) -> str:
    if not turn.text:
        return f"the chat template leaves out an empty text of the {turn.speaker}, so that nothing would be learnt there"
    if turn.speaker == "assistant" and turn.text in rendered:
        return (
            f"the chat template prints other text before the answer {short(turn.text)} than before others (for a thought in "
            "it, as a rule), so that no prompt would be the beginning of its row; take the thought out of the answer, or give "
            "another template (model.chat_template)"
        )
    return (
        f"the chat template changes the {turn.speaker}'s text {short(turn.text)}, so that the roles of its tokens cannot be "
        "told; write the text as the template prints it, or give another template (model.chat_template)"
    )
