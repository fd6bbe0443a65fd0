"""Turn rows of data sets into conversations in a prompt style: messages whose parts of text have roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steerlab.inputs.tokens import DATA, INSTRUCTION, ROLES, Conversation, Message, Part
from steerlab.job import Preamble

FRAMING = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
"""Framing of ASIDE's paper (arXiv 2503.10566), which is Alpaca's prompt."""


class PromptStyle:
    """The wording of prompts, the text before them, and the role of answers. `Encoder` derives from it."""

    prompt_style: Literal["aside", "plain"]
    response_role: Literal["data", "instruction", "response"]
    preamble: Preamble
    """The text before each prompt that the model answers or continues."""

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

        After worked examples (`preamble`) the instruction is put in the user turn before the data, as it does in the examples.

        Args:
            instruction: Text of role instruction.
            data: Text of role data, or parts that have roles of their own.
            response: The answer; None returns a prompt that the model continues.
            system: Text that is put before the instruction, after a blank line.
            history: Earlier exchanges (user, assistant); their user turns have the role instruction.
        """
        data_parts = (Part(data, DATA),) if isinstance(data, str) else tuple(data)
        instruction, data_parts = self._worded(instruction, data_parts)
        turns = [(speaker, text) for pair in history for speaker, text in zip(("user", "assistant"), pair, strict=True)]
        earlier = tuple(self._turn({"role": speaker, "content": text}) for speaker, text in turns)
        framing = FRAMING if self.prompt_style == "aside" else ""
        first = [text for text in (self.preamble.system, system, framing) if text]
        if self.preamble.examples:
            messages = (*self._introduced(first), *earlier, _question(instruction, data_parts))
        else:
            messages = (_system([*first, instruction]), *earlier, Message("user", data_parts))
        return messages if response is None else (*messages, self._answer(response))

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
            return self.dialogue(row["messages"])
        return self.conversation(
            row["instruction"],
            row.get("input") or "",
            checked(row["output"]),
            system=row.get("system") or "",
            history=row.get("history") or (),
        )

    def from_pair(self, row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
        """Return the two conversations of a preference row (data/pairs.py): the preferred one first.

        A prompt that is a text is worded in the prompt style, as an instruction is; turns of messages are not changed.
        """
        context = {"data": row.get("input") or "", "system": row.get("system") or ""}
        chosen, rejected = (self.dialogue(row["prompt"], row[name], **context) for name in ("chosen", "rejected"))
        return chosen, rejected

    def dialogue(
        self, prompt: str | Sequence[Mapping[str, str]], response: str | None = None, *, data: str = "", system: str = ""
    ) -> Conversation:
        """Return the messages of a prompt and its response.

        Args:
            prompt: A text, which is worded in the prompt style, or messages {role, content}, whose turns are not changed: the
                prompt style adds no framing to them, and the preamble is put before them.
            response: The answer; None returns a prompt that the model continues.
            data: Data of a text prompt; ignored for messages.
            system: System text of a text prompt; ignored for messages.
        """
        if isinstance(prompt, str):
            return self.conversation(prompt, data, response, system=system)
        turns = tuple(map(self._turn, prompt))
        if self.preamble.system or self.preamble.examples:
            own = turns[:1] if turns[0].speaker == "system" else ()
            first = [text for text in (self.preamble.system, *(part.text for turn in own for part in turn.parts)) if text]
            turns = (*self._introduced(first), *turns[len(own) :])
        return turns if response is None else (*turns, self._answer(response))

    def continued(self, text: str) -> str:
        """Return a plain text that the model is to continue, after the preamble's prefix."""
        return self.preamble.prefix + text

    def _introduced(self, first: Sequence[str]) -> Conversation:
        """Return a system turn of the texts, if there are any, and the worked examples of the preamble."""
        turns = [_system(first)] if first else []
        for example in self.preamble.examples:
            worded = self._worded(example.instruction, (Part(example.input, DATA),))
            turns += (_question(*worded), self._answer(example.output))
        return tuple(turns)

    def _worded(self, instruction: str, data: tuple[Part, ...]) -> tuple[str, tuple[Part, ...]]:
        """Return an instruction and its data under the headings of the prompt style."""
        if self.prompt_style == "plain":
            return instruction, data
        if len("".join(part.text for part in data)) < 2:
            data = (Part("No input", DATA),)
        return f"Instruction:\n{instruction}", (Part("Input:\n", DATA), *data)

    def _answer(self, text: str) -> Message:
        return Message("assistant", (Part(text, self.response_role_id),))

    def _turn(self, message: Mapping[str, str]) -> Message:
        # Outputs of tools are data, because whoever controls a tool must not be able to give instructions.
        role = {"assistant": self.response_role_id, "tool": DATA}.get(message["role"], INSTRUCTION)
        return Message(message["role"], (Part(message["content"], role),))  # type: ignore[arg-type]


def _system(texts: Sequence[str]) -> Message:
    """Return a system turn of texts, with blank lines between them."""
    return Message("system", (Part("\n\n".join(texts), INSTRUCTION),))


def _question(instruction: str, data: tuple[Part, ...]) -> Message:
    """Return a user turn with an instruction, a blank line and the data."""
    # An empty part of role data comes first, because the first part of a turn gives the assistant's header its role, which is
    # that of the data in all prompts.
    gap = "\n\n" if any(part.text for part in data) else ""
    return Message("user", (Part("", DATA), Part(instruction + gap, INSTRUCTION), *data))


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
