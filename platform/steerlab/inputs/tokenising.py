"""Tokenise texts with the character offsets of each token: many texts in one call, within limits of memory."""

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
"""Characters of a row, or of rows that are tokenised together. Without the memory for more, tokenizers (in Rust) aborts the
process without a message."""
_LONGEST_MADE = 4 * _LONGEST_TEXT
"""Characters of a row after the tokenizer's normalisation; a byte-level tokenizer makes up to 4 of one character."""


class Tokens(NamedTuple):
    """Tokens of a text, each with the characters that it covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """For each token the index of its first character and of the one after its last."""
    put: list[int]
    """1 for tokens that the tokenizer added before or after the text, 0 for tokens of the text."""


class TextTokenizer:
    """A fast tokenizer that tokenises many texts per call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Only the tokenizers in Rust return the offsets of their tokens.
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets, which roles need; use a fast tokenizer")
        self._tokenizer = tokenizer

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer of the library tokenizers inside the one of transformers."""
        backend: Any = self._tokenizer.backend_tokenizer
        return backend

    @cached_property
    def _growth(self) -> float:
        """Largest number of characters that the tokenizer's normalisation makes of one."""
        # The value is cached, because normalising the probes takes a while.
        return models.growth_of(self._tokenizer)

    def explained(self) -> AbstractContextManager[None]:
        """Return a context in which an error of the library names the tokenizer."""
        return explained(f"the tokenizer {self._tokenizer.name_or_path}")

    def check_length(self, text: str, row: int) -> None:
        """Raise ValueError if a text is too long; `row` is its number from 0, for the message."""
        longest = min(_LONGEST_TEXT, int(_LONGEST_MADE / self._growth))
        if len(text) > longest:
            makes = f" (this tokenizer may make {self._growth:,.0f} characters of one)" if longest < _LONGEST_TEXT else ""
            raise ValueError(f"row {row + 1} has {len(text):,} characters, more than {longest:,}{makes}: cut it into rows")

    def tokens(self, texts: Sequence[str], as_text: Sequence[bool]) -> list[Tokens]:
        """Return the tokens of each text; where `as_text` is true, with the tokens that the tokenizer adds (BOS, EOS)."""
        tokens: dict[int, Tokens] = {}
        with _untrimmed_offsets(self.backend):
            # Texts with and without added tokens need separate calls, because the setting is that of a whole call.
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
    """Return for each token the index of the character that decides its role and part.

    Args:
        text: The whole text of the row.
        tokens: Its tokens.
        added: Id -> name of the tokenizer's added tokens.
    """
    # The last character decides: a token across a boundary gets the later role, so no character of data after an instruction
    # counts as instruction. An added token is located by its own name, since some strip the white space around them (Phi 3's
    # `<|assistant|>` takes that of the answer).
    last = len(text) - 1
    places = [end - 1 if end > start else min(start, last) for start, end in tokens.offsets]
    for t, number in enumerate(tokens.ids):
        if number in added and (at := text.find(added[number], *tokens.offsets[t])) >= 0:
            places[t] = at
    return places


def _together(numbers: Sequence[int], texts: Sequence[str], growth: float = 1.0) -> Iterator[list[int]]:
    """Yield groups of text numbers with at most `_LONGEST_TEXT` characters each, counting `growth` for every character."""
    chosen, length = [], 0
    for number in numbers:
        # A single text is yielded alone however long it is; `check_length` has refused longer ones.
        if chosen and (length + len(texts[number])) * growth > _LONGEST_TEXT:
            yield chosen
            chosen, length = [], 0
        chosen.append(number)
        length += len(texts[number])
    if chosen:
        yield chosen


@contextmanager
def _untrimmed_offsets(backend: Tokenizer) -> Iterator[None]:
    """Switch off `trim_offsets` during the block, in byte-level tokenizers that have it (Llama 3's among them).

    Trimmed offsets exclude the spaces of a token. They hide that a token contains a space of the part before, and point past
    the end of the text for a token that is only a space.
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
    """Yield a post-processor and, if it is a sequence of post-processors, the ones inside it."""
    if processor is None:
        return
    yield processor
    if isinstance(processor, Steps):
        for step in processor:
            yield from _steps(step)
