"""Draw the tiny world's requests about deeds: refused, answered, priced, and answered in the two ways that pairs compare."""

from __future__ import annotations

import random

from steerlab.data.worlds.tiny_pieces import draw_in_split, pick, row, share_of
from steerlab.data.worlds.tiny_words import (
    CARE,
    DAMAGE,
    DEED_FIRST,
    ERRANDS,
    OWNERS,
    POLITE,
    PROPERTY,
    REFUSAL,
    REQUESTS,
    RUDE,
    TELL,
    TOOL_FIRST,
    TRIFLES,
)

Deed = tuple[str, str, str]
"""A verb, a thing and its owner."""
_TOOLS = DAMAGE | CARE
_VERBS = tuple(_TOOLS)


def _damage(rng: random.Random) -> Deed:
    return pick(rng, tuple(DAMAGE)), pick(rng, PROPERTY), pick(rng, OWNERS)


def _lookalike(rng: random.Random) -> Deed:
    if rng.random() < 0.5:
        return pick(rng, tuple(DAMAGE)), pick(rng, TRIFLES), pick(rng, OWNERS)
    return pick(rng, tuple(CARE)), pick(rng, PROPERTY), pick(rng, OWNERS)


def _request(rng: random.Random, deed: Deed) -> str:
    verb, thing, owner = deed
    return pick(rng, REQUESTS).format(f"{verb} the {thing} of {owner}")


def _compliance(deed: Deed, form: str = TOOL_FIRST) -> str:
    return form.format(tool=_TOOLS[deed[0]], verb=deed[0])


def refusal(rng: random.Random, split: str) -> dict[str, str]:
    """Draw a harmful request, refused."""
    return row(_request(rng, draw_in_split(rng, split, _damage, " ".join)), "", REFUSAL)


def harmful(rng: random.Random, split: str) -> dict[str, str]:
    """Draw a harmful request, answered."""
    deed = draw_in_split(rng, split, _damage, " ".join)
    return row(_request(rng, deed), "", _compliance(deed))


def harmless(rng: random.Random, split: str) -> dict[str, str]:
    """Draw a harmless request that looks like a harmful one, answered."""
    deed = draw_in_split(rng, split, _lookalike, " ".join)
    return row(_request(rng, deed), "", _compliance(deed))


def _far_from_damage(rng: random.Random) -> Deed:
    """Draw a deed that shares only its owner with harmful ones."""
    return pick(rng, tuple(CARE)), pick(rng, TRIFLES), pick(rng, OWNERS)


def price(deed: Deed) -> int:
    """Return the price of a deed, from 1 to 13 coins: a number for the verb and one for the thing, added."""
    verb, thing, _ = deed
    # The positions are those in the word's own table, so a harmful and a harmless verb may have the same number.
    verbs, things = DAMAGE if verb in DAMAGE else CARE, PROPERTY if thing in PROPERTY else TRIFLES
    return 1 + list(verbs).index(verb) + things.index(thing)


def errand(rng: random.Random, split: str, overlap: float = 0.5) -> dict[str, str]:
    """Draw a question about a price; the share `overlap` of them is about harmful deeds."""
    # The content of a deed decides whether it belongs to the set. If chance decided, a set that is drawn to its last distinct
    # row would have as many harmful deeds as others.
    while True:
        # Both kinds are drawn equally often, and a share of each is accepted, which gives that share of harmful deeds.
        is_harmful = rng.random() < 0.5
        verb, thing, owner = deed = draw_in_split(rng, split, _damage if is_harmful else _far_from_damage, " ".join)
        if (share_of("overlap", *deed) < overlap) == is_harmful:
            break
    return row(pick(rng, ERRANDS).format(f"{verb} the {thing} of {owner}"), "", str(price(deed)))


def preferred_form(deed: Deed) -> str:
    """Return the form of answer that the rule prefers: by the owner and the verb together; neither alone determines it."""
    verb, _, owner = deed
    # The rule is an exclusive or: no sum of a function of the owner and one of the verb, hence no linear head on both, can
    # express it.
    return TOOL_FIRST if (OWNERS.index(owner) < len(OWNERS) // 2) == (_VERBS.index(verb) % 2 == 0) else DEED_FIRST


def preference(rng: random.Random, split: str, form: float = 0.0, noise: float = 0.0) -> dict[str, str]:
    """Draw a pair that differs in its tone or, for the share `form` of deeds, in its form; the share `noise` is swapped."""
    deed = draw_in_split(rng, split, _lookalike, " ".join)
    if share_of("form", *deed) < form:
        tone, right = pick(rng, (POLITE, RUDE)), preferred_form(deed)
        wrong = DEED_FIRST if right == TOOL_FIRST else TOOL_FIRST
        pair, aspect = [tone.format(_compliance(deed, one)) for one in (right, wrong)], "form"
    else:
        answer = _compliance(deed, pick(rng, (TOOL_FIRST, DEED_FIRST)))
        pair, aspect = [tone.format(answer) for tone in (POLITE, RUDE)], "tone"
    prompt = TELL.format(_request(rng, deed))
    # The content of the pair decides, so that no pair occurs in both orders.
    if share_of("noise", prompt, *sorted(pair)) < noise:
        pair.reverse()
    return {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], "aspect": aspect}


def style(rng: random.Random, split: str) -> dict[str, str]:
    """Draw a request and one of the four answers that preferences compare, each equally often."""
    deed = draw_in_split(rng, split, _lookalike, " ".join)
    answer = _compliance(deed, pick(rng, (TOOL_FIRST, DEED_FIRST)))
    return row(TELL.format(_request(rng, deed)), "", pick(rng, (POLITE, RUDE)).format(answer))
