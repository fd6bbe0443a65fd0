"""Where prompts end: the text between the last message and the answer, such that a prompt's tokens begin its row's."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlab.inputs.rendering import TemplateError, Turn, short
from steerlab.inputs.template_shapes import Form, Shape, Shapes

_ANSWERS = ("Yes.", "the answer", "42", "«é»", "<think>")
"""Beginnings of answers by which the end of a prompt is chosen."""
_THOUGHT = "<think>\nOkay\n</think>\n\nYes."
"""An answer with a thought, by which the end of a prompt is chosen that opens one."""


@dataclass
class PromptEnds:
    """The ends of a template's prompts, one for each form of conversations; each is chosen once."""

    shapes: Shapes
    _chosen: dict[Form, str] = field(default_factory=dict)

    def of(self, form: Form, shape: Shape) -> str:
        """Return the end of a prompt of conversations of a form, whose complete rows have `shape`.

        The template's own generation prompt comes first where the row continues it with white space at most (a space, which
        tokenizers such as Llama's join with the word that follows). Else what stands before the answer of the complete row
        does, such as the empty thought that Qwen 3 prints before a stored answer.

        Raises:
            TemplateError: the first tokens of an answer are part of the prompt wherever that ends.
        """
        if form not in self._chosen:
            own = self.shapes.generation_prompt(form)
            is_thinking = self.shapes.renderer.thinking
            self._chosen[form] = self._before_thought(own, form, shape) if is_thinking else self._before_answer(own, shape)
        return self._chosen[form]

    def _before_answer(self, own: str | None, shape: Shape) -> str:
        literal = shape.opening
        # A blank line at the end of a prompt is one token of GPT-2, and two before a word: then it may be cut short.
        candidates = _shortened(literal)
        if own is not None and literal.startswith(own) and not literal.removeprefix(own).strip():
            candidates = [own, *candidates]
        opening = next((text for text in candidates if self._begins_rows(text, shape, literal)), None)
        if opening is None:
            raise TemplateError(
                "no prompt of the chat template is the beginning of a row: the tokens before an answer depend on the answer"
            )
        return opening

    def _before_thought(self, own: str | None, form: Form, shape: Shape) -> str:
        """Return the template's own generation prompt, without white space at its end that would be one token with the answer.

        Raises:
            TemplateError: it is none that a stored answer with a thought could begin with.
        """
        literal, renderer = shape.opening, self.shapes.renderer
        if renderer.tokenizer.chat_template is None or own is None:
            raise TemplateError("data.thinking: the model has no chat template that opens an answer, so none opens a thought")
        if not literal.startswith(own) and not own.startswith(literal):
            raise TemplateError(
                f"data.thinking: the chat template opens a prompt with {short(own)} and a stored answer with "
                f"{short(literal)}, so that no thought can be trained; give another template (model.chat_template)"
            )
        turns = [Turn(speaker, "text" if text is None else text) for speaker, text in zip(*form, strict=True)]
        row = renderer.render([*turns[:-1], Turn("assistant", _THOUGHT)])
        ids = renderer.ids(row)
        for opening in _shortened(own):
            prompt = renderer.ids(shape.before_answer + opening)
            if row.startswith(shape.before_answer + opening) and ids[: len(prompt)] == prompt:
                return opening
        # Where the template drops thoughts, each row says so.
        fitting = next((text for text in _shortened(own) if self._begins_rows(text, shape, own)), None)
        if fitting is None:
            raise TemplateError(f"data.thinking: the tokens of a prompt that ends in {short(own)} depend on what follows it")
        return fitting

    def _begins_rows(self, opening: str, shape: Shape, literal: str) -> bool:
        """Say whether a prompt that ends with `opening` has the first ids of rows whose answers stand after `literal`."""
        ids = self.shapes.renderer.ids
        prompt = ids(shape.before_answer + opening)
        rows = (ids(shape.before_answer + literal + answer + shape.literals[-1]) for answer in _ANSWERS)
        return all(row[: len(prompt)] == prompt for row in rows)


def _shortened(text: str) -> list[str]:
    """Return a text, and the text with less and less white space at its end."""
    return [text[:end] for end in range(len(text), len(text.rstrip()) - 1, -1)]
