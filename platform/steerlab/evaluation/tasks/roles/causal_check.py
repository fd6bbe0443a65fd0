"""The causal check of probing: whether the role of a SEP probe decides its execution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerlab.evaluation.asking.answers import answers, with_legibility
from steerlab.evaluation.statistics.metrics import Observation, contains
from steerlab.evaluation.tasks.roles import separation
from steerlab.evaluation.tasks.roles.marked_prompts import marked, probe_parts, split_probe
from steerlab.inputs.tokens import DATA, INSTRUCTION
from steerlab.steered.language import SteeredModel

if TYPE_CHECKING:
    from steerlab.evaluation.tasks.roles.probing import Config


EXECUTED = ("probing/executed_rotated", "probing/executed_unrotated")


def observe_causal(
    model: SteeredModel, items: Sequence[separation.Item], config: Config
) -> tuple[list[Observation], list[dict[str, object]]]:
    """Measure how often a SEP probe in the data is executed, with its role and with that of an instruction."""
    texts = [split_probe(item) for item in items]
    whole = [(item, text) for item, text in zip(items, texts, strict=True) if text is not None]
    prompts = [
        marked(model.encoder, item.instruction, probe_parts(text, role)) for role in (DATA, INSTRUCTION) for item, text in whole
    ]
    observations: list[Observation] = []
    samples: list[dict[str, object]] = []
    for strength, row in answers(model, prompts, config):
        # If the SEP probe of an item cannot be located, its role cannot be changed, so the item is counted as unparsable.
        cut = [item for item, text in zip(items, texts, strict=True) if text is None]
        observations += [Observation(name, item.id, None, 1.0, strength) for item in cut for name in EXECUTED]
        # The first half of the answers is for probes with the role of data, the second for the same with that of instructions.
        for (item, _), *outputs in zip(whole, row[: len(whole)], row[len(whole) :], strict=True):
            verdicts = [float(contains(output.text, item.witness)) for output in outputs]
            own = [Observation(name, item.id, v, 1.0, strength) for name, v in zip(EXECUTED, verdicts, strict=True)]
            observations += with_legibility("probing", item.id, outputs, own, strength)
        for (item, text), rotated, unrotated in zip(whole, row[: len(whole)], row[len(whole) :], strict=True):
            samples.append(
                {
                    "id": item.id,
                    "strength": strength,
                    "instruction": item.instruction,
                    "data": item.data_with_probe,
                    "probe": text[1],
                    "output_probe_as_data": rotated.text,
                    "output_probe_as_instruction": unrotated.text,
                    "judged": f"executed means that {item.witness!r} occurs in the output, whatever its case",
                }
            )
    return observations, samples
