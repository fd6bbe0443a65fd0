"""Choose where prompts end, so that a prompt's token ids are exactly the first ids of the row that contains its answer.

Otherwise a model would be evaluated after other tokens than it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlab.inputs.rendering import TemplateError, Turn, short
from steerlab.inputs.template_shapes import Form, Shape, Shapes

_ANSWERS = ("Yes.", "the answer", "42", "«é»", "<think>")
"""Answers with which candidates for the end of a prompt are tested: letters, digits, non-ASCII, a tag."""
_THOUGHT = "<think>\nOkay\n</think>\n\nYes."
"""Answer with which prompts that open a thought are tested."""


@dataclass
class PromptEnds:
    """The ends of a template's prompts, chosen once for each form of conversations."""

    shapes: Shapes
    _chosen: dict[Form, str] = field(default_factory=dict)

    def of(self, form: Form, shape: Shape) -> str:
        """Return the text between the last message of a prompt and its end.

        The template's own generation prompt is preferred, if the complete row continues it only with white space (a
        space, which tokenizers such as Llama's join with the next word). Otherwise it is the text before the answer of the
        complete row, such as the empty thought that Qwen 3 prints before a stored answer.

        Args:
            form: Form of the complete row, with its answer.
            shape: Literal pieces of such a row.

        Raises:
            TemplateError: wherever the prompt ends, its last token depends on the answer.
        """
        if form not in self._chosen:
            own = self.shapes.generation_prompt(form)
            is_thinking = self.shapes.renderer.thinking
            self._chosen[form] = self._before_thought(own, form, shape) if is_thinking else self._before_answer(own, shape)
        return self._chosen[form]

    def _before_answer(self, own: str | None, shape: Shape) -> str:
        """Return the longest end that begins rows with any answer; `own` is the template's generation prompt, None if there is
        none."""
        literal = shape.opening
        # GPT-2 makes one token of "\n\n" at the end of a text, and two of it before a word, so shorter ends are also tried. The
        # longest comes first: an end with all of the template's white space is the most natural one.
        candidates = _shortened(literal)
        if own is not None and literal.startswith(own) and not literal.removeprefix(own).strip():
            candidates = [own, *candidates]
        opening = next((text for text in candidates if self._begins_rows(text, shape, literal)), None)
        if opening is None:
            raise TemplateError(
                "no prompt of the chat template begins a row, because the tokens before an answer depend on the answer"
            )
        return opening

    def _before_thought(self, own: str | None, form: Form, shape: Shape) -> str:
        """Return the template's own generation prompt, without final white space that would join the answer's first token.

        Raises:
            TemplateError: the template prints stored answers so that none could follow this prompt.
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
        # The template drops the thought of a stored answer, so any end that fits is taken, and each such row is refused later.
        fitting = next((text for text in _shortened(own) if self._begins_rows(text, shape, own)), None)
        if fitting is None:
            raise TemplateError(f"data.thinking: the tokens of a prompt that ends in {short(own)} depend on the text after it")
        return fitting

    def _begins_rows(self, opening: str, shape: Shape, literal: str) -> bool:
        """Return whether a prompt that ends with `opening` has the first ids of rows with answers after `literal`."""
        ids = self.shapes.renderer.ids
        # The comparison is of ids instead of text, because a tokenizer may join the end of the prompt with the answer.
        prompt = ids(shape.before_answer + opening)
        rows = (ids(shape.before_answer + literal + answer + shape.literals[-1]) for answer in _ANSWERS)
        return all(row[: len(prompt)] == prompt for row in rows)


def _shortened(text: str) -> list[str]:
    """Return the text, then the text with its final white space removed one character after another."""
    return [text[:end] for end in range(len(text), len(text.rstrip()) - 1, -1)]
