"""Messages to token ids, roles and labels in one tokenisation; padding; the legend of tensor axes.

Axes, as suffixes of tensor names: B rows, T tokens, D width, L layers, V vocabulary, P pairs of coordinates (D/2).

Roles come from the structure of a conversation, never from searching text. The chat template is rendered with one private
character in place of every message, cut at those characters into literal pieces, and filled with the texts; the character
offsets of one joint tokenisation then say which part each token came from. Text that imitates a heading or a marker moves
nothing. Template text carries the role of the message before it (ASIDE's convention: the assistant's header is data).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jinja2
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION, DATA, RESPONSE, PADDING = 0, 1, 2, 3
ROLES = {"instruction": INSTRUCTION, "data": DATA, "response": RESPONSE, "padding": PADDING}
PROMPT, GENERATION = 0, 1
PHASES = {"prompt": PROMPT, "generation": GENERATION}
IGNORED = -100
"""Label of a token that is not in the loss (transformers' convention)."""

_TEMPLATE_PART = -1
_CHUNK_ROWS = 1000
_FIRST_SENTINEL = 0xE000  # private use area: no template writes these characters, and texts are filled in after the cut

FRAMING = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Part(NamedTuple):
    """A stretch of a message's text with one role."""

    text: str
    role: int


class Message(NamedTuple):
    """One turn. Speaker `text` stands alone: plain text without a chat template."""

    speaker: Literal["system", "user", "assistant", "text"]
    parts: tuple[Part, ...]


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Encoded:
    """One tokenised row; all lists have one entry a token."""

    input_ids: list[int]
    roles: list[int]
    in_response: list[bool]
    """True for the tokens of the response, its end-of-sequence token included."""
    parts: list[int]
    """Number of the part that the token came from, counted over the conversation; -1 for template text."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def targets(self, loss_on: str) -> list[bool]:
        """Say which tokens are predicted in the loss; the first token of a row never is."""
        chosen = self.in_response if loss_on == "response" else [True] * len(self)
        return [False, *chosen[1:]]

    def cut(self, length: int) -> Encoded:
        """Keep the first `length` tokens."""
        return Encoded(self.input_ids[:length], self.roles[:length], self.in_response[:length], self.parts[:length])

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """What of the row goes through the model."""
        return (self,)


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and another response: a row of two sequences."""

    chosen: Encoded
    rejected: Encoded

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    def targets(self, loss_on: str) -> list[bool]:
        """Say which tokens are predicted in the loss, those of the preferred sequence first."""
        return [*self.chosen.targets(loss_on), *self.rejected.targets(loss_on)]

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """What of the row goes through the model."""
        return (self.chosen, self.rejected)


Row = Encoded | Pair


@dataclass(frozen=True)
class Batch:
    """Padded sequences, every tensor of shape (B, T) but the last; those of a row stand one behind the other."""

    input_ids: Tensor
    roles: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    phases: Tensor
    """`GENERATION` for the tokens of a response, `PROMPT` for all others."""
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Number of each sequence's row in its data set, (B,); empty where nobody counts."""

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of a transformers forward; positions are explicit because padding may stand on the left."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    @property
    def patched_inputs(self) -> dict[str, Tensor]:
        """Arguments of a forward of a model that carries patches."""
        return {**self.model_inputs, "roles": self.roles, "phases": self.phases}

    @property
    def read_inputs(self) -> dict[str, Any]:
        """Arguments of a forward whose activations are read: nothing is kept for a next token."""
        return {**self.patched_inputs, "use_cache": False}


def collate(
    rows: Sequence[Row],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    loss_on: str = "all",
    numbers: Sequence[int] = (),
) -> Batch:
    """Pad rows to the longest; ids, roles, mask, positions and labels are padded on the same side.

    A pair gives two sequences, the preferred one first. `numbers` are those of the rows in their data set.
    """
    counted = [number for row, number in zip(rows, numbers, strict=bool(numbers)) for _ in row.sequences]
    sequences = [sequence for row in rows for sequence in row.sequences]
    longest = max(len(row) for row in sequences)

    def pad(values: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return [*padding, *values] if side == "left" else [*values, *padding]

    labels = [
        [token if chosen else IGNORED for token, chosen in zip(row.input_ids, row.targets(loss_on), strict=True)]
        for row in sequences
    ]
    return Batch(
        input_ids=torch.tensor([pad(row.input_ids, pad_id) for row in sequences]),
        roles=torch.tensor([pad(row.roles, PADDING) for row in sequences]),
        attention_mask=torch.tensor([pad([1] * len(row), 0) for row in sequences]),
        position_ids=torch.tensor([pad(range(len(row)), 0) for row in sequences]),
        labels=torch.tensor([pad(row, IGNORED) for row in labels]),
        phases=torch.tensor([pad([int(inside) for inside in row.in_response], PROMPT) for row in sequences]),
        numbers=torch.tensor(counted, dtype=torch.long),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills padding; masks are explicit everywhere, so a model without one loses nothing."""
    candidates: Any = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for candidate in candidates:
        if candidate is not None:
            return int(candidate)
    return 0


@dataclass
class Encoder:
    """A tokenizer with a prompt style: conversations in, `Encoded` rows out."""

    tokenizer: PreTrainedTokenizerBase
    prompt_style: Literal["aside", "plain"] = "aside"
    response_role: Literal["data", "instruction", "response"] = "data"
    num_neutralised: int = 0
    """Special tokens written out in texts (`<|im_end|>` inside data) that were broken up, so far."""
    _literals: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives no character offsets, which roles need; use a fast tokenizer"
            )
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        specials = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else re.compile(r"(?!)")

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
        """Id that ends a turn."""
        found: Any = self.tokenizer.eos_token_id
        return found

    @property
    def spec(self) -> dict[str, str]:
        """Settings that a saved model needs to be prompted as it was trained."""
        return {"prompt_style": self.prompt_style, "response_role": self.response_role}

    @property
    def about(self) -> dict[str, Any]:
        """What is written beside activations about how texts were read."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "tokenizer_sha256": hashlib.sha256(vocabulary).hexdigest(),
            "prompt": self.spec,
        }

    def small_batch(self) -> Batch:
        """Return two rows of three tokens, by which the widths of modules are found."""
        row = Encoded([self.pad_id] * 3, [INSTRUCTION] * 3, [False] * 3, [0] * 3)
        return self.collate([row, row])

    def save(self, directory: Path) -> None:
        """Write the tokenizer beside a model."""
        self.tokenizer.save_pretrained(directory)

    def encode_data(self, rows: Sequence[Mapping[str, Any]], data_format: str, max_tokens: int) -> Rows:
        """Tokenise rows of a data set; see the function of this name."""
        return encode_data(self, rows, data_format, max_tokens)

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

    def conversation(self, instruction: str, data: str | Sequence[Part] = "", response: str | None = None) -> Conversation:
        """Make the messages of one row; `data` may come as parts, `response` None makes a prompt to be continued.

        The `aside` style is the paper's: framing and `Instruction:` in the system turn, `Input:` in the user turn, `No input`
        when there is none. Unlike the authors' code no period is added to the response.
        """
        data_parts = (Part(data, DATA),) if isinstance(data, str) else tuple(data)
        if self.prompt_style == "aside":
            instruction = f"{FRAMING}\n\nInstruction:\n{instruction}"
            if len("".join(part.text for part in data_parts)) < 2:
                data_parts = (Part("No input", DATA),)
            data_parts = (Part("Input:\n", DATA), *data_parts)
        messages = (Message("system", (Part(instruction, INSTRUCTION),)), Message("user", data_parts))
        if response is None:
            return messages
        return (*messages, Message("assistant", (Part(response, self.response_role_id),)))

    def from_row(self, row: Mapping[str, Any], data_format: str) -> Conversation:
        """Make the conversation of a data row in one of the formats of `DataSet.format`. Raises ValueError if it has two."""
        if data_format == "preference":
            raise ValueError("rows of format preference are pairs of conversations: they train methods and are evaluated on")
        if data_format == "text":
            return (Message("text", (Part(str(row["text"]), INSTRUCTION),)),)
        return self.conversation(str(row["instruction"]), str(row.get("input") or ""), str(row["output"]))

    def from_pair(self, row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
        """Make the two conversations of a preference row, in the form of pairs.py: the preferred one first.

        A text is asked as any instruction is, in the prompt style; messages are turns of their own.
        """
        chosen, rejected = (self.dialogue(row["prompt"], str(row[name])) for name in ("chosen", "rejected"))
        return chosen, rejected

    def dialogue(self, prompt: str | Sequence[Mapping[str, str]], response: str | None = None) -> Conversation:
        """Make the messages of a text or of messages {role, content}; `response` None makes a prompt to be continued."""
        if isinstance(prompt, str):
            return self.conversation(prompt, response=response)
        turns = tuple(map(self._turn, prompt))
        return turns if response is None else (*turns, self._turn({"role": "assistant", "content": response}))

    def _turn(self, message: Mapping[str, str]) -> Message:
        role = self.response_role_id if message["role"] == "assistant" else INSTRUCTION
        return Message(message["role"], (Part(message["content"], role),))  # type: ignore[arg-type]

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokenise a conversation once, as a whole; a prompt ends with the assistant's header."""
        return next(self.encode_all([conversation]))

    def encode_all(self, conversations: Sequence[Conversation]) -> Iterator[Encoded]:
        """Tokenise many conversations, each as `encode` does it, a chunk of them in one call of the tokenizer."""
        for start in range(0, len(conversations), _CHUNK_ROWS):
            chunk = conversations[start : start + _CHUNK_ROWS]
            rows = [self._stretches(tuple(self._neutralise(message) for message in row)) for row in chunk]
            texts = ["".join(stretch.text for stretch in stretches) for stretches in rows]
            tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
            for stretches, ids, offsets in zip(rows, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                yield self._with_roles(stretches, ids, offsets)

    def _with_roles(self, stretches: list[_Stretch], ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        owner = [stretch for stretch in stretches for _ in stretch.text]
        # A token that crosses a boundary belongs to the later side: no byte of data is ever read as instruction.
        owners = [owner[max(start, end - 1)] for start, end in offsets]
        return Encoded(
            input_ids=ids,
            roles=[stretch.role for stretch in owners],
            in_response=self._in_response(ids, [stretch.kind for stretch in owners]),
            parts=[stretch.part for stretch in owners],
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _in_response(self, ids: list[int], kinds: list[str]) -> list[bool]:
        """Mark the response's own tokens and the first end-of-sequence token after them."""
        marked, eos_id = [kind == "response" for kind in kinds], self.eos_id
        for t, kind in enumerate(kinds):
            if kind == "tail" and ids[t] == eos_id:
                marked[t] = True
                break
        return marked

    def _stretches(self, conversation: Conversation) -> list[_Stretch]:
        """Interleave the template's literal pieces with the parts."""
        literals = self._template(tuple(message.speaker for message in conversation))
        stretches = [_Stretch(literals[0], conversation[0].parts[0].role, _TEMPLATE_PART, "template")]
        number = 0
        for place, (message, literal) in enumerate(zip(conversation, literals[1:], strict=True), 1):
            # An assistant's turn that another one follows is part of the prompt.
            responds = message.speaker == "assistant" and place == len(conversation)
            kind = "response" if responds else "prompt"
            for part in message.parts:
                stretches.append(_Stretch(part.text, part.role, number, kind))
                number += 1
            tail = "tail" if responds else "template"
            # The role of the message's first part: a probe with another role at its end must not colour the header.
            stretches.append(_Stretch(literal, message.parts[0].role, _TEMPLATE_PART, tail))
        return stretches

    def _template(self, speakers: tuple[str, ...]) -> list[str]:
        """Return the literal text before, between and after the messages."""
        if speakers not in self._literals:
            self._literals[speakers] = self._cut_template(speakers)
        return self._literals[speakers]

    def _cut_template(self, speakers: tuple[str, ...]) -> list[str]:
        bos, eos = str(self.tokenizer.bos_token or ""), str(self.tokenizer.eos_token or "")
        if speakers == ("text",):
            return [bos, ""]
        sentinels = [chr(_FIRST_SENTINEL + i) for i in range(len(speakers))]
        if self.tokenizer.chat_template is None:
            ends = ["\n\n"] * len(speakers) if speakers[-1] != "assistant" else ["\n\n"] * (len(speakers) - 1) + [eos]
            return [bos, *ends]
        messages = [{"role": s, "content": c} for s, c in zip(speakers, sentinels, strict=True)]
        try:
            rendered = self._render(messages, speakers)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages {', '.join(speakers)}: {error}") from None
        if [c for c in rendered if c in sentinels] != sentinels:
            raise ValueError(f"the chat template drops, repeats or reorders the messages {', '.join(speakers)}")
        return re.split("|".join(sentinels), rendered)

    def _render(self, messages: list[dict[str, str]], speakers: tuple[str, ...]) -> str:
        unfinished = speakers[-1] != "assistant"
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=unfinished))

    def _neutralise(self, message: Message) -> Message:
        """Break up special tokens written in a text by a space, so that no text can end a turn or open another."""
        joined = "".join(part.text for part in message.parts)
        breaks = {match.start() + 1 for match in self._special.finditer(joined)}
        if not breaks:
            return message
        self.num_neutralised += len(breaks)
        parts, start = [], 0
        for part in message.parts:
            here = "".join((" " if start + i in breaks else "") + c for i, c in enumerate(part.text))
            parts.append(Part(here, part.role))
            start += len(part.text)
        return Message(message.speaker, tuple(parts))


class _Stretch(NamedTuple):
    text: str
    role: int
    part: int
    kind: str


class Rows(NamedTuple):
    """Tokenised rows of a data set and what truncation did to it."""

    rows: list[Row]
    numbers: list[int]
    """Their numbers in the data set."""
    num_cut: int
    """Rows whose response was cut at `max_tokens`; of a pair, one of the two."""
    num_dropped: int
    """Rows left out because instruction and data alone did not fit, or because they were empty; pairs, too, whose responses
    differ behind the cut only."""

    def check(self, max_tokens: int) -> None:
        """Raise ValueError when no row fits."""
        if not self.rows:
            raise ValueError(f"no row fits into {max_tokens} tokens: {self.num_dropped} prompts are longer (train.max_tokens)")


def encode_data(encoder: Encoder, rows: Sequence[Mapping[str, Any]], data_format: str, max_tokens: int) -> Rows:
    """Tokenise rows of a data set; the boundary between roles is never cut away silently. There may be no row left."""
    if data_format == "preference":
        return _encode_pairs(encoder, [encoder.from_pair(row) for row in rows], max_tokens)
    return _encode_each(encoder, [encoder.from_row(row, data_format) for row in rows], max_tokens)


def _encode_each(encoder: Encoder, conversations: Sequence[Conversation], max_tokens: int) -> Rows:
    def fitted(conversation: Conversation, row: Encoded) -> tuple[Row | None, bool]:
        prompt = 1 if conversation[0].speaker == "text" else _prompt_length(row)
        fits = prompt < max_tokens and len(row) > 1  # a row of one token has nothing to predict
        return row.cut(max_tokens) if fits else None, len(row) > max_tokens

    return _kept(map(fitted, conversations, encoder.encode_all(conversations)))


def _encode_pairs(encoder: Encoder, conversations: Sequence[tuple[Conversation, Conversation]], max_tokens: int) -> Rows:
    def fitted(chosen: Encoded, rejected: Encoded) -> tuple[Row | None, bool]:
        pair = Pair(chosen.cut(max_tokens), rejected.cut(max_tokens))
        has_room = all(_prompt_length(row) < max_tokens for row in (chosen, rejected))
        fits = has_room and pair.chosen.input_ids != pair.rejected.input_ids
        return pair if fits else None, max(len(chosen), len(rejected)) > max_tokens

    encoded = encoder.encode_all([conversation for both in conversations for conversation in both])
    return _kept(map(fitted, encoded, encoded))


def _kept(fitted: Iterable[tuple[Row | None, bool]]) -> Rows:
    """Gather rows, each None where it is dropped, and whether it was cut."""
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
    return Rows(rows, numbers, num_cut, num_dropped)


def _prompt_length(row: Encoded) -> int:
    return next((t for t, inside in enumerate(row.in_response) if inside), len(row))
