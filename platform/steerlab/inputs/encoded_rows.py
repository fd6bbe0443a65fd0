"""Tokenise the rows of a data set for training: cut those that are too long, skip those that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from steerlab.data.values import Row as DataRow
from steerlab.inputs.tokens import Conversation, Encoded, Pair, Row

if TYPE_CHECKING:
    from steerlab.inputs.encoding import Encoder


class Rows(NamedTuple):
    """Tokenised rows of a data set, and the numbers of rows that were cut or skipped."""

    rows: list[Row]
    numbers: list[int]
    """Number of each row in the data set, from 0."""
    num_cut: int
    """Number of rows whose response (of a pair, at least one of them) was cut at `max_tokens`."""
    num_dropped: int
    """Number of rows skipped because their prompt alone does not fit or they are empty, and of pairs whose responses are equal
    up to the cut."""
    num_refused: int = 0
    """Number of rows skipped by `skip_bad`: the chat template refuses them or changes their text."""

    @classmethod
    def joined(cls, parts: Sequence[Rows], num_read: Sequence[int]) -> Rows:
        """Return the rows of data sets that are read one after another; `num_read` is the number of rows of each."""
        starts = [sum(num_read[:i]) for i in range(len(parts))]
        return cls(
            [row for part in parts for row in part.rows],
            [start + number for start, part in zip(starts, parts, strict=True) for number in part.numbers],
            *(sum(counts) for counts in zip(*(part[2:] for part in parts), strict=True)),
        )

    def check(self, max_tokens: int) -> None:
        """Raise ValueError when no row fits."""
        if not self.rows:
            raise ValueError(f"no row fits into {max_tokens} tokens: {self.num_dropped} prompts are longer (train.max_tokens)")


class RowEncoder(Protocol):
    """Interface through which the training loop turns rows into batches: `Encoder`, or `Prompter` for diffusion models."""

    num_melted: int
    """Rows so far whose answer begins inside the last token of the prompt (see `Encoder`)."""
    num_neutralised: int
    """Special tokens in texts that were broken up so far (see `Encoder`)."""

    @property
    def spec(self) -> Mapping[str, object]:
        """Settings that are stored with a patch."""
        ...

    @property
    def saved_spec(self) -> Mapping[str, object]:
        """Settings that are stored with a whole model, whose tokenizer is saved with it."""
        ...

    def encode_data(self, rows: Sequence[DataRow], data_format: str, max_tokens: int, *, skip_bad: bool = False) -> Rows:
        """Encode the rows of a data set. Raises ValueError at a bad row, unless `skip_bad` skips it."""
        ...

    def collate(self, rows: Any, /, *, loss_on: str = "all", numbers: Sequence[int] = ()) -> Any:
        """Make a batch of encoded rows."""
        ...

    def save(self, directory: Path) -> None:
        """Save the tokenizer, so that rows can be encoded the same way later."""
        ...


def encode_data(
    encoder: Encoder, rows: Sequence[DataRow], data_format: str, max_tokens: int, *, skip_bad: bool = False
) -> Rows:
    """Tokenise the rows of a data set for training.

    Args:
        encoder: Tokenizer and prompt style.
        rows: Rows in the format `data_format`, as `data.rows.read` returns them.
        data_format: `DataSet.format`; preference rows become pairs.
        max_tokens: Longest row. Only responses are cut; a row whose prompt is as long or longer is skipped, so that no row
            loses its boundary between prompt and response.
        skip_bad: Skip rows that the chat template refuses.

    Returns:
        The remaining rows, possibly none.

    Raises:
        ValueError: the chat template refuses a row or changes its text, and `skip_bad` is false.
    """
    pairs = data_format == "preference"
    of_rows: list[tuple[Conversation, ...] | None] = []
    for number, row in enumerate(rows, 1):
        try:
            conversations = encoder.from_pair(row) if pairs else (encoder.from_row(row, data_format),)
            if skip_bad:
                # Conversations are checked one by one here; `encode_all` works on chunks and stops at the first bad row.
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
    """Count the rows that do not begin with the token ids of their prompt as evaluations encode it.

    Training on such a row teaches an answer after other tokens than those that the model sees when it is evaluated.
    """
    pairs = data_format == "preference"
    of_rows = [encoder.from_pair(row) if pairs else (encoder.from_row(row, data_format),) for row in rows]
    flat = [conversation for conversations in of_rows for conversation in conversations]
    # A prompt is the conversation without its last message, exactly as evaluations encode it.
    wholes, prompts = (encoder.encode_all(some) for some in (flat, [conversation[:-1] for conversation in flat]))
    differ = [whole.input_ids[: len(prompt)] != prompt.input_ids for whole, prompt in zip(wholes, prompts, strict=True)]
    return sum(any(differ[i : i + len(of_rows[0])]) for i in range(0, len(differ), len(of_rows[0]))) if of_rows else 0


_Conversations = Sequence[tuple[Conversation, ...] | None]
"""The conversations of each row: one, or the two of a pair; None for a row that is skipped."""


def _encode_each(encoder: Encoder, of_rows: _Conversations, max_tokens: int) -> Rows:
    encoded = encoder.encode_all([conversations[0] for conversations in of_rows if conversations is not None])

    def fitted(conversations: tuple[Conversation, ...] | None) -> tuple[Row | None, bool]:
        if conversations is None:
            return None, False
        row = next(encoded)
        # A plain text has no prompt, so any part of it may be cut.
        prompt = 1 if conversations[0][0].speaker == "text" else _prompt_length(row)
        fits = prompt < max_tokens and len(row) > 1  # a row of one token has nothing to predict
        return row.cut(max_tokens) if fits else None, len(row) > max_tokens

    return _gathered(map(fitted, of_rows), of_rows.count(None))


def _encode_pairs(encoder: Encoder, of_rows: _Conversations, max_tokens: int) -> Rows:
    # Both responses of all pairs go through one call, because the tokenizer works in parallel on long lists.
    both = [conversation for conversations in of_rows if conversations is not None for conversation in conversations]
    encoded = encoder.encode_all(both, per_row=2)

    def fitted(conversations: tuple[Conversation, ...] | None) -> tuple[Row | None, bool]:
        if conversations is None:
            return None, False
        chosen, rejected = next(encoded), next(encoded)
        pair = Pair(chosen.cut(max_tokens), rejected.cut(max_tokens))
        # Responses that are equal up to the cut give a preference loss without a gradient.
        # A response may be a text of which a tokenizer makes no token (blanks): its mean log-probability does not exist.
        has_room = all(_prompt_length(row) < min(max_tokens, len(row)) for row in (chosen, rejected))
        fits = has_room and pair.chosen.input_ids != pair.rejected.input_ids
        return pair if fits else None, max(len(chosen), len(rejected)) > max_tokens

    return _gathered(map(fitted, of_rows), of_rows.count(None))


def _gathered(fitted: Iterable[tuple[Row | None, bool]], num_refused: int) -> Rows:
    """Collect (row, whether it was cut); the row is None if it is skipped; `skip_bad` caused `num_refused` of these."""
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
    """Return the number of tokens before a row's last answer; of a pair, the larger of the two numbers."""
    return max(_prompt_length(sequence) for sequence in row.sequences)


def _prompt_length(row: Encoded) -> int:
    return next((t for t, inside in enumerate(row.in_response) if inside), len(row))
