"""The text before each prompt of a model: a system text, worked examples, and a prefix of plain texts."""

from __future__ import annotations

from pydantic import Field

from steerlab.job.typed import Frozen


class Example(Frozen):
    """A worked example: a question with its answer."""

    instruction: str
    input: str = Field(default="", exclude_if=lambda text: not text)
    """The data that the instruction is about; empty without any."""
    output: str


class Preamble(Frozen):
    """The text before each prompt; empty by default."""

    system: str = Field(default="", exclude_if=lambda text: not text)
    """System text of chats, before the system text that a prompt has itself."""
    examples: tuple[Example, ...] = Field(default=(), exclude_if=lambda examples: not examples)
    """Worked examples of chats, exchanges between the system text and the question."""
    prefix: str = Field(default="", exclude_if=lambda text: not text)
    """Text before each plain text that the model continues."""

    def __bool__(self) -> bool:
        return bool(self.system or self.examples or self.prefix)

    def then(self, other: Preamble) -> Preamble:
        """Return this preamble with another one after it."""
        system = "\n\n".join(text for text in (self.system, other.system) if text)
        return Preamble(system=system, examples=(*self.examples, *other.examples), prefix=self.prefix + other.prefix)
