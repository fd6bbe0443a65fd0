"""Break up special tokens that are written in texts, and find the tokens with which a chat template opens and ends turns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from steerlab.inputs.tokens import Message, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AddedTokens:
    """The added tokens of a tokenizer (Hugging Face's term): matched before its model splits a text. Some are special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self.names = {number: str(token) for number, token in added.items()}
        # Both sources count, because some tokenizers declare special tokens by name only (`eos_token`), without the flag.
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        # A token of one character cannot be broken up, and occurs in ordinary texts.
        special = {name for name in special if len(name) > 1}
        self.special_ids = frozenset(number for number, name in self.names.items() if name in special)
        self.special = re.compile(_any_of(special))
        """Matches a special token that is written in a text."""
        self.leading = re.compile(rf"\s*({_any_of(special | set(self.names.values()))})")
        """Matches white space and then an added or special token, group 1, at the beginning of a text."""


class TurnMarkers(NamedTuple):
    """The added tokens with which a chat template marks the turns of a conversation."""

    end: str | None
    """Token that ends the assistant's turn: the one directly after an answer. None if the template prints no token there."""
    first: str | None
    """First added token before the first message, except BOS. It opens turns, also after an answer without an end. None if the
    template prints no such token."""
    in_prompt: re.Pattern[str]
    """Matches tokens that no text of a prompt may contain: special tokens, and added ones that the template itself prints."""
    in_answer: re.Pattern[str]
    """Matches tokens that no answer may contain: special tokens and the end of a turn. Those of a thought are allowed."""

    @classmethod
    def of(cls, literals: Sequence[str], added: AddedTokens, bos_token: object) -> TurnMarkers:
        """Find the markers in `literals`, which a template prints before, between and after the messages of an exchange.

        With empty `literals` there are no markers, and only special tokens are forbidden.
        """
        after_answer = added.leading.match(literals[-1]) if literals else None
        end = None if after_answer is None else after_answer[1]
        opening = [match[1] for match in added.leading.finditer(literals[0])] if literals else []
        printed = "".join(literals)
        special = {added.names[number] for number in added.special_ids}
        # Added tokens without the flag count if the template prints them, because they mark turns all the same.
        own = {name for name in added.names.values() if len(name) > 1 and name in printed}
        return cls(
            end=end,
            first=next((name for name in opening if name and name != bos_token), None),
            in_prompt=re.compile(_any_of(special | own)),
            in_answer=re.compile(_any_of(special if end is None or len(end) < 2 else special | {end})),
        )


def broken_up(message: Message, forbidden: re.Pattern[str]) -> tuple[Message, int]:
    """Return a message with a space after the first character of each forbidden token, and the number of these spaces."""
    # The joined text is searched, because a token may begin in one part of the message and end in the next.
    text = "".join(part.text for part in message.parts)
    breaks = {match.start() + 1 for match in forbidden.finditer(text)}
    if not breaks:
        return message, 0
    parts, start = [], 0
    for part in message.parts:
        spaced = "".join((" " if start + i in breaks else "") + c for i, c in enumerate(part.text))
        parts.append(Part(spaced, part.role))
        start += len(part.text)
    return Message(message.speaker, tuple(parts)), len(breaks)


def _any_of(names: Iterable[str]) -> str:
    """Return a regular expression that matches any of the texts; without texts, one that matches nothing."""
    # The longest name comes first, because Python's `|` takes the first alternative that matches, not the longest.
    return "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or "(?!)"
