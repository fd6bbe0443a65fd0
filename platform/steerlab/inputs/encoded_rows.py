"""Rows of a data set, tokenised to be trained on: which of them fit, are cut, or are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from steerlab.data.values import Row as DataRow
from steerlab.inputs.tokens import Conversation, Encoded, Pair, Row

if TYPE_CHECKING:
    from steerlab.inputs.encoding import Encoder


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
    def spec(self) -> Mapping[str, object]:
        """Settings kept beside a patch."""
        ...

    @property
    def saved_spec(self) -> Mapping[str, object]:
        """Settings kept beside a whole model."""
        ...

    def encode_data(self, rows: Sequence[DataRow], data_format: str, max_tokens: int, *, skip_bad: bool = False) -> Rows:
        """Encode the rows of a data set. Raises ValueError at a bad row, unless `skip_bad` leaves it out."""
        ...

    def collate(self, rows: Any, /, *, loss_on: str = "all", numbers: Sequence[int] = ()) -> Any:
        """Make a batch of encoded rows."""
        ...

    def save(self, directory: Path) -> None:
        """Write what is needed to encode rows as now."""
        ...


def encode_data(
    encoder: Encoder, rows: Sequence[DataRow], data_format: str, max_tokens: int, *, skip_bad: bool = False
) -> Rows:
    """Tokenise rows of a data set; the boundary between roles is never cut away silently. There may be no row left.

    Raises:
        ValueError: the chat template refuses a row or changes its text, unless `skip_bad` leaves such rows out.
    """
    pairs = data_format == "preference"
    of_rows: list[tuple[Conversation, ...] | None] = []
    for number, row in enumerate(rows, 1):
        try:
            conversations = encoder.from_pair(row) if pairs else (encoder.from_row(row, data_format),)
            if skip_bad:
                for conversation in conversations:
                    encoder.check(conversation)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"row {number}: {error}") from None
            of_rows.append(None)
            continue
        of_rows.append(conversations)
    return _encode_pairs(encoder, of_rows, max_tokens) if pairs else _encode_each(encoder, of_rows, max_tokens)


def asked_otherwise(encoder: Encoder, rows: Sequence[DataRow], data_format: str) -> int:
    """Count the rows of which a prompt, as an evaluation asks it, is not the beginning, ids equal."""
    pairs = data_format == "preference"
    of_rows = [encoder.from_pair(row) if pairs else (encoder.from_row(row, data_format),) for row in rows]
    flat = [conversation for conversations in of_rows for conversation in conversations]
    wholes, prompts = (encoder.encode_all(some) for some in (flat, [conversation[:-1] for conversation in flat]))
    differ = [whole.input_ids[: len(prompt)] != prompt.input_ids for whole, prompt in zip(wholes, prompts, strict=True)]
    return sum(any(differ[i : i + len(of_rows[0])]) for i in range(0, len(differ), len(of_rows[0]))) if of_rows else 0


_Conversations = Sequence[tuple[Conversation, ...] | None]
"""The conversations of each row: one, or the two of a pair; None for a row that is left out."""


def _encode_each(encoder: Encoder, of_rows: _Conversations, max_tokens: int) -> Rows:
    encoded = encoder.encode_all([conversations[0] for conversations in of_rows if conversations is not None])

    def fitted(conversations: tuple[Conversation, ...] | None) -> tuple[Row | None, bool]:
        if conversations is None:
            return None, False
        row = next(encoded)
        prompt = 1 if conversations[0][0].speaker == "text" else _prompt_length(row)
        fits = prompt < max_tokens and len(row) > 1  # a row of one token has nothing to predict
        return row.cut(max_tokens) if fits else None, len(row) > max_tokens

    return _kept(map(fitted, of_rows), of_rows.count(None))


def _encode_pairs(encoder: Encoder, of_rows: _Conversations, max_tokens: int) -> Rows:
    both = [conversation for conversations in of_rows if conversations is not None for conversation in conversations]
    encoded = encoder.encode_all(both, per_row=2)

    def fitted(conversations: tuple[Conversation, ...] | None) -> tuple[Row | None, bool]:
        if conversations is None:
            return None, False
        chosen, rejected = next(encoded), next(encoded)
        pair = Pair(chosen.cut(max_tokens), rejected.cut(max_tokens))
        has_room = all(_prompt_length(row) < max_tokens for row in (chosen, rejected))
        fits = has_room and pair.chosen.input_ids != pair.rejected.input_ids
        return pair if fits else None, max(len(chosen), len(rejected)) > max_tokens

    return _kept(map(fitted, of_rows), of_rows.count(None))


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
