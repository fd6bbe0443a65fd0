"""Plain texts that the model continues, for the tasks on toxicity, sentiment and concepts.

A prompt is plain text without a chat template, its tokens have the role of instructions, and only the continuation is judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from steerlab.data import rows
from steerlab.evaluation.asking.answers import SampledConfig, answers
from steerlab.evaluation.asking.items import Numbered, choose
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import INSTRUCTION, Conversation, Message, Part
from steerlab.job import DataSet, Source
from steerlab.steered.generated_text import Generation
from steerlab.steered.language import SteeredModel


class ContinuationConfig(SampledConfig):
    """Settings of the continuation; the defaults are those of AcT on RealToxicityPrompts (arXiv 2410.23054)."""

    max_new_tokens: int = Field(32, ge=1)
    """Longest continuation in tokens."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(0.3, gt=0, le=1)
    """Probability mass of nucleus sampling; 1 samples from all tokens."""
    repetition_penalty: float = Field(1.2, gt=0)
    """Factor that lowers the logits of tokens that already occurred; 1 changes nothing."""
    reader_source: Source | None = Field(None, exclude_if=lambda source: source is None)
    """Another language model, under which the perplexity of the continuations given their prompts is measured as well
    (AcT: Mistral-7B; LinEAS: Qwen2.5-7B); null takes only the model itself without patches."""


def require_text(data: DataSet) -> DataSet:
    """Return the data set if its rows are plain texts.

    Raises:
        ValueError: its format is not `text`.
    """
    if data.format != "text":
        raise ValueError(f"prompts are plain texts: set prompts.format to text, not {data.format}")
    return data


def read_prompts(data: DataSet, limit: int | None, seed: int) -> list[Numbered]:
    """Read the distinct prompts of a data set (field `text`) and choose `limit` of them.

    Their ids count from the data set's offset, so that two parts of one file have no id in common.
    """
    by_text: dict[str, Numbered] = {}
    for i, row in enumerate(rows.read(data), data.offset):
        # Repeated prompts would count as independent items and make the intervals too short.
        by_text.setdefault(str(row["text"]), Numbered(str(i), row))
    return choose(list(by_text.values()), limit, seed)


def continue_texts(model: SteeredModel, prompts: Sequence[str], config: ContinuationConfig) -> list[list[Generation]]:
    """Continue every prompt at every strength; the result is indexed [strength][prompt]."""
    return [row for _, row in answers(model, [conversation(model.encoder, prompt) for prompt in prompts], config)]


def conversation(encoder: Encoder, prompt: str, continuation: str | None = None) -> Conversation:
    """Return the plain text of a prompt as a conversation.

    With a continuation, which becomes the second part, the preamble is omitted: the text is scored as if the model without it
    had written it.
    """
    parts = [Part(encoder.continued(prompt) if continuation is None else prompt, INSTRUCTION)]
    if continuation is not None:
        # The continuation is a separate part with the role of responses, as if the model had written it at strength 0.
        parts.append(Part(_lost_space(encoder, continuation) + continuation, encoder.response_role_id))
    return (Message("text", tuple(parts)),)


def sample(item_id: str, strength: float, prompt: str, continuation: str, **judged: object) -> dict[str, object]:
    """Return a readable sample of a judged continuation; `judged` holds its scores."""
    return {"id": item_id, "strength": strength, "prompt": prompt, "continuation": continuation, **judged}


def _lost_space(encoder: Encoder, continuation: str) -> str:
    """Return the space to put before a continuation whose tokenizer drops leading spaces when it decodes, otherwise "".

    Tokenizers that mark word starts (WordLevel, Llama 2) drop the space before the first decoded word. Whether that word
    began anew or completed the last word of the prompt is lost; it is assumed to begin anew.
    """
    # Decoding the second of two words alone shows whether this tokenizer preserves the space before it.
    words = encoder.encode((Message("text", (Part("a a", INSTRUCTION),)),), continued=True)
    keeps = encoder.decode(words.input_ids[-1:]).startswith(" ")
    return "" if keeps or not continuation[:1].isalnum() else " "
