"""Chats of lm-evaluation-harness as conversations with roles.

The harness renders a chat to a text before it passes it to the model, and a text has no roles. So the turns of each rendered
chat are stored by its text: when a request contains this text, the turns are encoded as those of every other conversation, with
the roles of their tokens and without special tokens that a question spells out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from steerlab.inputs.encoding import Encoder
from steerlab.inputs.rendering import Turn
from steerlab.inputs.tokens import Conversation, Message, Part

Turns = Sequence[Mapping[str, str]]


class Chat(NamedTuple):
    """The turns of a chat, and the beginning of the answer if the harness's task sets one (`gen_prefix`)."""

    turns: Turns
    prefix: str = ""


@dataclass
class Chats:
    """The chats that were rendered for the harness, by their texts."""

    encoder: Encoder
    by_text: dict[str, Chat] = field(default_factory=dict)

    def render(self, history: Turns, add_generation_prompt: bool = True) -> str:
        """Return the text of a chat and store its turns; the harness calls this for each question.

        Args:
            history: messages {role, content}: system instruction, worked examples, question.
            add_generation_prompt: False if the last message is the beginning of the answer.

        Raises:
            ValueError: the chat template refuses the messages.
        """
        turns = [dict(turn) for turn in history]
        prefix = "" if add_generation_prompt else turns.pop()["content"]
        pieces = self.encoder.template.pieces([Turn(turn["role"], turn["content"]) for turn in turns])
        text = "".join(piece.text for piece in pieces) + prefix
        self.by_text[text] = Chat(turns, prefix)
        return text

    def prompt(self, text: str) -> Conversation | None:
        """Return the conversation of a request's text, which the model should answer; None if it is not a chat.

        Raises:
            ValueError: the harness's task sets the beginning of the answer, which is not supported for chats.
        """
        if (chat := self.by_text.get(text)) is None:
            return None
        if chat.prefix:
            raise ValueError(
                f"chat_template: the task begins each answer with {chat.prefix!r:.60} (gen_prefix), and answers with a "
                "given beginning are not supported in chats; set chat_template to false for this task"
            )
        return self.encoder.dialogue(chat.turns)

    def answered(self, text: str, continuation: str) -> Conversation | None:
        """Return the conversation of a request with its answer, ending with the continuation; None if it is not a chat."""
        if (chat := self.by_text.get(text)) is None:
            return None
        role = self.encoder.response_role_id
        parts = (Part(chat.prefix, role), Part(continuation, role)) if chat.prefix else (Part(continuation, role),)
        return (*self.encoder.dialogue(chat.turns), Message("assistant", parts))
