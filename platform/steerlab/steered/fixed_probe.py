"""Fixed conversations by which two copies of a language model are compared.

They are short and long, with and without data, with digits and punctuation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerlab.inputs.tokens import Conversation

if TYPE_CHECKING:
    from steerlab.inputs.encoding import Encoder

_PROBES = (
    ("Say what the text is about.", "It is about nothing in particular."),
    ("Name three colours.", ""),
    ("Translate into German, and keep the numbers: 12, 7.5 and 1,000.", "We sold 12 of them for 7.5 each, and got 1,000 back!"),
    (
        "Write a short answer to the letter, as its writer would like to hear it.",
        "Dear neighbour, last night your dog dug up the roses that my grandmother had planted before the war. I am not angry, "
        "but I would be glad if the fence were mended before spring, and if you came over for tea. Yours, Ada.",
    ),
)
"""Instructions and data."""


def conversations(encoder: Encoder) -> list[Conversation]:
    """Return the conversations as prompts of a model."""
    return [encoder.conversation(instruction, data) for instruction, data in _PROBES]
