"""Give every token of a row its role and part: those of the stretch of text that contains its deciding character."""

from __future__ import annotations

from collections.abc import Mapping

from steerlab.inputs.stretches import TEMPLATE_PART, Stretch, melts
from steerlab.inputs.tokenising import Tokens, places
from steerlab.inputs.tokens import Encoded


def with_roles(
    text: str, stretches: list[Stretch], tokens: Tokens, added: Mapping[int, str], *, keeps_end: bool
) -> tuple[Encoded, bool]:
    """Return a row, and whether its answer begins inside the last token of the prompt.

    Args:
        text: The text of the row.
        stretches: The stretches of which the text consists.
        tokens: The tokens of the text.
        added: Names of the tokenizer's added tokens by id.
        keeps_end: Whether the tokens that the tokenizer puts after the text belong to the row.
    """
    owner = [stretch for stretch in stretches for _ in stretch.text]
    before, after = (Stretch("", stretch.role, TEMPLATE_PART) for stretch in (stretches[0], stretches[-1]))
    ids = tokens.ids
    # Without a character (an empty text) all tokens are those that the tokenizer adds.
    owners = [owner[place] for place in places(text, tokens, added)] if owner else [after] * len(ids)
    is_melted = melts(stretches, owners, tokens.offsets)
    if any(tokens.put):
        # Only tokens without characters of their own count, because a tokenizer marks special tokens within the text as added
        # ones, too.
        around = [bool(put) and start == end for put, (start, end) in zip(tokens.put, tokens.offsets, strict=True)]
        first = next((t for t, here in enumerate(around) if not here), len(around))
        positions = [t for t, here in enumerate(around) if not here or t < first or keeps_end]
        ids = [ids[t] for t in positions]
        owners = [(before if t < first else after) if around[t] else owners[t] for t in positions]
    row = Encoded(
        input_ids=ids,
        roles=[stretch.role for stretch in owners],
        # Labels follow the text instead of the role, because with ASIDE's convention the answer has the role of data.
        in_response=[stretch.answers and stretch.final for stretch in owners],
        parts=[stretch.part for stretch in owners],
        in_answers=[stretch.answers for stretch in owners],
    )
    return row, is_melted
