"""Prompting: a system text and worked examples before each prompt, the baseline of every method that steers.

Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020, https://arxiv.org/abs/2005.14165 (worked examples); Wu et
al., "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", ICML 2025, https://arxiv.org/abs/2501.17148
(a prompt steers better than all representation-based methods tried there).

Nothing is trained, and activations do not change. The text before a prompt is:

    chats              the system text, then the worked examples as exchanges of user and assistant, then the question. With
                       examples, the instruction of a question is put in its user turn, before the data
    plain texts        the prefix, where the model continues a text; texts whose own probability is measured get none

The wording is chosen as a strength is: a sweep over `method.system` (search_spaces/tiny/prompt.py) compares several on
development rows. On a model that a patch steers the text is added to the patch, whose strength can still vary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from steerlab.job import Example, Job, MethodConfig, Preamble
from steerlab.methods.contract import Prompted
from steerlab.models import ModelFacts


class Config(MethodConfig):
    """The text before each prompt; give at least one of `system`, `prefix` and the data set `data.examples`."""

    name: Literal["prompt"] = "prompt"
    """The method."""
    # The length is limited, because the text is part of every prompt and of the stage's key.
    system: str = Field("", max_length=100_000)
    """System text of chats, before the system text or instruction that a prompt has itself."""
    # The prefix is separate from `system`: a plain text has no roles, so that a system text would be part of what is continued.
    prefix: str = Field("", max_length=100_000)
    """Text before each plain text that the model continues, such as the prompts of toxicity; a space or line break at its end
    separates it from the text."""


# The preamble is text; tokens are made where the prompts are encoded, with the chat template of the model.
def preamble(config: Config, examples: Sequence[Mapping[str, object]]) -> Preamble:
    """Return the text that is put before each prompt.

    Args:
        config: The texts.
        examples: Rows of format instruction, the worked examples in their order.
    """
    # The rows have format instruction, because the form of their data set has been resolved before. A missing input and None
    # count as an empty input.
    worked = [
        Example(instruction=str(row["instruction"]), input=str(row.get("input") or ""), output=str(row["output"]))
        for row in examples
    ]
    # The tuple has the order of the rows, which is also their order in the prompt.
    return Preamble(system=config.system, prefix=config.prefix, examples=tuple(worked))


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a job that puts nothing before its prompts."""
    # Such a job would be the baseline itself under another name and key.
    if job.data.examples is None and not (config.system or config.prefix):
        raise ValueError("method.system: this key is required by method prompt (or method.prefix, or data.examples)")


# No range of strengths is given: the text is in the prompt or not.
METHOD = Prompted(Config, preamble, check=check, example="jobs/tiny/prompt.yaml")
