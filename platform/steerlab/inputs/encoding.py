"""Conversations and rows of data sets to token ids and roles, in one tokenisation.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from steerlab import models
from steerlab.data import sources
from steerlab.guards import files
from steerlab.guards.faults import explained
from steerlab.inputs.templates import DATE, ChatTemplate, TemplateError, Turn, default_of, prints_date
from steerlab.inputs.tokens import (
    DATA,
    INSTRUCTION,
    ROLES,
    Batch,
    Conversation,
    Encoded,
    Message,
    Pair,
    Part,
    Row,
    collate,
    pad_id,
)
from steerlab.job import written_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Raised whenever the same rows become other tokens, so that what was made of the earlier ones is not taken for new."""
_TEMPLATE_PART = -1
_NORMALISED_TRIES = 3
_LONGEST_TEXT = 10_000_000
"""Characters of a row, or of rows that are tokenised together. The library ends the process, without a word, where the memory
that it takes for them is not there."""
_LONGEST_MADE = 4 * _LONGEST_TEXT
"""Characters that the tokenizer may make of a row before it looks for tokens: those of the longest text, written as bytes."""
_CHUNK_ROWS = 1000

FRAMING = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass
class Encoder:
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
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives no character offsets, which roles need; use a fast tokenizer"
            )
        self._added = {number: str(token) for number, token in self.tokenizer.added_tokens_decoder.items()}
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        # A token of one character cannot be broken up, and stands in every text.
        special = {name for name in special | set(self.tokenizer.all_special_tokens) if len(name) > 1}
        self._special = re.compile(_any_of(special))
        self._special_ids = frozenset(number for number, name in self._added.items() if name in special)
        self._closing = re.compile(rf"\s*({_any_of(special | set(self._added.values()))})")

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template, or what stands in for it; a template is asked nothing before it is needed."""
        heading = "Response:\n" if self.prompt_style == "aside" else ""
        return ChatTemplate(self.tokenizer, self.date, heading, self.thinking)

    @property
    def response_role_id(self) -> int:
        """Role of generated tokens."""
        return ROLES[self.response_role]

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
        turn = self._end_of_turn
        ids: list[Any] = [self.eos_id, None if turn is None else self.tokenizer.convert_tokens_to_ids(turn)]
        return frozenset(int(number) for number in ids if number is not None)

    @cached_property
    def _markers(self) -> frozenset[str]:
        """Added tokens, special or not, that the template itself writes: in what is asked, none may come from a text."""
        try:
            printed = self.template.printed()
        except ValueError:
            return frozenset()
        return frozenset(name for name in self._added.values() if len(name) > 1 and name in printed)

    @cached_property
    def _marker(self) -> re.Pattern[str]:
        special = {name for number, name in self._added.items() if number in self._special_ids}
        return re.compile(_any_of(special | self._markers))

    @cached_property
    def _ender(self) -> re.Pattern[str]:
        """What no answer may hold: it may write markers of its own, such as a thought's, but not the end of its turn."""
        special = {name for number, name in self._added.items() if number in self._special_ids}
        end = self._end_of_turn
        return re.compile(_any_of(special if end is None or len(end) < 2 else special | {end}))

    @cached_property
    def _end_of_turn(self) -> str | None:
        """The token that ends the assistant's turn: the first one after an answer, where no text stands before it."""
        try:
            found = self._closing.match(self.template.after_answer())
        except ValueError:
            return None  # a template that refuses every conversation says so where one is asked for
        return None if found is None else found[1]

    @cached_property
    def _first_marker(self) -> str | None:
        """The first added token before a first message, BOS aside: it opens turns, also after an answer without an end."""
        found = (match[1] for match in re.finditer(self._closing, self.template.before_messages()))
        return next((name for name in found if name and name != self.tokenizer.bos_token), None)

    def remarks(self) -> list[str]:
        """Return what somebody who trains or asks in conversations should know, a sentence each."""
        if self._end_of_turn is not None:
            return self.template.remarks()
        unended = "the chat template ends an answer without a special token, so that no answer learns to end"
        return [*self.template.remarks(), unended]

    @property
    def saved_spec(self) -> dict[str, Any]:
        """Settings that a model needs to be prompted as it was trained, where the tokenizer is saved beside it."""
        thinking = {"thinking": True} if self.thinking else {}
        date = {"date": self.date} if prints_date(self.tokenizer) else {}
        return {"prompt_style": self.prompt_style, "response_role": self.response_role, **thinking, **date}

    @property
    def spec(self) -> dict[str, Any]:
        """Settings that a patch on a model needs: those of `saved_spec`, and the sources of tokenizer and template."""
        return {**self.saved_spec, **self.elsewhere}

    @property
    def about(self) -> dict[str, Any]:
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
        content = f"{self.tokenizer.backend_tokenizer.to_str()}\0{self.tokenizer.chat_template}"  # type: ignore[attr-defined]
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()

    def small_batch(self) -> Batch:
        """Return two rows of three tokens, by which the widths of modules are found."""
        row = Encoded([self.pad_id] * 3, [INSTRUCTION] * 3, [False] * 3, [0] * 3)
        return self.collate([row, row])

    def save(self, directory: Path) -> None:
        """Write the tokenizer beside a model."""
        self.tokenizer.save_pretrained(directory)

    def encode_data(
        self, rows: Sequence[Mapping[str, Any]], data_format: str, max_tokens: int, *, skip_bad: bool = False
    ) -> Rows:
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

    def conversation(
        self,
        instruction: str,
        data: str | Sequence[Part] = "",
        response: str | None = None,
        *,
        system: str = "",
        history: Sequence[Sequence[str]] = (),
    ) -> Conversation:
        """Make the messages of one row; `data` may come as parts, `response` None makes a prompt to be continued.

        The `aside` style is the paper's (ASIDE, arXiv 2503.10566): framing and `Instruction:` in the system turn, `Input:` in
        the user turn, `No input` when there is none; a model without a chat template gets `Response:` before the answer. Unlike
        the authors' code no period is added to the response. `system` stands before the instruction. `history` holds earlier
        exchanges (user, assistant); their user turns are instructions.
        """
        data_parts = (Part(data, DATA),) if isinstance(data, str) else tuple(data)
        if self.prompt_style == "aside":
            instruction = f"{FRAMING}\n\nInstruction:\n{instruction}"
            if len("".join(part.text for part in data_parts)) < 2:
                data_parts = (Part("No input", DATA),)
            data_parts = (Part("Input:\n", DATA), *data_parts)
        if system:
            instruction = f"{system}\n\n{instruction}"
        turns = [(speaker, text) for pair in history for speaker, text in zip(("user", "assistant"), pair, strict=True)]
        earlier = tuple(self._turn({"role": speaker, "content": text}) for speaker, text in turns)
        messages = (Message("system", (Part(instruction, INSTRUCTION),)), *earlier, Message("user", data_parts))
        if response is None:
            return messages
        return (*messages, Message("assistant", (Part(response, self.response_role_id),)))

    def from_row(self, row: Mapping[str, Any], data_format: str) -> Conversation:
        """Make the conversation of a data row in one of the formats of `DataSet.format`. Raises ValueError if it has two."""
        if data_format == "preference":
            raise ValueError("rows of format preference are pairs of conversations: they train methods and are evaluated on")
        if data_format == "text":
            return (Message("text", (Part(row["text"], INSTRUCTION),)),)
        if data_format == "conversation":
            return tuple(map(self._turn, row["messages"]))
        return self.conversation(
            row["instruction"],
            row.get("input") or "",
            checked(row["output"]),
            system=row.get("system") or "",
            history=row.get("history") or (),
        )

    def from_pair(self, row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
        """Make the two conversations of a preference row, in the form of pairs.py: the preferred one first.

        A text is asked as any instruction is, in the prompt style; messages are turns of their own.
        """
        context = {"data": row.get("input") or "", "system": row.get("system") or ""}
        chosen, rejected = (self.dialogue(row["prompt"], row[name], **context) for name in ("chosen", "rejected"))
        return chosen, rejected

    def dialogue(
        self, prompt: str | Sequence[Mapping[str, str]], response: str | None = None, *, data: str = "", system: str = ""
    ) -> Conversation:
        """Make the messages of a text or of messages {role, content}; `response` None makes a prompt to be continued.

        `data` and `system` go with a text; messages hold their own.
        """
        if isinstance(prompt, str):
            return self.conversation(prompt, data, response, system=system)
        turns = tuple(map(self._turn, prompt))
        return turns if response is None else (*turns, self._turn({"role": "assistant", "content": response}))

    def _turn(self, message: Mapping[str, str]) -> Message:
        role = {"assistant": self.response_role_id, "tool": DATA}.get(message["role"], INSTRUCTION)
        return Message(message["role"], (Part(message["content"], role),))  # type: ignore[arg-type]

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
            texts = ["".join(stretch.text for stretch in stretches) for stretches in rows]
            for i, text in enumerate(texts):
                if len(text) > (longest := min(_LONGEST_TEXT, int(_LONGEST_MADE / self._growth))):
                    number = (start + i) // per_row + 1
                    makes = f" (this tokenizer makes {self._growth:,.0f} of one)" if longest < _LONGEST_TEXT else ""
                    raise ValueError(
                        f"row {number} has {len(text):,} characters, more than {longest:,}{makes}: cut it into rows"
                    )
            with untrimmed_offsets(self.tokenizer):
                found = self._tokens(texts, [self._as_text(conversation) for conversation in chunk])
            for conversation, text, stretches, tokens in zip(chunk, texts, rows, found, strict=True):
                keeps_end = not continued and conversation[0].speaker == "text"
                yield self._with_roles(*self._broken_up(conversation, text, stretches, tokens), keeps_end)

    def _as_text(self, conversation: Conversation) -> bool:
        """Say whether the tokenizer puts its own tokens around: a chat template prints them itself."""
        return conversation[0].speaker == "text" or self.tokenizer.chat_template is None

    def _tokens(self, texts: Sequence[str], as_text: Sequence[bool]) -> list[_Tokens]:
        """Tokenise texts in their order, with and without the tokenizer's own tokens around them."""
        found: dict[int, _Tokens] = {}
        for adds in set(as_text):
            for numbers in _together([i for i, here in enumerate(as_text) if here == adds], texts, self._growth):
                with self._explained():
                    tokens = self.tokenizer(
                        [texts[i] for i in numbers],
                        add_special_tokens=adds,
                        return_offsets_mapping=True,
                        return_special_tokens_mask=True,
                        return_attention_mask=False,
                    )
                columns = (tokens[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
                found |= dict(zip(numbers, map(_Tokens, *columns), strict=True))  # type: ignore[arg-type]
        return [found[i] for i in range(len(texts))]

    @cached_property
    def _growth(self) -> float:
        """How many characters the tokenizer makes of one, at most."""
        return models.growth_of(self.tokenizer)

    def _explained(self) -> AbstractContextManager[None]:
        return explained(f"the tokenizer {self.tokenizer.name_or_path}")

    def _broken_up(
        self, conversation: Conversation, text: str, stretches: list[_Stretch], tokens: _Tokens
    ) -> tuple[str, list[_Stretch], _Tokens]:
        """Break up what became a special token of a text only once the tokenizer had normalised it: full-width, upper case."""
        backend: Any = self.tokenizer.backend_tokenizer
        if backend.normalizer is None or self._special_ids.isdisjoint(tokens.ids):
            return text, stretches, tokens

        def written(number: int, start: int, end: int) -> bool:
            # Not so the unknown token, and bytes that stand for a character.
            with self._explained():
                return number in self._special_ids and self._added[number] in backend.normalizer.normalize_str(text[start:end])

        for _ in range(_NORMALISED_TRIES):
            owner = [number for number, stretch in enumerate(stretches) for _ in stretch.text]
            starts = [sum(len(stretch.text) for stretch in stretches[:number]) for number in range(len(stretches))]
            found = [
                (owner[start], start)
                for number, (start, end) in zip(tokens.ids, tokens.offsets, strict=True)
                if end > start and stretches[owner[start]].part >= 0 and written(number, start, end)
            ]
            if not found:
                return text, stretches, tokens
            self.num_neutralised += len(found)
            for number, start in reversed(found):
                stretch, at = stretches[number], start - starts[number] + 1
                stretches[number] = stretch._replace(text=f"{stretch.text[:at]} {stretch.text[at:]}")
            text = "".join(stretch.text for stretch in stretches)
            with untrimmed_offsets(self.tokenizer):
                tokens = self._tokens([text], [self._as_text(conversation)])[0]
        raise ValueError("a text holds a special token that its normalisation makes again however it is broken up")

    def _with_roles(self, text: str, stretches: list[_Stretch], tokens: _Tokens, keeps_end: bool) -> Encoded:
        """Give every token the stretch of the character that decides what it is."""
        owner = [stretch for stretch in stretches for _ in stretch.text]
        before, after = (_Stretch("", stretch.role, _TEMPLATE_PART) for stretch in (stretches[0], stretches[-1]))
        ids = tokens.ids
        owners = [owner[place] for place in self._places(text, tokens)] if owner else [after] * len(ids)
        self.num_melted += _melts(stretches, owners, tokens.offsets)
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

    def _places(self, text: str, tokens: _Tokens) -> list[int]:
        """Return for every token the character of its text that decides what it is.

        A token that crosses a boundary belongs to the later side: no byte of data is ever read as instruction. An added token
        may swallow the white space around it (Phi 3's `<|assistant|>` that of the answer) and stands where its own name stands.
        """
        last = len(text) - 1
        places = [end - 1 if end > start else min(start, last) for start, end in tokens.offsets]
        for t, number in enumerate(tokens.ids):
            if number in self._added and (at := text.find(self._added[number], *tokens.offsets[t])) >= 0:
                places[t] = at
        return places

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids; special tokens, and the one that ended it, are left out."""
        written = list(ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids)
        with self._explained():
            return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def shown(self, token: int) -> str:
        """Return the text of one token; that of a word boundary alone ("▁"), which decodes to nothing, is its name."""
        with self._explained():
            return str(self.tokenizer.decode([token])) or str(self.tokenizer.convert_ids_to_tokens(token))

    def check(self, conversation: Conversation) -> None:
        """Refuse a conversation that the chat template refuses or changes, or that holds no text. Raises ValueError."""
        before = self.num_neutralised
        self._numbered(conversation, 0)
        self.num_neutralised = before  # counted when the row is tokenised

    def _numbered(self, conversation: Conversation, number: int) -> list[_Stretch]:
        try:
            return self._stretches(tuple(map(self._neutralise, conversation)))
        except ValueError as error:
            raise ValueError(f"row {number + 1}: {error}") from None

    def _stretches(self, conversation: Conversation) -> list[_Stretch]:
        """Interleave the template's literal pieces with the parts."""
        if conversation[0].speaker == "text":
            parts = [part for message in conversation for part in message.parts]
            return [_Stretch(part.text, part.role, number) for number, part in enumerate(parts)]
        conversation, following = self._folded(conversation)
        turns = [Turn(message.speaker, "".join(part.text for part in message.parts)) for message in conversation]
        pieces = self.template.pieces(turns)
        firsts = [sum(len(message.parts) for message in conversation[:i]) for i in range(len(conversation))]
        printed = [piece.message for piece in pieces if piece.message is not None]
        role = conversation[printed[0] if printed else 0].parts[0].role
        answers = final = False
        stretches: list[_Stretch] = []
        for text, number, leads in pieces:
            if number is None or leads:
                stretches += self._literal(text, role, answers, final) if number is None else [_led(text, conversation, number)]
                continue
            parts = _as_printed(conversation[number].parts, turns[number].text, text)
            answers, final = turns[number].speaker == "assistant", number == len(conversation) - 1
            role = following[number]
            stretches += [_Stretch(part.text, part.role, firsts[number] + i, answers, final) for i, part in enumerate(parts)]
        return stretches

    def _literal(self, text: str, role: int, after_answer: bool, final: bool) -> list[_Stretch]:
        """Part a literal piece after an answer into what ends the answer's turn and the rest.

        An earlier answer may end in another token than the last one (gpt-oss), or in none: what follows opens the next turn.
        """
        ended = self._closing.match(text) if after_answer else None
        if ended is None or (ended[1] != self._end_of_turn and (self._end_of_turn is None or ended[1] == self._first_marker)):
            return [_Stretch(text, role, _TEMPLATE_PART)]
        closing = _Stretch(ended[0], role, _TEMPLATE_PART, answers=True, final=final)
        return [closing, _Stretch(text[ended.end() :], role, _TEMPLATE_PART)]

    def _folded(self, conversation: Conversation) -> tuple[Conversation, list[int]]:
        """Put system messages into the user's turn that follows, for a template that has no system turn.

        Returns the messages, and for each the role of the template text after it: that of its own first part. A probe with
        another role at its end, or a system text before it, must not colour the assistant's header.
        """
        fold = not self.template.takes_system
        messages: list[Message] = []
        roles: list[int] = []
        waiting: tuple[Part, ...] = ()
        for message in conversation:
            if fold and message.speaker == "system":
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

    def _neutralise(self, message: Message) -> Message:
        """Break up special tokens written in a text by a space, so that no text can end a turn or open another."""
        for part in message.parts:
            checked(part.text)
        joined = "".join(part.text for part in message.parts)
        known = {"text": self._special, "assistant": self._ender}.get(message.speaker, self._marker)
        breaks = {match.start() + 1 for match in known.finditer(joined)}
        if not breaks:
            return message
        self.num_neutralised += len(breaks)
        parts, start = [], 0
        for part in message.parts:
            here = "".join((" " if start + i in breaks else "") + c for i, c in enumerate(part.text))
            parts.append(Part(here, part.role))
            start += len(part.text)
        return Message(message.speaker, tuple(parts))


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


def fingerprint(name: str, source: str) -> str:
    """Return a value that changes when what is behind a source of `Encoder.elsewhere` changes; part of a stage's key."""
    if name == "tokenizer":
        return sources.fingerprint(source)
    return f"sha256:{hashlib.sha256(template_of(source).encode()).hexdigest()}"


def template_of(source: str) -> str:
    """Return a chat template: a text is one itself, everything else is the source of a file or model that holds one.

    Raises:
        ValueError: the source is wrong, or holds no template.
    """
    if written_out(source):
        return source
    path = sources.fetch(source)
    if path.is_dir():
        named = path / "chat_template.jinja"
        template = files.read_text(named) if named.is_file() else models.load_tokenizer(path).chat_template
    else:
        text = files.read_text(path)
        template = json.loads(text).get("chat_template") if path.suffix == ".json" else text
    try:
        return default_of(template)
    except TemplateError as error:
        raise ValueError(f"model.chat_template {source}: {error}") from None


def _together(numbers: Sequence[int], texts: Sequence[str], growth: float = 1.0) -> Iterator[list[int]]:
    """Yield the numbers of texts, so many together as have `_LONGEST_TEXT` characters at most, each made `growth`."""
    chosen, length = [], 0
    for number in numbers:
        if chosen and (length + len(texts[number])) * growth > _LONGEST_TEXT:
            yield chosen
            chosen, length = [], 0
        chosen.append(number)
        length += len(texts[number])
    if chosen:
        yield chosen


class _Stretch(NamedTuple):
    """Characters of a row that share their role."""

    text: str
    role: int
    part: int
    answers: bool = False
    """True for an assistant's message and what ends its turn."""
    final: bool = False
    """True for the last message of the conversation and what ends its turn."""


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]
    put: list[int]
    """1 for what the tokenizer put around the text."""


def _melts(stretches: Sequence[_Stretch], owners: Sequence[_Stretch], offsets: Sequence[tuple[int, int]]) -> bool:
    """Say whether the first token of the last answer begins before the answer does."""
    first = next((t for t, stretch in enumerate(owners) if stretch.answers and stretch.final), None)
    if first is None:
        return False
    place = 0
    for stretch in stretches:
        if stretch.answers and stretch.final:
            return offsets[first][0] < place
        place += len(stretch.text)
    return False


def _led(text: str, conversation: Conversation, number: int) -> _Stretch:
    """Return template text that stands after the prompt: the model writes it before its answer, so it is learnt as that."""
    return _Stretch(text, conversation[number].parts[0].role, _TEMPLATE_PART, True, number == len(conversation) - 1)


def checked(text: Any) -> str:
    """Return a text. Raises ValueError for what no tokenizer reads."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.60} is a {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"the text {text[:40]!r} holds {half}, half of a character of two (a surrogate)") from None
    return text


@contextmanager
def untrimmed_offsets(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let a tokenizer count the spaces of its tokens for a while (byte-level ones with `trim_offsets`, Llama 3 among them).

    Trimmed offsets hide that a token holds the space of a neighbouring part, and point past the text where a token is a space.
    """
    backend: Any = tokenizer.backend_tokenizer
    trimming = [step for step in _steps(backend.post_processor) if getattr(step, "trim_offsets", False)]
    for step in trimming:
        step.trim_offsets = False
    try:
        yield
    finally:
        for step in trimming:
            step.trim_offsets = True


def _steps(processor: Any) -> Iterator[Any]:
    """Yield a post-processor and, of a sequence of them, each."""
    if processor is None:
        return
    yield processor
    if hasattr(processor, "__getitem__"):
        for step in processor:
            yield from _steps(step)


def _apart(first: tuple[Part, ...], second: tuple[Part, ...]) -> tuple[Part, ...]:
    """Join the parts of two messages with a blank line, where both have a text."""
    if not any(part.text for part in first) or not any(part.text for part in second):
        return (*first, *second)
    return (*first[:-1], Part(f"{first[-1].text}\n\n", first[-1].role), *second)


def _as_printed(parts: tuple[Part, ...], text: str, printed: str) -> tuple[Part, ...]:
    """Return the parts of a message as its template prints them: without white space at the ends, or changed by a filter."""
    if printed == text:
        return parts
    if len(parts) == 1:
        return (Part(printed, parts[0].role),)
    at = text.find(printed)
    if at < 0:
        raise ValueError(f"the chat template changes a text of several roles ({text[:40]!r}), which can then not be told apart")
    kept, start = [], 0
    for part in parts:
        begin, end = max(start, at), min(start + len(part.text), at + len(printed))
        kept.append(Part(text[begin : max(begin, end)], part.role))
        start += len(part.text)
    return tuple(kept)


def _any_of(names: set[str]) -> str:
    """Return a regular expression for any of some texts, the longest first; none of them matches nothing."""
    return "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or "(?!)"


class Rows(NamedTuple):
    """Tokenised rows of a data set and what truncation did to it."""

    rows: list[Row]
    numbers: list[int]
    """Their numbers in the data set."""
    num_cut: int
    """Rows whose response was cut at `max_tokens`; of a pair, one of the two."""
    num_dropped: int
    """Rows left out because instruction and data alone did not fit, or because they were empty; and pairs whose two responses
    are the same tokens up to the cut."""
    num_refused: int = 0
    """Rows left out by `skip_bad`: the chat template refuses them or changes their text."""

    def check(self, max_tokens: int) -> None:
        """Raise ValueError when no row fits."""
        if not self.rows:
            raise ValueError(f"no row fits into {max_tokens} tokens: {self.num_dropped} prompts are longer (train.max_tokens)")


class RowEncoder(Protocol):
    """What the training loop needs of the object that turns rows into batches: `Encoder`, or a pipeline's `Prompter`."""

    num_melted: int
    num_neutralised: int

    @property
    def spec(self) -> Mapping[str, Any]:
        """Settings kept beside a patch."""
        ...

    @property
    def saved_spec(self) -> Mapping[str, Any]:
        """Settings kept beside a whole model."""
        ...

    def encode_data(
        self, rows: Sequence[Mapping[str, Any]], data_format: str, max_tokens: int, *, skip_bad: bool = False
    ) -> Rows:
        """Encode the rows of a data set. Raises ValueError at a bad row, unless `skip_bad` leaves it out."""
        ...

    def collate(self, rows: Any, /, *, loss_on: str = "all", numbers: Sequence[int] = ()) -> Any:
        """Make a batch of encoded rows."""
        ...

    def save(self, directory: Path) -> None:
        """Write what is needed to encode rows as now."""
        ...


def encode_data(
    encoder: Encoder, rows: Sequence[Mapping[str, Any]], data_format: str, max_tokens: int, *, skip_bad: bool = False
) -> Rows:
    """Tokenise rows of a data set; the boundary between roles is never cut away silently. There may be no row left.

    Raises:
        ValueError: the chat template refuses a row or changes its text, unless `skip_bad` leaves such rows out.
    """
    pairs = data_format == "preference"
    made: list[tuple[Conversation, ...] | None] = []
    for number, row in enumerate(rows, 1):
        try:
            conversations = encoder.from_pair(row) if pairs else (encoder.from_row(row, data_format),)
            if skip_bad:
                for conversation in conversations:
                    encoder.check(conversation)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"row {number}: {error}") from None
            made.append(None)
            continue
        made.append(conversations)
    return _encode_pairs(encoder, made, max_tokens) if pairs else _encode_each(encoder, made, max_tokens)


def asked_otherwise(encoder: Encoder, rows: Sequence[Mapping[str, Any]], data_format: str) -> int:
    """Count the rows of which a prompt, as an evaluation asks it, is not the beginning, ids equal."""
    pairs = data_format == "preference"
    made = [encoder.from_pair(row) if pairs else (encoder.from_row(row, data_format),) for row in rows]
    flat = [conversation for conversations in made for conversation in conversations]
    wholes, prompts = (encoder.encode_all(some) for some in (flat, [conversation[:-1] for conversation in flat]))
    differ = [whole.input_ids[: len(prompt)] != prompt.input_ids for whole, prompt in zip(wholes, prompts, strict=True)]
    return sum(any(differ[i : i + len(made[0])]) for i in range(0, len(differ), len(made[0]))) if made else 0


_Made = Sequence[tuple[Conversation, ...] | None]
"""The conversations of each row: one, or the two of a pair; None for a row that is left out."""


def _encode_each(encoder: Encoder, made: _Made, max_tokens: int) -> Rows:
    encoded = encoder.encode_all([conversations[0] for conversations in made if conversations is not None])

    def fitted(conversations: tuple[Conversation, ...] | None) -> tuple[Row | None, bool]:
        if conversations is None:
            return None, False
        row = next(encoded)
        prompt = 1 if conversations[0][0].speaker == "text" else _prompt_length(row)
        fits = prompt < max_tokens and len(row) > 1  # a row of one token has nothing to predict
        return row.cut(max_tokens) if fits else None, len(row) > max_tokens

    return _kept(map(fitted, made), made.count(None))


def _encode_pairs(encoder: Encoder, made: _Made, max_tokens: int) -> Rows:
    both = [conversation for conversations in made if conversations is not None for conversation in conversations]
    encoded = encoder.encode_all(both, per_row=2)

    def fitted(conversations: tuple[Conversation, ...] | None) -> tuple[Row | None, bool]:
        if conversations is None:
            return None, False
        chosen, rejected = next(encoded), next(encoded)
        pair = Pair(chosen.cut(max_tokens), rejected.cut(max_tokens))
        has_room = all(_prompt_length(row) < max_tokens for row in (chosen, rejected))
        fits = has_room and pair.chosen.input_ids != pair.rejected.input_ids
        return pair if fits else None, max(len(chosen), len(rejected)) > max_tokens

    return _kept(map(fitted, made), made.count(None))


def _kept(fitted: Iterable[tuple[Row | None, bool]], num_refused: int) -> Rows:
    """Gather rows, each None where it is left out, and whether it was cut; `num_refused` were left out by `skip_bad`."""
    rows: list[Row] = []
    numbers: list[int] = []
    num_cut = num_dropped = 0
    for number, (row, cut) in enumerate(fitted):
        if row is None:
            num_dropped += 1
            continue
        rows.append(row)
        numbers.append(number)
        num_cut += cut
    return Rows(rows, numbers, num_cut, num_dropped - num_refused, num_refused)


def prompt_length(row: Row) -> int:
    """Return the number of tokens before a row's last answer; of a pair, those of the longer prompt."""
    return max(_prompt_length(sequence) for sequence in row.sequences)


def _prompt_length(row: Encoded) -> int:
    return next((t for t, inside in enumerate(row.in_response) if inside), len(row))
