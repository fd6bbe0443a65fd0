"""Turn conversations into token ids with roles, in one tokenisation.

Roles come from the structure of a conversation, never from a search in its text, so a text that imitates a heading or a marker
does not change a role. The rendering of the chat template is cut into its own literal text and the messages (templates.py); the
character offsets of one joint tokenisation then show which part each token comes from. Template text has the role of the
message before it (ASIDE's convention: the assistant's header is data).

A plain text is tokenised as `tokenizer(text)` does: it gets a beginning-of-sequence token only if the tokenizer adds one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from steerlab.inputs.stretches import Layout, Stretch, of_text
from steerlab.inputs.templates import ChatTemplate
from steerlab.inputs.token_roles import with_roles
from steerlab.inputs.tokenising import TextTokenizer, Tokens
from steerlab.inputs.tokens import INSTRUCTION, Batch, Conversation, Encoded, Message, Row, collate, pad_id
from steerlab.job import Preamble

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Part of the keys of artifacts: raise it whenever the same rows are tokenised differently."""
_NORMALISED_TRIES, _CHUNK_ROWS = 3, 1000


@dataclass
class Encoder(PromptStyle):
    """A tokenizer with a prompt style, which turns conversations into `Encoded` rows."""

    tokenizer: PreTrainedTokenizerBase
    prompt_style: Literal["aside", "plain"] = "aside"
    response_role: Literal["data", "instruction", "response"] = "data"
    thinking: bool = False
    """End prompts where a thought begins; see `templates.ChatTemplate`."""
    date: str = DATE
    """Date (ISO 8601) for chat templates that would print the current one."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Sources of `tokenizer` and `chat_template` that the job names; empty if both come with the model."""
    preamble: Preamble = field(default_factory=Preamble)
    num_melted: int = 0
    """Rows so far whose answer begins inside the last token of the prompt; such a row does not begin with its prompt's ids."""
    num_neutralised: int = 0
    """Special tokens written in texts (`<|im_end|>` inside data) that were broken up so far."""

    def __post_init__(self) -> None:
        self._texts = TextTokenizer(self.tokenizer)
        self._added = AddedTokens(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template, or the default of base models. Made on first use: making it renders probes."""
        heading = "Response:\n" if self.prompt_style == "aside" else ""
        return ChatTemplate(self.tokenizer, self.date, heading, self.thinking)

    @property
    def pad_id(self) -> int:
        """Id of padding tokens."""
        return pad_id(self.tokenizer)

    @property
    def eos_id(self) -> int | None:
        """Id of the tokenizer's end-of-sequence token."""
        number = self.tokenizer.eos_token_id
        return number if isinstance(number, int) else None

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end generation: the end of a sequence, and the end of a turn in the chat template."""
        turn = self._markers.end
        ids = (self.eos_id, None if turn is None else self.tokenizer.convert_tokens_to_ids(turn))
        return frozenset(number for number in ids if isinstance(number, int))

    @cached_property
    def _markers(self) -> TurnMarkers:
        try:
            literals = self.template.literals()
        except ValueError:
            literals = []  # the template refuses every conversation; the error is raised when one is encoded
        return TurnMarkers.of(literals, self._added, self.tokenizer.bos_token)

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.template, self._added, self._markers)

    def remarks(self) -> list[str]:
        """Return warnings about the chat template for its users, one sentence each."""
        if self._markers.end is not None:
            return self.template.remarks()
        unended = "the chat template ends an answer without a special token, so that the model does not learn to end an answer"
        return [*self.template.remarks(), unended]

    def preceded_by(self, preamble: Preamble) -> Encoder:
        """Return this encoder with another preamble."""
        return replace(self, preamble=preamble)

    @property
    def saved_spec(self) -> dict[str, Json]:
        """Settings that prompt a model as it was trained, if its tokenizer is saved with it."""
        thinking = {"thinking": True} if self.thinking else {}
        date = {"date": self.date} if prints_date(self.tokenizer) else {}
        preamble = {"preamble": self.preamble.model_dump(mode="json")} if self.preamble else {}
        return {"prompt_style": self.prompt_style, "response_role": self.response_role, **thinking, **date, **preamble}

    @property
    def spec(self) -> dict[str, Json]:
        """Settings stored with a patch: `saved_spec`, and the sources of tokenizer and template."""
        return {**self.saved_spec, **self.elsewhere}

    @property
    def about(self) -> dict[str, Json]:
        """Description of the tokenisation that is stored with activations."""
        # The entries are sorted, because the order of `get_vocab` differs between two loads of one tokenizer.
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "tokenizer_sha256": hashlib.sha256(vocabulary).hexdigest(),
            "prompt": self.spec,
        }

    @property
    def identity(self) -> str:
        """SHA-256 of the tokenizer and its chat template."""
        # The whole definition is hashed, because two tokenizers may share a vocabulary and normalise differently.
        content = f"{self._texts.backend.to_str()}\0{self.tokenizer.chat_template}"
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()

    def small_batch(self) -> Batch:
        """Return a batch of two rows of three tokens, for a trial run that measures the widths of modules."""
        row = Encoded([self.pad_id] * 3, [INSTRUCTION] * 3, [False] * 3, [0] * 3)
        return self.collate([row, row])

    def save(self, directory: Path) -> None:
        """Save the tokenizer into a model's folder."""
        self.tokenizer.save_pretrained(directory)

    def encode_data(self, rows: Sequence[DataRow], data_format: str, max_tokens: int, *, skip_bad: bool = False) -> Rows:
        """Tokenise the rows of a data set for training; see `encoded_rows.encode_data`."""
        return encode_data(self, rows, data_format, max_tokens, skip_bad=skip_bad)

    def collate(
        self,
        rows: Sequence[Row],
        *,
        loss_on: str = "all",
        numbers: Sequence[int] = (),
        side: Literal["left", "right"] = "right",
    ) -> Batch:
        """Return a padded batch of rows; see `tokens.collate`."""
        return collate(rows, self.pad_id, side, loss_on, numbers)

    def encode(self, conversation: Conversation, *, continued: bool = False) -> Encoded:
        """Tokenise one conversation; see `encode_all`."""
        return next(self.encode_all([conversation], continued=continued))

    def encode_all(
        self, conversations: Sequence[Conversation], *, continued: bool = False, per_row: int = 1
    ) -> Iterator[Encoded]:
        """Tokenise conversations, in chunks; one that does not end with an assistant's message becomes a prompt.

        Args:
            conversations: Messages, of which a prompt gets the assistant's header.
            continued: Omit the tokens that the tokenizer puts after a plain text (an end-of-sequence token).
            per_row: Conversations per row of the data set, so that messages count rows.

        Raises:
            ValueError: a text is invalid, or the chat template refuses a conversation; the message names its row, from 1.
        """
        for start in range(0, len(conversations), _CHUNK_ROWS):
            chunk = conversations[start : start + _CHUNK_ROWS]
            rows = [self._numbered(conversation, (start + i) // per_row) for i, conversation in enumerate(chunk)]
            texts = ["".join(stretch.text for stretch in row) for row in rows]
            for i, text in enumerate(texts):
                self._texts.check_length(text, (start + i) // per_row)
            # One call takes a chunk, because tokenizers (in Rust) spreads the texts of a call over the cores.
            tokens = self._texts.tokens(texts, [self._as_text(conversation) for conversation in chunk])
            for conversation, text, row, row_tokens in zip(chunk, texts, rows, tokens, strict=True):
                keeps_end = not continued and conversation[0].speaker == "text"
                whole = self._broken_up(conversation, text, row, row_tokens)
                encoded, is_melted = with_roles(*whole, self._added.names, keeps_end=keeps_end)
                self.num_melted += is_melted
                yield encoded

    def _as_text(self, conversation: Conversation) -> bool:
        """Return whether the tokenizer adds its own tokens (BOS, EOS); a chat template prints them itself."""
        return conversation[0].speaker == "text" or self.tokenizer.chat_template is None

    def _broken_up(
        self, conversation: Conversation, text: str, stretches: list[Stretch], tokens: Tokens
    ) -> tuple[str, list[Stretch], Tokens]:
        """Break up special tokens that a text contains only after normalisation, such as full-width or upper-case ones."""
        normalizer, special_ids = self._texts.backend.normalizer, self._added.special_ids
        # Most rows have no special tokens, and only pay for one look-up of their ids.
        if normalizer is None or special_ids.isdisjoint(tokens.ids):
            return text, stretches, tokens

        def written(number: int, start: int, end: int) -> bool:
            # The unknown token is special too, but its characters do not spell its name.
            with self._texts.explained():
                return number in special_ids and self._added.names[number] in normalizer.normalize_str(text[start:end])

        for _ in range(_NORMALISED_TRIES):
            # The positions are computed anew in each round, because the previous break has moved all later characters.
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
            for number, start in reversed(breaks):  # from the end, so that earlier positions stay valid
                stretch, at = stretches[number], start - starts[number] + 1
                stretches[number] = stretch._replace(text=f"{stretch.text[:at]} {stretch.text[at:]}")
            text = "".join(stretch.text for stretch in stretches)
            tokens = self._texts.tokens([text], [self._as_text(conversation)])[0]
        raise ValueError("a text holds a special token that its normalisation restores in every form that was tried")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens and the token that ended it."""
        # The token that ends a text is removed by its id: in some tokenizers the end of a turn is not a special token, so that
        # `skip_special_tokens` would print it.
        text_ids = list(ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids)
        with self._texts.explained():
            return str(self.tokenizer.decode(text_ids, skip_special_tokens=True))

    def shown(self, token: int) -> str:
        """Return the text of one token for display; a token that decodes to nothing ("▁") is shown by its name."""
        with self._texts.explained():
            return str(self.tokenizer.decode([token])) or str(self.tokenizer.convert_ids_to_tokens(token))

    def check(self, conversation: Conversation) -> None:
        """Raise ValueError if a conversation has an invalid text, or the chat template refuses or changes it."""
        before = self.num_neutralised
        self._numbered(conversation, 0)
        self.num_neutralised = before  # counted when the row is tokenised

    def _numbered(self, conversation: Conversation, number: int) -> list[Stretch]:
        try:
            # Texts are neutralised before the template sees them, because the template's own special tokens must remain.
            neutral = tuple(map(self._neutralise, conversation))
            return of_text(neutral) if neutral[0].speaker == "text" else self._layout.stretches(neutral)
        except ValueError as error:
            raise ValueError(f"row {number + 1}: {error}") from None

    def _neutralise(self, message: Message) -> Message:
        """Break up special tokens written in a text: `<|im_end|>` in data must not end its turn."""
        for part in message.parts:
            checked(part.text)
        neutral, number = broken_up(message, self._forbidden(message.speaker))
        self.num_neutralised += number
        return neutral

    def _forbidden(self, speaker: str) -> re.Pattern[str]:
        """Return the pattern of the tokens that a speaker's text must not contain."""
        # An answer may not end its own turn, but a plain text is not a turn, so only control tokens count there.
        if speaker == "text":
            return self._added.special
        return self._markers.in_answer if speaker == "assistant" else self._markers.in_prompt


def load(directory: Path, prompt: Mapping[str, Any] | None = None, trust_remote_code: bool = False) -> Encoder:
    """Return the encoder of a model: with the tokenizer in its folder, or with the one that the settings name.

    `prompt` has the fields of `Encoder.spec`, None takes the defaults; `trust_remote_code` lets a tokenizer run its own code.

    Raises:
        ValueError: a source is wrong, or has no chat template.
    """
    settings = dict(prompt or {})
    elsewhere = {name: settings.pop(name) for name in ("tokenizer", "chat_template") if name in settings}
    source = elsewhere.get("tokenizer")
    preamble = Preamble.model_validate(settings.pop("preamble", {}))
    tokenizer = models.load_tokenizer(directory if source is None else sources.fetch(source), trust_remote_code)
    if "chat_template" in elsewhere:
        tokenizer.chat_template = template_of(elsewhere["chat_template"])
    return Encoder(tokenizer, **settings, elsewhere=elsewhere, preamble=preamble)
