"""Plain texts continued by the model: what the tasks on toxicity, sentiment and concepts judge.

A prompt is plain text without a chat template, its tokens have the role of instructions, and what is judged is the
continuation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from steerlab.data import rows
from steerlab.evaluation.asking.answers import answers
from steerlab.evaluation.asking.items import Numbered, choose
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import INSTRUCTION, Conversation, Message, Part
from steerlab.job import DataSet, TaskConfig
from steerlab.steered.language import Generation, SteeredModel


class ContinuationConfig(TaskConfig):
    """How prompts are continued; the defaults are AcT's for RealToxicityPrompts (arXiv 2410.23054)."""

    max_new_tokens: int = Field(32, ge=1)
    """Longest continuation in tokens."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(0.3, gt=0, le=1)
    """Nucleus of sampling."""
    repetition_penalty: float = Field(1.2, gt=0)
    """Divides the logits of tokens that occurred; 1 is none."""


def require_text(data: DataSet) -> DataSet:
    """Return a data set of prompts, which are plain texts.

    Raises:
        ValueError: when its format is another.
    """
    if data.format != "text":
        raise ValueError(f"prompts are plain texts: set prompts.format to text, not {data.format}")
    return data


def read_prompts(data: DataSet, limit: int | None, seed: int) -> list[Numbered]:
    """Read the prompts of a data set (field `text`) and choose `limit` of them; a text that repeats is read once.

    Their ids count from the data set's offset, so that two parts of one file share none.
    """
    found: dict[str, Numbered] = {}
    for i, row in enumerate(rows.read(data), data.offset):
        found.setdefault(str(row["text"]), Numbered(str(i), row))
    return choose(list(found.values()), limit, seed)


def continue_texts(model: SteeredModel, prompts: Sequence[str], config: ContinuationConfig) -> list[list[Generation]]:
    """Continue every prompt at every strength; the result is indexed [strength][prompt]."""
    return [row for _, row in answers(model, [conversation(model.encoder, prompt) for prompt in prompts], config)]


def conversation(encoder: Encoder, prompt: str, continuation: str | None = None) -> Conversation:
    """Make the plain text of a prompt, with its continuation as a second part if there is one."""
    parts = [Part(prompt, INSTRUCTION)]
    if continuation is not None:
        parts.append(Part(_lost_space(encoder, continuation) + continuation, encoder.response_role_id))
    return (Message("text", tuple(parts)),)


def sample(item_id: str, strength: float, prompt: str, continuation: str, **judged: Any) -> dict[str, Any]:
    """Make a readable sample of a judged continuation."""
    return {"id": item_id, "strength": strength, "prompt": prompt, "continuation": continuation, **judged}


def _lost_space(encoder: Encoder, continuation: str) -> str:
    """Return the space that a tokenizer of words (WordLevel, Llama 2) drops before the first word that it decodes.

    Whether that word went on with the prompt's last one can no longer be told; it is taken for a new one.
    """
    words = encoder.encode((Message("text", (Part("a a", INSTRUCTION),)),), continued=True)
    keeps = encoder.decode(words.input_ids[-1:]).startswith(" ")
    return "" if keeps or not continuation[:1].isalnum() else " "
