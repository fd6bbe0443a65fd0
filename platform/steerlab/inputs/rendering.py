"""Calls of a chat template, a program of whoever made the model: each call has an end and prints the same on every day.

A template that has no end in time, memory or length, or that computes what nothing can interrupt, is refused.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
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
_PERCENT = chr(0xE000)
"""Stands for %% in a date's format while the directives are replaced; no template writes this private character."""

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


class EndlessError(TemplateError):
    """A template that has no end, in time, memory or length; it is not tried in other forms."""


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


def apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], **settings: Any) -> object:
    """Call `apply_chat_template` with an end: a template is a program of whoever made the model.

    Raises:
        TemplateError: the template takes too long, too much memory, or prints too much. What it raises itself is passed on.
    """
    try:
        with limited("the chat template", seconds=_LIMIT_S, num_bytes=_LIMIT_BYTES):
            rendered = tokenizer.apply_chat_template(list(messages), **settings)  # type: ignore[arg-type]
    except TooLong as error:
        raise EndlessError(f"{error}, for one row") from None
    length, given = len(rendered), len(str(messages))
    if isinstance(rendered, str) and length > given + _LIMIT_CHARS:
        raise EndlessError(f"the chat template prints {length:,} characters for messages of {given:,}, as if it had no end")
    return rendered


class Turn(NamedTuple):
    """A message as a template sees it."""

    speaker: str
    text: str


@dataclass
class Renderer:
    """A tokenizer's chat template, called for the text that it prints of messages."""

    tokenizer: PreTrainedTokenizerBase
    date: str = DATE
    heading: str = ""
    """Written before an answer where the tokenizer has no template."""
    thinking: bool = False
    """Templates that switch thinking on by a setting are told to."""
    wraps: bool = False
    """The template wants content as a list of {"type": "text"}."""
    endless: EndlessError | None = field(init=False, default=None)
    """Why the template is not called any more."""

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            self._source = f"{{%- set heading = {json.dumps(self.heading)} -%}}{BLANK_LINES}"
        else:
            source = default_of(self.tokenizer.chat_template)
            self._source = f"{_fixed_date(self.date)}{source}" if prints_date(self.tokenizer) else source
        if (computed := _product_in(self._source)) is not None:
            self.endless = EndlessError(
                f"the chat template computes {computed}, which may take for ever and no chat needs: give another template "
                "(model.chat_template)"
            )

    @property
    def _switches(self) -> dict[str, bool]:
        """What templates read by which a model may think: Qwen 3 and GLM by one name, DeepSeek and Granite by the other."""
        return {"enable_thinking": True, "thinking": True} if self.thinking else {}

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return what the template prints of messages; of a `prompt` with the header of an answer after them.

        Raises:
            TemplateError: the template refuses the messages, or has no end.
        """
        messages = [
            {"role": turn.speaker, "content": [{"type": "text", "text": turn.text}] if self.wraps else turn.text}
            for turn in turns
        ]
        if self.endless is not None:
            raise self.endless
        settings = {"chat_template": self._source, "tokenize": False, "add_generation_prompt": prompt, **self._switches}
        try:
            return str(apply(self.tokenizer, messages, **settings))
        except EndlessError as error:
            self.endless = error
            raise
        except Exception as error:  # whatever a template raises is the template's: a division by zero, a loop that is too long
            raise TemplateError(f"the chat template refuses the messages {speakers_of(turns)}: {short(str(error))}") from None

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        with explained(f"the tokenizer {self.tokenizer.name_or_path}"):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def speakers_of(turns: Sequence[Turn]) -> str:
    """Name the speakers of messages, for messages to people."""
    return ", ".join(turn.speaker for turn in turns)


def short(text: str) -> str:
    """Quote a text, the beginning of a long one, for messages to people."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def default_of(template: object) -> str:
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


def _fixed_date(date: str) -> str:
    """Return a macro that stands in for `strftime_now`, in which transformers prints the day of the rendering."""
    day = datetime.fromisoformat(date)
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters if letter != "s"]
    seconds = {"%s": str(int(day.replace(tzinfo=UTC).timestamp()))}  # strftime would take the zone of this machine
    known = seconds | {directive: day.strftime(directive) for directive in directives if day.strftime(directive) != directive}
    replaced = "".join(f"|replace({json.dumps(directive)}, {json.dumps(text)})" for directive, text in known.items())
    whole = f"format|replace('%%', '{_PERCENT}'){replaced}|replace('{_PERCENT}', '%')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ {whole} }}}}{{%- endmacro +%}}"
