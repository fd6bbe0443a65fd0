"""Rows of data sets to conversations: the messages that a row becomes in a prompt style, each part of a text with its role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steerlab.inputs.tokens import DATA, INSTRUCTION, ROLES, Conversation, Message, Part

FRAMING = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class PromptStyle:
    """How conversations are worded, and the role of their answers."""

    prompt_style: Literal["aside", "plain"]
    response_role: Literal["data", "instruction", "response"]

    @property
    def response_role_id(self) -> int:
        """Role of generated tokens."""
        return ROLES[self.response_role]

    def conversation(
        self,
        instruction: str,
        data: str | Sequence[Part] = "",
        response: str | None = None,
        *,
        system: str = "",
        history: Sequence[Sequence[str]] = (),
    ) -> Conversation:
        """Make the messages of one row; `data` may come as parts, `response` None makes a prompt to be continued.

        The `aside` style is the paper's (ASIDE, arXiv 2503.10566): framing and `Instruction:` in the system turn, `Input:` in
        the user turn, `No input` when there is none; a model without a chat template gets `Response:` before the answer. Unlike
        the authors' code no period is added to the response. `system` stands before the instruction. `history` holds earlier
        exchanges (user, assistant); their user turns are instructions.
        """
        data_parts = (Part(data, DATA),) if isinstance(data, str) else tuple(data)
        if self.prompt_style == "aside":
            instruction = f"{FRAMING}\n\nInstruction:\n{instruction}"
            if len("".join(part.text for part in data_parts)) < 2:
                data_parts = (Part("No input", DATA),)
            data_parts = (Part("Input:\n", DATA), *data_parts)
        if system:
            instruction = f"{system}\n\n{instruction}"
        turns = [(speaker, text) for pair in history for speaker, text in zip(("user", "assistant"), pair, strict=True)]
        earlier = tuple(self._turn({"role": speaker, "content": text}) for speaker, text in turns)
        messages = (Message("system", (Part(instruction, INSTRUCTION),)), *earlier, Message("user", data_parts))
        if response is None:
            return messages
        return (*messages, Message("assistant", (Part(response, self.response_role_id),)))

    def from_row(self, row: Mapping[str, Any], data_format: str) -> Conversation:
        """Make the conversation of a data row in one of the formats of `DataSet.format`. Raises ValueError if it has two."""
        if data_format == "preference":
            raise ValueError("rows of format preference are pairs of conversations: they train methods and are evaluated on")
        if data_format == "text":
            return (Message("text", (Part(row["text"], INSTRUCTION),)),)
        if data_format == "conversation":
            return tuple(map(self._turn, row["messages"]))
        return self.conversation(
            row["instruction"],
            row.get("input") or "",
            checked(row["output"]),
            system=row.get("system") or "",
            history=row.get("history") or (),
        )

    def from_pair(self, row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
        """Make the two conversations of a preference row, in the form of pairs.py: the preferred one first.

        A text is asked as any instruction is, in the prompt style; messages are turns of their own.
        """
        context = {"data": row.get("input") or "", "system": row.get("system") or ""}
        chosen, rejected = (self.dialogue(row["prompt"], row[name], **context) for name in ("chosen", "rejected"))
        return chosen, rejected

    def dialogue(
        self, prompt: str | Sequence[Mapping[str, str]], response: str | None = None, *, data: str = "", system: str = ""
    ) -> Conversation:
        """Make the messages of a text or of messages {role, content}; `response` None makes a prompt to be continued.

        `data` and `system` go with a text; messages hold their own.
        """
        if isinstance(prompt, str):
            return self.conversation(prompt, data, response, system=system)
        turns = tuple(map(self._turn, prompt))
        return turns if response is None else (*turns, self._turn({"role": "assistant", "content": response}))

    def _turn(self, message: Mapping[str, str]) -> Message:
        role = {"assistant": self.response_role_id, "tool": DATA}.get(message["role"], INSTRUCTION)
        return Message(message["role"], (Part(message["content"], role),))  # type: ignore[arg-type]


def checked(text: object) -> str:
    """Return a text. Raises ValueError for what no tokenizer reads."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.60} is a {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"the text {text[:40]!r} holds {half}, half of a character of two (a surrogate)") from None
    return text
