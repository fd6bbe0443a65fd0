"""Special tokens: how a text that writes one out is broken up, and which of them a chat template ends and opens turns with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from steerlab.inputs.tokens import Message, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AddedTokens:
    """The tokens that a tokenizer knows beside its vocabulary; some of them are special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self.names = {number: str(token) for number, token in added.items()}
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        # A token of one character cannot be broken up, and stands in every text.
        special = {name for name in special if len(name) > 1}
        self.special_ids = frozenset(number for number, name in self.names.items() if name in special)
        self.special = re.compile(_any_of(special))
        """Matches a special token that is written out in a text."""
        self.leading = re.compile(rf"\s*({_any_of(special | set(self.names.values()))})")
        """Matches an added or special token, group 1, at the beginning of a text; white space may stand before it."""


class TurnMarkers(NamedTuple):
    """The added tokens with which a chat template marks the turns of a conversation."""

    end: str | None
    """The token that ends the assistant's turn: the first one after an answer, where no text stands before it."""
    first: str | None
    """The first added token before a first message, BOS aside: it opens turns, also after an answer without an end."""
    in_prompt: re.Pattern[str]
    """Matches what no text of a prompt may hold: special tokens, and all added ones that the template itself writes."""
    in_answer: re.Pattern[str]
    """Matches what no answer may hold: it may write markers of its own, such as a thought's, but not the end of its turn."""

    @classmethod
    def of(cls, literals: Sequence[str], added: AddedTokens, bos_token: object) -> TurnMarkers:
        """Find the markers in what a template prints around the messages of an exchange; `literals` may be empty."""
        after_answer = added.leading.match(literals[-1]) if literals else None
        end = None if after_answer is None else after_answer[1]
        opening = [match[1] for match in added.leading.finditer(literals[0])] if literals else []
        printed = "".join(literals)
        special = {added.names[number] for number in added.special_ids}
        own = {name for name in added.names.values() if len(name) > 1 and name in printed}
        return cls(
            end=end,
            first=next((name for name in opening if name and name != bos_token), None),
            in_prompt=re.compile(_any_of(special | own)),
            in_answer=re.compile(_any_of(special if end is None or len(end) < 2 else special | {end})),
        )


def broken_up(message: Message, forbidden: re.Pattern[str]) -> tuple[Message, int]:
    """Return a message with a space after the first character of each forbidden token, and the number of these spaces."""
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
    """Return a regular expression for any of some texts, the longest first; none of them matches nothing."""
    return "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or "(?!)"
