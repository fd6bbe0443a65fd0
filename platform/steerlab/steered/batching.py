"""Choose the rows that share a batch of a language model, by its context and by the rows' lengths and strengths.

Beyond a length, some rotary embeddings (dynamic, longrope) depend on the longest row of the batch. Such rows share a batch only
with rows of the same length, so that a row's scores do not depend on its batch. A model that cannot read padding needs rows of
one length throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from steerlab import models
from steerlab.inputs.tokens import Row
from steerlab.patches import SavedPatch
from steerlab.steered.prompt_queue import Key, Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")


def fitting(rows: Sequence[Row], max_new_tokens: int, limit: float, *, skip_long: bool) -> list[int]:
    """Return the numbers of the rows that fit into a context of `limit` tokens.

    Raises:
        ValueError: a row does not fit, and `skip_long` is False.
    """
    # Prompt and new tokens count together: beyond its context a model does not fail but generates nonsense.
    numbers = []
    for number, row in enumerate(rows):
        if len(row) + max_new_tokens <= limit:
            numbers.append(number)
        elif not skip_long:
            raise ValueError(
                f"row {number} has {len(row)} tokens and {max_new_tokens} new ones; the model's context holds {limit}"
            )
    return numbers


def chunks(model: PreTrainedModel, rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of complete rows that are read in one batch, padded on the right; the longest first."""
    alike = models.alike_up_to(model)
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row) * (len(row) > alike), []).append(number)
    size = lambda i: len(rows[i]) * len(rows[i].sequences)  # noqa: E731
    for length in sorted(groups, reverse=True):
        yield from _of_similar_length(groups[length], size, batch_tokens)


def _of_similar_length(items: list[_T], length: Callable[[_T], int], batch_tokens: int) -> Iterator[list[_T]]:
    """Yield groups of items of similar length, the longest first, so that a padded batch has at most `batch_tokens`."""
    # The longest items come first, so that a batch that is too large for the memory fails at the start instead of after an
    # hour.
    chunk: list[_T] = []
    for item in sorted(items, key=length, reverse=True):
        # Rows are padded to the longest, which is the first. A row longer than `batch_tokens` is a batch alone.
        if chunk and (len(chunk) + 1) * length(chunk[0]) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk


def groups(
    model: PreTrainedModel, newest: SavedPatch | None, waiting: Sequence[Waiting[Key]], more: int
) -> Iterator[tuple[list[Waiting[Key]], bool]]:
    """Yield prompts that may share a batch, and whether their lengths may differ; they become longer by `more` tokens."""
    together = _padded_up_to(model)
    groups: dict[tuple[float, int], list[Waiting[Key]]] = {}
    for one in waiting:
        length = len(one.row)
        groups.setdefault((_shared(newest, one.strength), length * (length + more > together)), []).append(one)
    for key in sorted(groups):
        yield groups[key], not key[1]


class Size(NamedTuple):
    """What decides with which other rows a row can share a batch."""

    num_tokens: int
    """Length of the prompt."""
    max_new_tokens: int
    strength: float
    """Strength of the newest patch."""


def joining(
    model: PreTrainedModel,
    newest: SavedPatch | None,
    running: Sequence[Size],
    waiting: Sequence[Size],
    limit: int,
    batch_tokens: int,
) -> list[int]:
    """Return the numbers of the waiting rows that can be continued in one batch with the running ones.

    None overtakes a row that cannot join a running batch.

    Args:
        model: The model.
        newest: Its newest patch; None if it has none.
        running: Rows of the batch; empty for a batch that begins with the first waiting row.
        waiting: The other rows.
        limit: Maximum number of rows of the batch.
        batch_tokens: Maximum number of tokens of the rows that are read at once, with padding and the tokens that may be
            generated.
    """
    together = _padded_up_to(model)
    chosen = [] if running else [0]
    for number in range(len(chosen), len(waiting)):
        row = waiting[number]
        read = [*(waiting[i] for i in chosen), row]  # in one call of the model
        among = [*running, *read]
        longest = max(one.num_tokens for one in read) + max(one.max_new_tokens for one in read)
        fits = len(among) <= limit and (len(read) == 1 or len(read) * longest <= batch_tokens)
        longest = max(one.num_tokens for one in among) + max(one.max_new_tokens for one in among)
        # Rows that cannot be padded share a batch from its beginning, with prompts of one length.
        alike = longest <= together or (not running and len({one.num_tokens for one in among}) == 1)
        if fits and alike and _shared(newest, row.strength) == _shared(newest, among[0].strength):
            chosen.append(number)
        elif running:
            break  # otherwise the row could wait for ever, while later ones join
    return chosen


def _padded_up_to(model: PreTrainedModel) -> float:
    """Return the number of tokens up to which prompts of different lengths share a batch."""
    return models.alike_up_to(model) if models.reads_padding(model) else 0


def _shared(newest: SavedPatch | None, strength: float) -> float:
    """Return a number that is the same for strengths at which rows may share a batch."""
    kind = None if newest is None else newest.kind
    # A patch of the weights has one strength in a call of the model; other patches take one for each row.
    if kind == "weight":
        return strength
    # A reward model does not read rows at strength 0, so that its cache would have fewer tokens than that of the model.
    return float(kind == "reward" and strength == 0)
