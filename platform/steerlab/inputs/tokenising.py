"""Texts to tokens with the characters that each stands for: many texts in a call, so few that the memory holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers.processors import ByteLevel, PostProcessor, RobertaProcessing
from tokenizers.processors import Sequence as Steps

from steerlab import models
from steerlab.guards.faults import explained

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_LONGEST_TEXT = 10_000_000
"""Characters of a row, or of rows that are tokenised together. The library ends the process, without a word, where the memory
that it takes for them is not there."""
_LONGEST_MADE = 4 * _LONGEST_TEXT
"""Characters that the tokenizer may make of a row before it looks for tokens: those of the longest text, written as bytes."""


class Tokens(NamedTuple):
    """Tokens of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """First character of each token, and the one after its last."""
    put: list[int]
    """1 for what the tokenizer put around the text."""


class TextTokenizer:
    """A tokenizer that is called for many texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets, which roles need; use a fast tokenizer")
        self._tokenizer = tokenizer

    @property
    def backend(self) -> Tokenizer:
        """The library's tokenizer inside of that of transformers."""
        backend: Any = self._tokenizer.backend_tokenizer
        return backend

    @cached_property
    def _growth(self) -> float:
        """How many characters the tokenizer makes of one, at most."""
        return models.growth_of(self._tokenizer)

    def explained(self) -> AbstractContextManager[None]:
        """Name the tokenizer where its library fails."""
        return explained(f"the tokenizer {self._tokenizer.name_or_path}")

    def check_length(self, text: str, row: int) -> None:
        """Refuse a text that is too long to be tokenised; `row` counts from 0. Raises ValueError."""
        longest = min(_LONGEST_TEXT, int(_LONGEST_MADE / self._growth))
        if len(text) > longest:
            makes = f" (this tokenizer makes {self._growth:,.0f} of one)" if longest < _LONGEST_TEXT else ""
            raise ValueError(f"row {row + 1} has {len(text):,} characters, more than {longest:,}{makes}: cut it into rows")

    def tokens(self, texts: Sequence[str], as_text: Sequence[bool]) -> list[Tokens]:
        """Tokenise texts in their order, those with the tokenizer's own tokens around them that are so marked in `as_text`."""
        tokens: dict[int, Tokens] = {}
        with _untrimmed_offsets(self.backend):
            for adds in set(as_text):
                for numbers in _together([i for i, here in enumerate(as_text) if here == adds], texts, self._growth):
                    tokens |= zip(numbers, self._called([texts[i] for i in numbers], adds), strict=True)
        return [tokens[i] for i in range(len(texts))]

    def _called(self, texts: list[str], adds: bool) -> Iterator[Tokens]:
        with self.explained():
            encoding = self._tokenizer(
                texts,
                add_special_tokens=adds,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                return_attention_mask=False,
            )
        columns = (encoding[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        return map(Tokens, *columns)  # type: ignore[arg-type]


def places(text: str, tokens: Tokens, added: Mapping[int, str]) -> list[int]:
    """Return for every token the character of its text that decides what it is; `added` names the added tokens.

    A token that crosses a boundary belongs to the later side: no byte of data is ever read as instruction. An added token
    may swallow the white space around it (Phi 3's `<|assistant|>` that of the answer) and stands where its own name stands.
    """
    last = len(text) - 1
    places = [end - 1 if end > start else min(start, last) for start, end in tokens.offsets]
    for t, number in enumerate(tokens.ids):
        if number in added and (at := text.find(added[number], *tokens.offsets[t])) >= 0:
            places[t] = at
    return places


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


@contextmanager
def _untrimmed_offsets(backend: Tokenizer) -> Iterator[None]:
    """Let a tokenizer count the spaces of its tokens for a while (byte-level ones with `trim_offsets`, Llama 3 among them).

    Trimmed offsets hide that a token holds the space of a neighbouring part, and point past the text where a token is a space.
    """
    steps = [step for step in _steps(backend.post_processor) if isinstance(step, ByteLevel | RobertaProcessing)]
    trimming = [step for step in steps if step.trim_offsets]
    for step in trimming:
        step.trim_offsets = False
    try:
        yield
    finally:
        for step in trimming:
            step.trim_offsets = True


def _steps(processor: PostProcessor | None) -> Iterator[PostProcessor]:
    """Yield a post-processor and, of a sequence of them, each."""
    if processor is None:
        return
    yield processor
    if isinstance(processor, Steps):
        for step in processor:
            yield from _steps(step)
