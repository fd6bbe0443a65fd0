"""Render conversations with a chat template, and split the text into messages and the template's text between them.

A row is exactly the text that `apply_chat_template` returns. A template that changes a message so that it cannot be located in
this text is refused, with the reason.
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
    """The chat template of a tokenizer, which renders conversations and splits them."""

    tokenizer: PreTrainedTokenizerBase
    date: str = DATE
    heading: InitVar[str] = ""
    """Text before an answer if the tokenizer has no template."""
    thinking: bool = False
    """End prompts with the template's own generation prompt, after which the model begins a thought; train thoughts."""
    takes_system: bool = field(init=False)
    """Whether the template prints system messages; if not, the system text has to be put into the user's turn."""

    def __post_init__(self, heading: str) -> None:
        self._renderer = Renderer(self.tokenizer, self.date, heading, self.thinking)
        self._shapes = Shapes(self._renderer)
        self._ends = PromptEnds(self._shapes)
        # The form is found by trying: with a system turn or without, contents as texts or as lists of parts (multimodal
        # models).
        for takes_system, wraps in ((True, False), (True, True), (False, False), (False, True)):
            self.takes_system, self._renderer.wraps = takes_system, wraps
            if all(self._shapes.exists(Form.of_any_texts(speakers)) for speakers in self._exchange):
                return
            if self._renderer.endless is not None:
                break
        # The template prints none of these forms; its first use raises the reason.
        self.takes_system, self._renderer.wraps = True, False

    @property
    def _exchange(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Speakers of the prompt, and of the complete row, of a single exchange."""
        return _SYSTEM if self.takes_system else _NO_SYSTEM

    @property
    def _row(self) -> Form:
        """Form of the complete row of a single exchange."""
        return Form.of_any_texts(self._exchange[1])

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Return the pieces of a conversation's rendering; their texts, joined, are the rendering.

        A conversation that does not end with an assistant's turn is a prompt, and ends where the answer of its row begins.

        Raises:
            TemplateError: the template refuses the conversation or changes one of its texts.
        """
        # A template may print no turn for an empty message, so its text is part of the form. An empty answer is excepted,
        # because the row must contain its turn, whose end is trained.
        fixed = tuple("" if not turn.text and turn.speaker != "assistant" else None for turn in turns)
        try:
            return self._pieces(turns, fixed)
        except TemplateError:
            blank = tuple(turn.text if turn.text.isspace() else text for turn, text in zip(turns, fixed, strict=True))
            if blank == fixed:
                raise
            return self._pieces(turns, blank)  # the template strips a blank message together with the text before it

    def _pieces(self, turns: Sequence[Turn], fixed: tuple[str | None, ...]) -> list[Piece]:
        """Return the pieces of a conversation; a prompt is cut out of a row with a stand-in for its answer."""
        prompt = turns[-1].speaker != "assistant"
        if prompt:
            turns, fixed = [*turns, Turn("assistant", sentinel(len(turns)))], (*fixed, None)
        form = Form(tuple(turn.speaker for turn in turns), fixed)
        shape = self._shapes.of(form)
        # Text after the answer could not be separated from the answer that a model continues.
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
        """Return the pieces of a rendering. Raises TemplateError, with the changed message, if it does not match its shape.

        The changed message is the one whose replacement by a private character makes the rendering match.
        """
        rendered = self._renderer.render(turns)
        try:
            return list(followed(rendered, shape, turns))
        except UnlikeError:
            if not self.thinking and self._holds_thought(turns, shape):
                raise TemplateError(_thought_message(turns[-1])) from None
            # Messages are tried one by one: the one without which the rendering can be followed is the one that was changed.
            for number in sorted(set(shape.order)):
                others = [Turn(turn.speaker, sentinel(number)) if i == number else turn for i, turn in enumerate(turns)]
                try:
                    list(followed(self._renderer.render(others), shape, others))
                except TemplateError:
                    continue
                raise TemplateError(_change_message(turns[number], rendered)) from None
            raise TemplateError(_change_message(turns[shape.order[-1]], rendered)) from None

    def _thinking_row(self, turns: Sequence[Turn], shape: Shape, opening: str) -> list[Piece]:
        """Return the pieces of a row whose prompt ends with `opening`, where a thought begins; the rest is the answer.

        The answer includes the empty thought that a template may print before an answer without a thought.
        """
        *before, literal, _, end = self._follow([*turns[:-1], Turn("assistant", sentinel(len(turns) - 1))], shape)
        rendered, text = self._renderer.render(turns), turns[-1].text
        start = "".join(piece.text for piece in before) + opening
        stop = len(rendered) - len(end.text)
        if not rendered.startswith(start) or not rendered.endswith(end.text) or stop < len(start):
            raise TemplateError(
                f"data.thinking: the chat template prints the answer {short(text)} without a thought, and a prompt opens one "
                f"({short(opening)}): give the answer a thought or, if the template drops it, give another template "
                "(model.chat_template)"
            )
        answer, empty = rendered[len(start) : stop], after(opening, literal.text)
        if not _prints(answer, text, opening, empty):
            raise TemplateError(_change_message(turns[-1], rendered))
        earlier = list(parted(before, turns, empty))
        last = len(turns) - 1
        if empty and answer.startswith(empty):
            return [*earlier, Piece(opening, None), Piece(empty, last, leads=True), Piece(answer[len(empty) :], last), end]
        return [*earlier, Piece(opening, None), Piece(answer, last), end]

    def _holds_thought(self, turns: Sequence[Turn], shape: Shape) -> bool:
        """Return whether the last answer has a thought that could be trained with `data.thinking: true`."""
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
        """Return the template's text before, between and after the messages of a single exchange.

        Raises:
            TemplateError: the template refuses a single exchange.
        """
        return self._shapes.of(self._row).literals

    def remarks(self) -> list[str]:
        """Return warnings about the template for its users, one sentence each."""
        notes = []
        if not self.takes_system:
            notes.append("the chat template has no system turn: the system text begins the user's turn, a blank line after it")
        if prints_date(self.tokenizer):
            notes.append(f"the chat template prints the date: it is {self.date} in every row and prompt")
        # Some templates open a prompt in another way than they print a stored answer (Qwen 3's empty thought).
        used, own_end = self._ends.of(self._row, self._shapes.of(self._row)), self._shapes.generation_prompt(self._row)
        if own_end is not None and own_end.strip() != used.strip():
            related = used.startswith(own_end) or own_end.startswith(used)
            thinks = " (data.thinking: true opens them as the template does)" if related else ""
            notes.append(
                f"the chat template opens a stored answer with {short(used)} and a prompt with {short(own_end)}: prompts are "
                f"opened as stored answers are, so that training and evaluation agree{thinks}"
            )
        return notes


_TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")


def _prints(answer: str, text: str, opening: str, empty: str) -> bool:
    """Return whether a row's answer is the text `text` as a template with thoughts prints it, apart from white space.

    A template may omit the first tag of `<think>a</think>b` if `opening` ends with it, add the missing one of `a</think>b`, and
    print an empty thought (`empty`) before an answer without a thought.
    """
    wanted, printed, opened = ("".join(string.split()) for string in (text, answer, opening))
    # White space is removed from all of them, since templates strip and add line breaks around thoughts.
    if printed in (wanted, "".join(empty.split()) + wanted):
        return True
    if wanted.endswith(printed):
        return (opened + printed).endswith(wanted)
    return printed.endswith(wanted) and _TAG.fullmatch(printed.removesuffix(wanted)) is not None


def _thought_message(turn: Turn) -> str:
    return (
        f"the chat template prints a thought of the answer {short(turn.text)}, and prompts end after an empty one; "
        "data.thinking: true ends them before a thought, so that thoughts are trained and evaluated"
    )


def _change_message(turn: Turn, rendered: str) -> str:
    """Return the reason why a message is not in the template's output, and the remedy."""
    if not turn.text:
        return f"the chat template omits an empty text of the {turn.speaker}, so that nothing would be trained there"
    if turn.speaker == "assistant" and turn.text in rendered:
        return (
            f"the chat template prints other text before the answer {short(turn.text)} than before others (for a thought in "
            "it, as a rule), so that no prompt would be the beginning of its row; remove the thought from the answer, or give "
            "another template (model.chat_template)"
        )
    return (
        f"the chat template changes the {turn.speaker}'s text {short(turn.text)}, so that the roles of its tokens cannot be "
        "determined; write the text as the template prints it, or give another template (model.chat_template)"
    )
