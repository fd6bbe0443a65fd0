"""Turn rows of data sets into conversations in a prompt style: messages whose parts of text have roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steerlab.inputs.tokens import DATA, INSTRUCTION, ROLES, Conversation, Message, Part

FRAMING = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
"""Framing of ASIDE's paper (arXiv 2503.10566), which is Alpaca's prompt."""


class PromptStyle:
    """The wording of prompts, and the role of answers. `Encoder` derives from it."""

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
        """Return the messages of one row: instruction in the system turn, earlier exchanges, data in the user turn, response.

        The style `aside` is that of ASIDE (arXiv 2503.10566): framing and heading `Instruction:` in the system turn, heading
        `Input:` in the user turn, with `No input` for empty data; a model without a chat template gets the heading `Response:`
        before the answer. Unlike the authors' code, no period is appended to the response.

        Args:
            instruction: Text of role instruction.
            data: Text of role data, or parts that have roles of their own.
            response: The answer; None returns a prompt that the model continues.
            system: Text that is put before the instruction, after a blank line.
            history: Earlier exchanges (user, assistant); their user turns have the role instruction.
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
        """Return the conversation of a row in the format `data_format` (`DataSet.format`).

        Raises:
            ValueError: the format is preference, whose rows have two conversations, or the output is not a text.
        """
        if data_format == "preference":
            raise ValueError("rows of format preference are pairs of conversations: they train methods and are evaluated on")
        if data_format == "text":
            return (Message("text", (Part(row["text"], INSTRUCTION),)),)
        if data_format == "conversation":
            # Messages have their own turns, so the prompt style adds no framing to them.
            return tuple(map(self._turn, row["messages"]))
        return self.conversation(
            row["instruction"],
            row.get("input") or "",
            checked(row["output"]),
            system=row.get("system") or "",
            history=row.get("history") or (),
        )

    def from_pair(self, row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
        """Return the two conversations of a preference row (data/pairs.py): the preferred one first.

        A prompt that is a text is worded in the prompt style, as an instruction is; messages keep their own turns.
        """
        context = {"data": row.get("input") or "", "system": row.get("system") or ""}
        chosen, rejected = (self.dialogue(row["prompt"], row[name], **context) for name in ("chosen", "rejected"))
        return chosen, rejected

    def dialogue(
        self, prompt: str | Sequence[Mapping[str, str]], response: str | None = None, *, data: str = "", system: str = ""
    ) -> Conversation:
        """Return the messages of a prompt and its response.

        Args:
            prompt: A text, which is worded in the prompt style, or messages {role, content}, which keep their own turns.
            response: The answer; None returns a prompt that the model continues.
            data: Data of a text prompt; ignored for messages.
            system: System text of a text prompt; ignored for messages.
        """
        if isinstance(prompt, str):
            return self.conversation(prompt, data, response, system=system)
        turns = tuple(map(self._turn, prompt))
        return turns if response is None else (*turns, self._turn({"role": "assistant", "content": response}))

    def _turn(self, message: Mapping[str, str]) -> Message:
        # Outputs of tools are data: whoever controls a tool must not be able to give instructions.
        role = {"assistant": self.response_role_id, "tool": DATA}.get(message["role"], INSTRUCTION)
        return Message(message["role"], (Part(message["content"], role),))  # type: ignore[arg-type]


def checked(text: object) -> str:
    """Return a value that is a text. Raises ValueError for other types, and for lone surrogates, which no tokenizer reads."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.60} is a {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"the text {text[:40]!r} holds {half}, half of a character of two (a surrogate)") from None
    return text
