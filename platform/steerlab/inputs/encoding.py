"""Conversations to token ids and roles, in one tokenisation.

Roles come from the structure of a conversation, never from searching text. The chat template's rendering is cut into its
literal pieces and the messages (templates.py); the character offsets of one joint tokenisation then say which part each token
came from. Text that imitates a heading or a marker moves nothing. Template text carries the role of the message before it
(ASIDE's convention: the assistant's header is data).

A plain text is what its tokenizer makes of it: a beginning-of-sequence token stands before it only where `tokenizer(text)` puts
one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steerlab import models
from steerlab.data import sources
from steerlab.data.values import Row as DataRow
from steerlab.guards.json_values import Json
from steerlab.inputs.conversations import PromptStyle, checked
from steerlab.inputs.encoded_rows import Rows, encode_data
from steerlab.inputs.prompt_sources import template_of
from steerlab.inputs.rendering import DATE, prints_date
from steerlab.inputs.special_tokens import AddedTokens, TurnMarkers, broken_up
from steerlab.inputs.stretches import TEMPLATE_PART, Layout, Stretch, melts, of_text
from steerlab.inputs.templates import ChatTemplate
from steerlab.inputs.tokenising import TextTokenizer, Tokens, places
from steerlab.inputs.tokens import INSTRUCTION, Batch, Conversation, Encoded, Message, Row, collate, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Raised whenever the same rows become other tokens, so that what was made of the earlier ones is not taken for new."""
_NORMALISED_TRIES = 3
_CHUNK_ROWS = 1000


@dataclass
class Encoder(PromptStyle):
    """A tokenizer with a prompt style: conversations in, `Encoded` rows out."""

    tokenizer: PreTrainedTokenizerBase
    prompt_style: Literal["aside", "plain"] = "aside"
    response_role: Literal["data", "instruction", "response"] = "data"
    thinking: bool = False
    """Prompts end where a thought begins; see `templates.ChatTemplate`."""
    date: str = DATE
    """The day that a template prints which prints today's."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Sources of the tokenizer and of the chat template, where they do not lie beside the model."""
    num_melted: int = 0
    """Rows so far whose answer begins within the last token of their prompt, which is then not the beginning of the row."""
    num_neutralised: int = 0
    """Special tokens written out in texts (`<|im_end|>` inside data) that were broken up, so far."""

    def __post_init__(self) -> None:
        self._texts = TextTokenizer(self.tokenizer)
        self._added = AddedTokens(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template, or what stands in for it; a template is asked nothing before it is needed."""
        heading = "Response:\n" if self.prompt_style == "aside" else ""
        return ChatTemplate(self.tokenizer, self.date, heading, self.thinking)

    @property
    def pad_id(self) -> int:
        """Id that fills padding."""
        return pad_id(self.tokenizer)

    @property
    def eos_id(self) -> int | None:
        """Id of the tokenizer's end-of-sequence token."""
        number: Any = self.tokenizer.eos_token_id
        return number

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end what the model writes: the end of a sequence, and of a turn in the chat template."""
        turn = self._markers.end
        ids: tuple[Any, ...] = (self.eos_id, None if turn is None else self.tokenizer.convert_tokens_to_ids(turn))
        return frozenset(int(number) for number in ids if number is not None)

    @cached_property
    def _markers(self) -> TurnMarkers:
        try:
            literals = self.template.literals()
        except ValueError:
            literals = []  # a template that refuses every conversation says so where one is asked for
        return TurnMarkers.of(literals, self._added, self.tokenizer.bos_token)

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.template, self._added, self._markers)

    def remarks(self) -> list[str]:
        """Return what somebody who trains or asks in conversations should know, a sentence each."""
        if self._markers.end is not None:
            return self.template.remarks()
        unended = "the chat template ends an answer without a special token, so that no answer learns to end"
        return [*self.template.remarks(), unended]

    @property
    def saved_spec(self) -> dict[str, Json]:
        """Settings that a model needs to be prompted as it was trained, where the tokenizer is saved beside it."""
        thinking = {"thinking": True} if self.thinking else {}
        date = {"date": self.date} if prints_date(self.tokenizer) else {}
        return {"prompt_style": self.prompt_style, "response_role": self.response_role, **thinking, **date}

    @property
    def spec(self) -> dict[str, Json]:
        """Settings that a patch on a model needs: those of `saved_spec`, and the sources of tokenizer and template."""
        return {**self.saved_spec, **self.elsewhere}

    @property
    def about(self) -> dict[str, Json]:
        """What is written beside activations about how texts were read."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "tokenizer_sha256": hashlib.sha256(vocabulary).hexdigest(),
            "prompt": self.spec,
        }

    @property
    def identity(self) -> str:
        """A value that changes with the tokenizer and its chat template."""
        content = f"{self._texts.backend.to_str()}\0{self.tokenizer.chat_template}"
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()

    def small_batch(self) -> Batch:
        """Return two rows of three tokens, by which the widths of modules are found."""
        row = Encoded([self.pad_id] * 3, [INSTRUCTION] * 3, [False] * 3, [0] * 3)
        return self.collate([row, row])

    def save(self, directory: Path) -> None:
        """Write the tokenizer beside a model."""
        self.tokenizer.save_pretrained(directory)

    def encode_data(self, rows: Sequence[DataRow], data_format: str, max_tokens: int, *, skip_bad: bool = False) -> Rows:
        """Tokenise rows of a data set; see the function of this name."""
        return encode_data(self, rows, data_format, max_tokens, skip_bad=skip_bad)

    def collate(
        self,
        rows: Sequence[Row],
        *,
        loss_on: str = "all",
        numbers: Sequence[int] = (),
        side: Literal["left", "right"] = "right",
    ) -> Batch:
        """Pad rows to the longest; see the function of this name."""
        return collate(rows, self.pad_id, side, loss_on, numbers)

    def encode(self, conversation: Conversation, *, continued: bool = False) -> Encoded:
        """Tokenise a conversation once, as a whole; see `encode_all`."""
        return next(self.encode_all([conversation], continued=continued))

    def encode_all(
        self, conversations: Sequence[Conversation], *, continued: bool = False, per_row: int = 1
    ) -> Iterator[Encoded]:
        """Tokenise many conversations, a chunk of them in one call of the tokenizer.

        A prompt ends with the assistant's header. Of a plain text that is to be `continued`, what the tokenizer puts after a
        text (an end-of-sequence token) is left out. `per_row` conversations make a row of the data set, for messages.

        Raises:
            ValueError: something is no text, or the chat template refuses a conversation; the message names its row, from 1.
        """
        for start in range(0, len(conversations), _CHUNK_ROWS):
            chunk = conversations[start : start + _CHUNK_ROWS]
            rows = [self._numbered(conversation, (start + i) // per_row) for i, conversation in enumerate(chunk)]
            texts = ["".join(stretch.text for stretch in row) for row in rows]
            for i, text in enumerate(texts):
                self._texts.check_length(text, (start + i) // per_row)
            tokens = self._texts.tokens(texts, [self._as_text(conversation) for conversation in chunk])
            for conversation, text, row, row_tokens in zip(chunk, texts, rows, tokens, strict=True):
                keeps_end = not continued and conversation[0].speaker == "text"
                yield self._with_roles(*self._broken_up(conversation, text, row, row_tokens), keeps_end)

    def _as_text(self, conversation: Conversation) -> bool:
        """Say whether the tokenizer puts its own tokens around: a chat template prints them itself."""
        return conversation[0].speaker == "text" or self.tokenizer.chat_template is None

    def _broken_up(
        self, conversation: Conversation, text: str, stretches: list[Stretch], tokens: Tokens
    ) -> tuple[str, list[Stretch], Tokens]:
        """Break up what became a special token of a text only once the tokenizer had normalised it: full-width, upper case."""
        normalizer, special_ids = self._texts.backend.normalizer, self._added.special_ids
        if normalizer is None or special_ids.isdisjoint(tokens.ids):
            return text, stretches, tokens

        def written(number: int, start: int, end: int) -> bool:
            # Not so the unknown token, and bytes that stand for a character.
            with self._texts.explained():
                return number in special_ids and self._added.names[number] in normalizer.normalize_str(text[start:end])

        for _ in range(_NORMALISED_TRIES):
            owner = [number for number, stretch in enumerate(stretches) for _ in stretch.text]
            starts = [sum(len(stretch.text) for stretch in stretches[:number]) for number in range(len(stretches))]
            breaks = [
                (owner[start], start)
                for number, (start, end) in zip(tokens.ids, tokens.offsets, strict=True)
                if end > start and stretches[owner[start]].part >= 0 and written(number, start, end)
            ]
            if not breaks:
                return text, stretches, tokens
            self.num_neutralised += len(breaks)
            for number, start in reversed(breaks):
                stretch, at = stretches[number], start - starts[number] + 1
                stretches[number] = stretch._replace(text=f"{stretch.text[:at]} {stretch.text[at:]}")
            text = "".join(stretch.text for stretch in stretches)
            tokens = self._texts.tokens([text], [self._as_text(conversation)])[0]
        raise ValueError("a text holds a special token that its normalisation makes again however it is broken up")

    def _with_roles(self, text: str, stretches: list[Stretch], tokens: Tokens, keeps_end: bool) -> Encoded:
        """Give every token the stretch of the character that decides what it is."""
        owner = [stretch for stretch in stretches for _ in stretch.text]
        before, after = (Stretch("", stretch.role, TEMPLATE_PART) for stretch in (stretches[0], stretches[-1]))
        ids = tokens.ids
        owners = [owner[place] for place in places(text, tokens, self._added.names)] if owner else [after] * len(ids)
        self.num_melted += melts(stretches, owners, tokens.offsets)
        if any(tokens.put):
            around = [bool(put) and start == end for put, (start, end) in zip(tokens.put, tokens.offsets, strict=True)]
            first = next((t for t, here in enumerate(around) if not here), len(around))
            kept = [t for t, here in enumerate(around) if not here or t < first or keeps_end]
            ids = [ids[t] for t in kept]
            owners = [(before if t < first else after) if around[t] else owners[t] for t in kept]
        return Encoded(
            input_ids=ids,
            roles=[stretch.role for stretch in owners],
            in_response=[stretch.answers and stretch.final for stretch in owners],
            parts=[stretch.part for stretch in owners],
            in_answers=[stretch.answers for stretch in owners],
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids; special tokens, and the one that ended it, are left out."""
        written = list(ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids)
        with self._texts.explained():
            return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def shown(self, token: int) -> str:
        """Return the text of one token; that of a word boundary alone ("▁"), which decodes to nothing, is its name."""
        with self._texts.explained():
            return str(self.tokenizer.decode([token])) or str(self.tokenizer.convert_ids_to_tokens(token))

    def check(self, conversation: Conversation) -> None:
        """Refuse a conversation that the chat template refuses or changes, or that holds no text. Raises ValueError."""
        before = self.num_neutralised
        self._numbered(conversation, 0)
        self.num_neutralised = before  # counted when the row is tokenised

    def _numbered(self, conversation: Conversation, number: int) -> list[Stretch]:
        try:
            neutral = tuple(map(self._neutralise, conversation))
            return of_text(neutral) if neutral[0].speaker == "text" else self._layout.stretches(neutral)
        except ValueError as error:
            raise ValueError(f"row {number + 1}: {error}") from None

    def _neutralise(self, message: Message) -> Message:
        """Break up special tokens written in a text, so that no text can end a turn or open another."""
        for part in message.parts:
            checked(part.text)
        neutral, number = broken_up(message, self._forbidden(message.speaker))
        self.num_neutralised += number
        return neutral

    def _forbidden(self, speaker: str) -> re.Pattern[str]:
        """Return what matches the tokens that no text of a speaker may write."""
        if speaker == "text":
            return self._added.special
        return self._markers.in_answer if speaker == "assistant" else self._markers.in_prompt


def load(directory: Path, prompt: Mapping[str, Any] | None = None, trust_remote_code: bool = False) -> Encoder:
    """Load the tokenizer beside a model, or the one that the prompt settings name, as an encoder.

    `prompt` holds the fields of `Encoder.spec`; None takes the defaults. `trust_remote_code` lets a tokenizer run its own code.

    Raises:
        ValueError: a source is wrong, or holds no chat template.
    """
    settings = dict(prompt or {})
    elsewhere = {name: settings.pop(name) for name in ("tokenizer", "chat_template") if name in settings}
    source = elsewhere.get("tokenizer")
    tokenizer = models.load_tokenizer(directory if source is None else sources.fetch(source), trust_remote_code)
    if "chat_template" in elsewhere:
        tokenizer.chat_template = template_of(elsewhere["chat_template"])
    return Encoder(tokenizer, **settings, elsewhere=elsewhere)
