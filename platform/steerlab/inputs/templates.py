"""What a chat template makes of a conversation: the text that it prints, cut into messages and what stands between them.

A template is a program, so it is asked and never read. One rendering with a private character in the place of every message
shows the literal pieces and the order of the messages. The rendering of the real texts is then followed along these pieces:
every row is exactly what `apply_chat_template` gives, and a template that changes a text in a way that cannot be followed is
refused with the reason.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from steerlab.guards.faults import TooLong, explained, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "2024-07-26"
"""The day that templates print which print today's: with it a row has the same tokens on every day."""

_LIMIT_S = 5.0
_LIMIT_BYTES = 2**30
_LIMIT_CHARS = 1_000_000
"""Characters that a template may print besides the messages."""
_FIRST_SENTINEL = 0xE000
"""Private use area: no template writes these characters, and texts are filled in after the cut."""
_SYSTEM = (("system", "user"), ("system", "user", "assistant"))
_NO_SYSTEM = (("user",), ("user", "assistant"))
_ANSWERS = ("Yes.", "the answer", "42", "«é»", "<think>")
"""Beginnings of answers by which the end of a prompt is chosen."""
_THOUGHT = "<think>\nOkay\n</think>\n\nYes."
"""An answer with a thought, by which the end of a prompt is chosen that opens one."""


BLANK_LINES = (
    "{%- set asked = messages|selectattr('role', 'in', ['user', 'tool'])|list|length -%}{%- set several = asked > 1 -%}"
    "{%- set names = {'system': '', 'user': 'Human: ', 'assistant': 'Assistant: ', 'tool': 'Tool: '} if several else "
    "{'assistant': heading} -%}"
    "{%- for message in messages -%}"
    "{{ '' if loop.first else '\n\n' }}{{ names[message.role] or '' }}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}"
    "{%- endfor -%}"
    "{{ '\n\n' + names.assistant.rstrip(' ') if add_generation_prompt else '' }}"
)
"""Template for a base model, which has none: texts one after another, a blank line between them. One exchange ends with a
`heading`, which says where the data end; a longer conversation names its speakers as HH-RLHF does."""


class TemplateError(ValueError):
    """A template that refuses a conversation, or changes a text so that roles cannot be told; the message is for people."""


class _EndlessError(TemplateError):
    """A template that has no end, in time, memory or length; it is not tried in other forms."""


class _UnlikeError(TemplateError):
    """A rendering that does not have the pieces of its shape."""


_SMALL = re.compile(r"[0-9]{1,6}(\.[0-9]*)?")


def _product_in(source: str) -> str | None:
    """Name what a template computes that no limit of time stops: a power, or a product neither of whose factors is written out.

    Numbers that grow without bounds are computed in one step, which cannot be interrupted.
    """
    try:
        tokens = [(line, kind, text) for line, kind, text in jinja2.Environment().lex(source) if kind != "whitespace"]
    except Exception:  # what cannot be read cannot be rendered either, which then says why
        return None
    for number, (line, kind, text) in enumerate(tokens):
        beside = [tokens[at] for at in (number - 1, number + 1) if 0 <= at < len(tokens)]
        is_written = any(kind == "string" or _SMALL.fullmatch(text) for _, kind, text in beside)
        if kind == "operator" and (text == "**" or (text == "*" and not is_written)):
            return f"{'a power' if text == '**' else 'a product'} in line {line}"
    return None


def apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
    """Call `apply_chat_template` with an end: a template is a program of whoever made the model.

    Raises:
        TemplateError: the template takes too long, too much memory, or prints too much. What it raises itself is passed on.
    """
    try:
        with limited("the chat template", seconds=_LIMIT_S, num_bytes=_LIMIT_BYTES):
            rendered = tokenizer.apply_chat_template(list(messages), **settings)  # type: ignore[arg-type]
    except TooLong as error:
        raise _EndlessError(f"{error}, for one row") from None
    length, given = len(rendered), len(str(messages))
    if isinstance(rendered, str) and length > given + _LIMIT_CHARS:
        raise _EndlessError(f"the chat template prints {length:,} characters for messages of {given:,}, as if it had no end")
    return rendered


class Turn(NamedTuple):
    """A message as a template sees it."""

    speaker: str
    text: str


class Piece(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    message: int | None
    """Number of the message whose text this is; None for the template's own."""
    leads: bool = False
    """The template's own text between the end of a prompt and the answer `message`: a space, as a rule."""


class _Shape(NamedTuple):
    """The literal pieces of a rendering, and the messages between them in the order in which they are printed."""

    literals: list[str]
    order: list[int]


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, asked for its text."""

    tokenizer: PreTrainedTokenizerBase
    date: str = DATE
    heading: str = ""
    """Written before an answer where the tokenizer has no template."""
    thinking: bool = False
    """Prompts end with the template's own generation prompt, after which a model opens a thought; answers may hold thoughts."""
    wraps: bool = field(init=False)
    """The template wants content as a list of {"type": "text"}."""
    takes_system: bool = field(init=False)
    """The template prints a system message; where it has none, the system text belongs into the user's turn."""
    _shapes: dict[Any, _Shape] = field(default_factory=dict)
    _openings: dict[Any, str] = field(default_factory=dict)
    _endless: _EndlessError | None = None
    """Why the template is not asked any more."""

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            self._source = f"{{%- set heading = {json.dumps(self.heading)} -%}}{BLANK_LINES}"
        else:
            source = default_of(self.tokenizer.chat_template)
            self._source = f"{_fixed_date(self.date)}{source}" if prints_date(self.tokenizer) else source
        if (computed := _product_in(self._source)) is not None:
            self._endless = _EndlessError(
                f"the chat template computes {computed}, which may take for ever and no chat needs: give another template "
                "(model.chat_template)"
            )
        for takes_system, wraps in ((True, False), (True, True), (False, False), (False, True)):
            self.takes_system, self.wraps = takes_system, wraps
            if all(self._prints(speakers) for speakers in self._exchange):
                return
            if self._endless is not None:
                break
        self.takes_system, self.wraps = True, False  # the template prints no form that is known here: its first use says why

    @property
    def _switches(self) -> dict[str, Any]:
        """What templates read by which a model may think: Qwen 3 and GLM by one name, DeepSeek and Granite by the other."""
        return {"enable_thinking": True, "thinking": True} if self.thinking else {}

    @property
    def _exchange(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Speakers of a prompt and of the complete row."""
        return _SYSTEM if self.takes_system else _NO_SYSTEM

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
            turns, fixed = [*turns, Turn("assistant", _sentinel(len(turns)))], (*fixed, None)
        speakers = tuple(turn.speaker for turn in turns)
        shape = self._shape(speakers, fixed)
        if shape.order[-1] != len(turns) - 1:
            raise TemplateError(f"the chat template prints other messages after the answer to {_speakers(turns)}")
        opening = self._opening(speakers, fixed, shape)
        if self.thinking and not prompt:
            return self._thinking_row(turns, shape, opening)
        found = self._follow(turns, shape)
        lead = _after(opening, shape.literals[-2])
        if prompt:
            return [*_parted(found[:-3], turns, lead), Piece(opening, None)]
        return list(_parted(found, turns, lead))

    def _follow(self, turns: Sequence[Turn], shape: _Shape) -> list[Piece]:
        """Cut the rendering of real texts; where it cannot be followed, name the text without which it could."""
        rendered = self._render(turns)
        try:
            return list(_followed(rendered, shape, turns))
        except _UnlikeError:
            if not self.thinking and self._holds_thought(turns, shape):
                raise TemplateError(_thinks(turns[-1])) from None
            for number in sorted(set(shape.order)):
                others = [Turn(turn.speaker, _sentinel(number)) if i == number else turn for i, turn in enumerate(turns)]
                try:
                    list(_followed(self._render(others), shape, others))
                except TemplateError:
                    continue
                raise TemplateError(_changed(turns[number], rendered)) from None
            raise TemplateError(_changed(turns[shape.order[-1]], rendered)) from None

    def _thinking_row(self, turns: Sequence[Turn], shape: _Shape, opening: str) -> list[Piece]:
        """Cut a row after a prompt that ends with `opening`, where a thought begins: all that follows it is the answer.

        Of an answer without a thought that is the empty one which the template prints, if it prints one.
        """
        *before, literal, _, end = self._follow([*turns[:-1], Turn("assistant", _sentinel(len(turns) - 1))], shape)
        rendered, text = self._render(turns), turns[-1].text
        start = "".join(piece.text for piece in before) + opening
        stop = len(rendered) - len(end.text)
        if not rendered.startswith(start) or not rendered.endswith(end.text) or stop < len(start):
            raise TemplateError(
                f"data.thinking: the chat template prints the answer {_short(text)} without a thought, and a prompt opens one "
                f"({_short(opening)}): give the answer a thought, or where the template drops it, give another template "
                "(model.chat_template)"
            )
        answer, empty = rendered[len(start) : stop], _after(opening, literal.text)
        if not _prints(answer, text, opening, empty):
            raise TemplateError(_changed(turns[-1], rendered))
        earlier = list(_parted(before, turns, empty))
        last = len(turns) - 1
        if empty and answer.startswith(empty):
            return [*earlier, Piece(opening, None), Piece(empty, last, leads=True), Piece(answer[len(empty) :], last), end]
        return [*earlier, Piece(opening, None), Piece(answer, last), end]

    def _holds_thought(self, turns: Sequence[Turn], shape: _Shape) -> bool:
        """Say whether the last answer holds a thought, which could be trained after the template's own generation prompt."""
        fixed = tuple(None if turn.text else "" for turn in turns)
        own = self._generation_prompt(tuple(turn.speaker for turn in turns), fixed)
        if own is None or turns[-1].speaker != "assistant" or turns[-1].text == _sentinel(len(turns) - 1):
            return False
        try:
            self._thinking_row(turns, shape, own)
        except TemplateError:
            return False
        return True

    def printed(self) -> str:
        """Return all that the template prints of its own around an exchange. Raises TemplateError where it prints none."""
        speakers = self._exchange[1]
        return "".join(self._shape(speakers, (None,) * len(speakers)).literals)

    def before_messages(self) -> str:
        """Return what the template prints before the first message. Raises TemplateError where it prints no exchange."""
        speakers = self._exchange[1]
        return self._shape(speakers, (None,) * len(speakers)).literals[0]

    def after_answer(self) -> str:
        """Return what the template prints after the last answer. Raises TemplateError where it prints no exchange."""
        speakers = self._exchange[1]
        return self._shape(speakers, (None,) * len(speakers)).literals[-1]

    def remarks(self) -> list[str]:
        """Return what a user of this template should know, a sentence each."""
        said = []
        if not self.takes_system:
            said.append("the chat template has no system turn: the system text begins the user's turn, a blank line after it")
        if prints_date(self.tokenizer):
            said.append(f"the chat template prints the date: it is {self.date} in every row and prompt")
        speakers = self._exchange[1]
        fixed = (None,) * len(speakers)
        used, own = self._opening(speakers, fixed, self._shape(speakers, fixed)), self._generation_prompt(speakers, fixed)
        if own is not None and own.strip() != used.strip():
            related = used.startswith(own) or own.startswith(used)
            thinks = " (data.thinking: true opens them as the template does)" if related else ""
            said.append(
                f"the chat template opens a stored answer with {_short(used)} and a prompt with {_short(own)}: prompts are "
                f"opened as stored answers are, so that what is trained is what is asked{thinks}"
            )
        return said

    def _prints(self, speakers: tuple[str, ...]) -> bool:
        """Say whether the template prints all messages of these speakers."""
        try:
            self._shape(speakers, (None,) * len(speakers))
        except TemplateError:
            return False
        return True

    def _shape(self, speakers: tuple[str, ...], fixed: tuple[str | None, ...], prompt: bool = False) -> _Shape:
        key = (self.wraps, speakers, fixed, prompt)
        if key not in self._shapes:
            self._shapes[key] = self._cut(speakers, fixed, prompt)
        return self._shapes[key]

    def _cut(self, speakers: tuple[str, ...], fixed: tuple[str | None, ...], prompt: bool) -> _Shape:
        """Render with one private character in the place of every message, those aside that are `fixed` to a blank text."""
        marks = [_sentinel(i) for i, text in enumerate(fixed) if text is None]
        texts = [_sentinel(i) if text is None else text for i, text in enumerate(fixed)]
        rendered = self._render([Turn(*turn) for turn in zip(speakers, texts, strict=True)], prompt)
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
        return _Shape(re.split("|".join(marks) or "(?!)", rendered), order)

    def _render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        messages = [
            {"role": turn.speaker, "content": [{"type": "text", "text": turn.text}] if self.wraps else turn.text}
            for turn in turns
        ]
        if self._endless is not None:
            raise self._endless
        settings = {"chat_template": self._source, "tokenize": False, "add_generation_prompt": prompt, **self._switches}
        try:
            return str(apply(self.tokenizer, messages, **settings))
        except _EndlessError as error:
            self._endless = error
            raise
        except Exception as error:  # whatever a template raises is the template's: a division by zero, a loop that is too long
            raise TemplateError(f"the chat template refuses the messages {_speakers(turns)}: {_short(str(error))}") from None

    def _generation_prompt(self, speakers: tuple[str, ...], fixed: tuple[str | None, ...]) -> str | None:
        """Return what the template itself writes after the last message before an answer; None where it refuses."""
        try:
            return self._shape(speakers[:-1], fixed[:-1], prompt=True).literals[-1]
        except TemplateError:
            return None

    def _opening(self, speakers: tuple[str, ...], fixed: tuple[str | None, ...], shape: _Shape) -> str:
        """Choose the end of a prompt: the text between its last message and the answer, such that its ids begin the row's.

        The template's own generation prompt comes first where the row continues it with white space at most (a space, which
        tokenizers such as Llama's join with the word that follows). Else what stands before the answer of the complete row
        does, such as the empty thought that Qwen 3 prints before a stored answer.
        """
        if (speakers, fixed) not in self._openings:
            literal, own = shape.literals[-2], self._generation_prompt(speakers, fixed)
            continued = own is not None and literal.startswith(own) and not literal.removeprefix(own).strip()
            if self.thinking:
                self._openings[speakers, fixed] = self._thoughts_begin_after(own, shape, speakers, fixed)
                return self._openings[speakers, fixed]
            # A blank line at the end of a prompt is one token of GPT-2, and two before a word: then it may be cut short.
            shorter = [literal[:end] for end in range(len(literal), len(literal.rstrip()) - 1, -1)]
            candidates = [own, *shorter] if own is not None and continued else shorter
            fitting = [text for text in candidates if self._begins_rows(text, shape)]
            if not fitting:
                raise TemplateError(
                    "no prompt of the chat template is the beginning of a row: the tokens before an answer depend on the answer"
                )
            self._openings[speakers, fixed] = fitting[0]
        return self._openings[speakers, fixed]

    def _thoughts_begin_after(
        self, own: str | None, shape: _Shape, speakers: tuple[str, ...], fixed: tuple[str | None, ...]
    ) -> str:
        """Return the template's own generation prompt, without white space at its end that would be one token with the answer.

        Raises:
            TemplateError: it is none that a stored answer with a thought could begin with.
        """
        literal = shape.literals[-2]
        if self.tokenizer.chat_template is None or own is None:
            raise TemplateError("data.thinking: the model has no chat template that opens an answer, so none opens a thought")
        if not literal.startswith(own) and not own.startswith(literal):
            raise TemplateError(
                f"data.thinking: the chat template opens a prompt with {_short(own)} and a stored answer with "
                f"{_short(literal)}, so that no thought can be trained; give another template (model.chat_template)"
            )
        shorter = [own[:end] for end in range(len(own), len(own.rstrip()) - 1, -1)]
        turns = [Turn(speaker, "text" if text is None else text) for speaker, text in zip(speakers, fixed, strict=True)]
        row = self._render([*turns[:-1], Turn("assistant", _THOUGHT)])
        before, ids = _before_answer(shape), self._ids(row)
        for opening in shorter:
            prompt = self._ids(before + opening)
            if row.startswith(before + opening) and ids[: len(prompt)] == prompt:
                return opening
        # Where the template drops thoughts, each row says so.
        fitting = next((text for text in shorter if self._begins_rows(text, shape, own)), None)
        if fitting is None:
            raise TemplateError(f"data.thinking: the tokens of a prompt that ends in {_short(own)} depend on what follows it")
        return fitting

    def _begins_rows(self, opening: str, shape: _Shape, literal: str | None = None) -> bool:
        """Say whether a prompt that ends so has the first ids of rows; their answers stand after `literal`."""
        literal = shape.literals[-2] if literal is None else literal
        before = _before_answer(shape)
        prompt = self._ids(before + opening)
        rows = (self._ids(before + literal + answer + shape.literals[-1]) for answer in _ANSWERS)
        return all(row[: len(prompt)] == prompt for row in rows)

    def _ids(self, text: str) -> list[int]:
        with explained(f"the tokenizer {self.tokenizer.name_or_path}"):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def default_of(template: Any) -> str:
    """Return a chat template, or of several with names the one called `default`.

    Raises:
        TemplateError: there is none, or there are several and none is the default.
    """
    if isinstance(template, Sequence) and not isinstance(template, str):  # as tokenizer_config.json holds them
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if isinstance(template, Mapping):
        if len(template) > 1 and "default" not in template:
            raise TemplateError(
                f"none of the chat templates {', '.join(template)} is the default; give one (model.chat_template)"
            )
        template = template.get("default", next(iter(template.values()), None))
    if not isinstance(template, str) or not template.strip():
        raise TemplateError("it holds no chat template")
    return template


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer's chat template prints the day on which it is rendered."""
    return tokenizer.chat_template is not None and "strftime_now" in default_of(tokenizer.chat_template)


def _followed(rendered: str, shape: _Shape, turns: Sequence[Turn]) -> Iterator[Piece]:
    """Follow a rendering along its literal pieces, each message as it is or without the white space that templates trim."""
    place = 0
    for number, literal in enumerate(shape.literals):
        if not rendered.startswith(literal, place):
            raise _UnlikeError
        yield Piece(literal, None)
        place += len(literal)
        if number < len(shape.order):
            message = shape.order[number]
            text = _printed(rendered, place, shape, number, turns[message])
            yield Piece(text, message)
            place += len(text)
    if place != len(rendered):
        raise _UnlikeError


def _printed(rendered: str, place: int, shape: _Shape, number: int, turn: Turn) -> str:
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
    raise _UnlikeError


def _trimmed(text: str) -> tuple[str, ...]:
    """Return the forms in which templates print a text."""
    return (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))


def _before_answer(shape: _Shape) -> str:
    """Return a rendering up to what opens its answer, every message "text"."""
    return "text".join(shape.literals[:-2]) + ("text" if len(shape.literals) > 2 else "")


def _after(opening: str, literal: str) -> str:
    """Return what a template prints between the end of a prompt and a stored answer."""
    return literal.removeprefix(opening) if literal.startswith(opening) else ""


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
        f"the chat template prints a thought of the answer {_short(turn.text)}, and prompts end after an empty one; "
        "data.thinking: true ends them before a thought, so that thoughts are trained and asked for"
    )


def _changed(turn: Turn, rendered: str) -> str:
    if not turn.text:
        return f"the chat template leaves out an empty text of the {turn.speaker}, so that nothing would be learnt there"
    if turn.speaker == "assistant" and turn.text in rendered:
        return (
            f"the chat template prints other text before the answer {_short(turn.text)} than before others (for a thought in "
            "it, as a rule), so that no prompt would be the beginning of its row; take the thought out of the answer, or give "
            "another template (model.chat_template)"
        )
    return (
        f"the chat template changes the {turn.speaker}'s text {_short(turn.text)}, so that the roles of its tokens cannot be "
        "told; write the text as the template prints it, or give another template (model.chat_template)"
    )


def _parted(pieces: Sequence[Piece], turns: Sequence[Turn], lead: str) -> Iterator[Piece]:
    """Part what stands between a prompt and its answer from the template text before every answer."""
    for number, piece in enumerate(pieces):
        following = pieces[number + 1].message if number + 1 < len(pieces) else None
        answers = lead and following is not None and turns[following].speaker == "assistant" and piece.text.endswith(lead)
        if answers:
            yield Piece(piece.text[: -len(lead)], None)
            yield Piece(lead, following, leads=True)
        else:
            yield piece


def _speakers(turns: Sequence[Turn]) -> str:
    return ", ".join(turn.speaker for turn in turns)


def _sentinel(number: int) -> str:
    return chr(_FIRST_SENTINEL + number)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _fixed_date(date: str) -> str:
    """Return a macro that stands in for `strftime_now`, in which transformers prints the day of the rendering."""
    day = datetime.fromisoformat(date)
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters if letter != "s"]
    seconds = {"%s": str(int(day.replace(tzinfo=UTC).timestamp()))}  # strftime would take the zone of this machine
    known = seconds | {directive: day.strftime(directive) for directive in directives if day.strftime(directive) != directive}
    replaced = "".join(f"|replace({json.dumps(directive)}, {json.dumps(text)})" for directive, text in known.items())
    percent = chr(_FIRST_SENTINEL)  # stands for %% while the directives are replaced
    whole = f"format|replace('%%', '{percent}'){replaced}|replace('{percent}', '%')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ {whole} }}}}{{%- endmacro +%}}"
