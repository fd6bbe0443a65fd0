"""A text that a language model generated, and where it ends: at a token that ends texts, or at a stop text."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from steerlab.inputs.encoding import Encoder

_BYTES_PER_CHARACTER = 4
"""A tokenizer of bytes may need a token for each byte of a character."""
_BEFORE_STOP = 16
"""Tokens in front of a stop text that are decoded with it."""


class Generation(NamedTuple):
    """One continuation of a prompt."""

    text: str
    num_tokens: int
    """Number of generated tokens, including the one that ends the text and those after a stop text."""
    finished: bool
    """True if the model ended the text or a stop text occurred; False if it was cut at `max_new_tokens`."""
    too_long: bool = False
    """True if prompt and continuation do not fit into the model's context, so that nothing was generated."""


@dataclass(frozen=True)
class Ends:
    """Conditions that end a continuation."""

    encoder: Encoder
    end_ids: Set[int]
    """Ids of the tokens that end a text."""
    stop: Sequence[str]
    """Texts that end it; they are not part of it."""

    def reached(self, ids: list[int]) -> bool:
        """Return whether the last token of a continuation ends it."""
        return ids[-1] in self.end_ids or (bool(self.stop) and self._stopped(ids))

    def _stopped(self, ids: list[int]) -> bool:
        # The text is decoded, because a stop text may be divided into tokens in several ways. Only the tail is decoded, because
        # only the last token is new; decoding everything for every token would cost the square of the length.
        tail = ids[-_BYTES_PER_CHARACTER * max(map(len, self.stop)) - _BEFORE_STOP :]
        if not any(text in self.encoder.decode(tail) for text in self.stop):
            return False
        # The first token of a tail may be decoded without the space in front of it.
        return len(tail) == len(ids) or any(text in self.encoder.decode(ids) for text in self.stop)

    def cut(self, ids: list[int]) -> Generation:
        """Return the continuation as a text, cut at the first of the stop texts."""
        text = self.encoder.decode(ids)
        # A token may hold the beginning of a stop text and more text after it.
        ends = [text.find(s) for s in self.stop if s in text]
        finished = bool(ends) or (bool(ids) and ids[-1] in self.end_ids)
        return Generation(text[: min(ends)] if ends else text, len(ids), finished)
