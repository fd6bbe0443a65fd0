"""Render chat templates, which are programs by the author of the model, within limits and with a result that does not depend on
the date.

A template that takes too much time, memory or length is refused, and so is one with arithmetic that cannot be interrupted.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from steerlab.guards.faults import TooLong, explained, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "2024-07-26"
"""Date for templates that would print the current one, so that a row has the same tokens on every day."""

_LIMIT_S = 5.0
_LIMIT_BYTES = 2**30
_LIMIT_CHARS = 1_000_000
"""Characters that a template may print besides the messages."""
_PERCENT = chr(0xE000)
"""Replaces %% in a date's format while the directives are replaced; no template writes this private character."""

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
"""Template for models without one (base models): the texts, separated by blank lines. In a single exchange, a `heading` before
the answer marks the end of the data; a longer conversation names its speakers as HH-RLHF does."""


class TemplateError(ValueError):
    """A template refuses a conversation, or changes a text so that the roles of its tokens are unknown; for users."""


class EndlessError(TemplateError):
    """A template takes too much time, memory or length; it is not tried again in other forms."""


_SMALL = re.compile(r"[0-9]{1,6}(\.[0-9]*)?")


def _product_in(source: str) -> str | None:
    """Return, for a message, the first power or product of two variables in a template; None if it has none.

    Integers of Python have no size limit, and one operation on huge ones cannot be interrupted by a signal. A product with a
    small written number or a text is allowed.
    """
    try:
        tokens = [(line, kind, text) for line, kind, text in jinja2.Environment().lex(source) if kind != "whitespace"]
    except Exception:  # a template that cannot be parsed cannot be rendered either, and rendering gives the better message
        return None
    for number, (line, kind, text) in enumerate(tokens):
        beside = [tokens[at] for at in (number - 1, number + 1) if 0 <= at < len(tokens)]
        is_written = any(kind == "string" or _SMALL.fullmatch(text) for _, kind, text in beside)
        if kind == "operator" and (text == "**" or (text == "*" and not is_written)):
            return f"{'a power' if text == '**' else 'a product'} in line {line}"
    return None


def apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], **settings: object) -> object:
    """Call `apply_chat_template` within limits of time, memory and length.

    Raises:
        EndlessError: the template exceeds a limit. Errors of the template itself are passed on.
    """
    try:
        # transformers renders in Jinja's sandbox, which limits what a template may do but not for how long.
        with limited("the chat template", seconds=_LIMIT_S, num_bytes=_LIMIT_BYTES):
            rendered = tokenizer.apply_chat_template(list(messages), **settings)  # type: ignore[arg-type]
    except TooLong as error:
        # A loop of minutes per row is refused too, because a data set has thousands of rows.
        raise EndlessError(f"{error}, for one row") from None
    length, length_in = len(rendered), len(str(messages))
    if isinstance(rendered, str) and length > length_in + _LIMIT_CHARS:
        raise EndlessError(
            f"the chat template prints {length:,} characters for messages of {length_in:,}, which is over the limit"
        )
    return rendered


class Turn(NamedTuple):
    """A message as chat templates see it."""

    speaker: str
    text: str


@dataclass
class Renderer:
    """A tokenizer's chat template, or the default of base models, as a function from messages to text."""

    tokenizer: PreTrainedTokenizerBase
    date: str = DATE
    heading: str = ""
    """Text before an answer if the tokenizer has no template."""
    thinking: bool = False
    """Switch on thinking, in templates with a setting for it."""
    wraps: bool = False
    """Pass contents as lists of {"type": "text"}, which templates of multimodal models require."""
    endless: EndlessError | None = field(init=False, default=None)
    """The limit that the template exceeded, after which it is not called again; None if it has not."""

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            self._source = f"{{%- set heading = {json.dumps(self.heading)} -%}}{BLANK_LINES}"
        else:
            source = default_of(self.tokenizer.chat_template)
            self._source = f"{_fixed_date(self.date)}{source}" if prints_date(self.tokenizer) else source
        if (computed := _product_in(self._source)) is not None:
            self.endless = EndlessError(
                f"the chat template computes {computed}, which may take forever and no chat needs: give another template "
                "(model.chat_template)"
            )

    @property
    def _switches(self) -> dict[str, bool]:
        """The variables that switch on thinking: `enable_thinking` in Qwen 3 and GLM, `thinking` in DeepSeek and Granite."""
        return {"enable_thinking": True, "thinking": True} if self.thinking else {}

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return the text that the template prints for messages; with `prompt`, followed by the header of an answer.

        Raises:
            TemplateError: the template refuses the messages, or exceeds a limit.
        """
        messages = [
            {"role": turn.speaker, "content": [{"type": "text", "text": turn.text}] if self.wraps else turn.text}
            for turn in turns
        ]
        if self.endless is not None:
            raise self.endless
        # The template is passed explicitly, because the tokenizer's own may be one of several, or print the date.
        settings = {"chat_template": self._source, "tokenize": False, "add_generation_prompt": prompt, **self._switches}
        try:
            return str(apply(self.tokenizer, messages, **settings))
        except EndlessError as error:
            self.endless = error
            raise
        except Exception as error:  # a template may raise anything: TemplateError of Jinja, ZeroDivisionError, OverflowError
            raise TemplateError(f"the chat template refuses the messages {speakers_of(turns)}: {short(str(error))}") from None

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a rendered text, without tokens that the tokenizer adds itself."""
        with explained(f"the tokenizer {self.tokenizer.name_or_path}"):
            # A chat template has printed BOS already; adding it again would double it.
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def speakers_of(turns: Sequence[Turn]) -> str:
    """List the speakers of a conversation for an error message."""
    return ", ".join(turn.speaker for turn in turns)


def short(text: str) -> str:
    """Quote the beginning of a text for an error message."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def default_of(template: object) -> str:
    """Return the text of a chat template; of several named ones, that of the name `default`, or the only one.

    Raises:
        TemplateError: the value has no template, or several of which none is named `default`.
    """
    if isinstance(template, Sequence) and not isinstance(template, str):  # the form in tokenizer_config.json
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if isinstance(template, Mapping):
        if len(template) > 1 and "default" not in template:
            raise TemplateError(
                f"none of the chat templates {', '.join(template)} is the default; give one (model.chat_template)"
            )
        template = template.get("default", next(iter(template.values()), None))
    if not isinstance(template, str) or not template.strip():
        raise TemplateError("it does not hold a chat template")
    return template


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template prints the current date."""
    return tokenizer.chat_template is not None and "strftime_now" in default_of(tokenizer.chat_template)


def _fixed_date(date: str) -> str:
    """Return a Jinja macro that replaces transformers' `strftime_now`, which prints the current date, by a fixed `date`."""
    # Jinja's sandbox has no strftime, so the directives of the format are replaced by their values one after another.
    day = datetime.fromisoformat(date)
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters if letter != "s"]
    # The seconds are in UTC, since `strftime("%s")` uses the time zone of the machine.
    seconds = {"%s": str(int(day.replace(tzinfo=UTC).timestamp()))}  # strftime would use the time zone of this machine
    texts = seconds | {directive: day.strftime(directive) for directive in directives if day.strftime(directive) != directive}
    replaced = "".join(f"|replace({json.dumps(directive)}, {json.dumps(text)})" for directive, text in texts.items())
    whole = f"format|replace('%%', '{_PERCENT}'){replaced}|replace('{_PERCENT}', '%')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ {whole} }}}}{{%- endmacro +%}}"
