"""What a patch costs: latency, throughput and memory of generation, beside the same model without the patch.

Every contender reads prompts of one length and writes a fixed number of tokens, whatever they are, with a KV cache. The
patched model runs at each strength; beside it, in an order drawn anew for each repeat, runs the same model with its patches
detached, so that a drift of the machine hits both. The headline is their ratio, one observation a repeat, as median with the
interval of a sign test (from six repeats on):

    efficiency/decode_ratio_batch_<n>    seconds of decoding, patched / unpatched              1 is free, lower is better
    efficiency/prefill_ratio_batch_<n>   seconds of prefill, patched / unpatched
    efficiency/memory_ratio_batch_<n>    peak memory, patched / unpatched

The unpatched model runs twice in each repeat. `control_..._ratio` is one of them over the other: how far from 1 the machine
alone can be. With `folded`, `folded_..._ratio` is a copy of the model with the patch merged into its weights over the unpatched
one; where the patch does not fold the rows are left out, with a warning. Absolute numbers follow, of the patched model and, as
`folded_...` and `unpatched_...`, of the others; they are those of one machine at one moment:

    decode_ms            milliseconds per token of a row after the first, which is the prefill's
    prefill_ms           milliseconds from prompt to first token
    tokens_per_s         new tokens of all rows per second, prefill included
    peak_memory_bytes    weights, patches, and the most that was allocated on the GPU beside them

On a CPU memory is not measured, and its observations are unparsable: resident memory shows no peak of a second run, because the
allocator keeps what the first one freed.

Prompts are tokens drawn at random, the first half instruction, the rest data. The loop is that of every generation, with its
cache, roles and strengths, but for sampling and the search for an end. A finished evaluation is not run again, like any other:
to measure anew, set another seed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from steerlab import models
from steerlab.evaluation.statistics.measures import Better, Measure
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, plain_texts
from steerlab.evaluation.tasks.cost.contenders import CONTROL, FOLDED, PATCHED, UNPATCHED, Contender, at_strength
from steerlab.inputs.tokens import DATA, INSTRUCTION, Batch, Encoded, collate
from steerlab.job import TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

Clock = Callable[[], float]
_RATIOS = {"decode_ratio": "decode_ms", "prefill_ratio": "prefill_ms", "memory_ratio": "peak_memory_bytes"}


class Config(TaskConfig):
    """Latency, throughput and memory of generation, relative to the model without the patch."""

    task: Literal["efficiency"] = "efficiency"
    """This task."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 8), min_length=1)
    """Rows that are generated at once."""
    prompt_tokens: int = Field(128, ge=2)
    """Length of every prompt in tokens."""
    new_tokens: int = Field(128, ge=2)
    """Tokens that every row writes."""
    repeats: int = Field(10, ge=1)
    """Measurements of each contender; fewer than 6 give no interval."""
    warmup: int = Field(2, ge=1)
    """Runs of each contender before the ones that count."""
    folded: bool = False
    """Measure the folded patch as well; its copy of the model stands beside the model itself."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.limit is not None:
            raise ValueError("limit: there are no rows here; set batch_sizes and repeats")
        return self


class Timing(NamedTuple):
    """One generation of a batch."""

    prefill_s: float
    decode_s: float
    peak_bytes: int | None
    """None where it was not measured."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured; the model without its patches, and how it compares with itself, are no result."""
    units = {"decode_ms": "ms a token", "prefill_ms": "ms", "tokens_per_s": "tokens/s", "peak_memory_bytes": "bytes"}
    forms = (PATCHED, *((FOLDED,) if config.folded else ()), UNPATCHED, CONTROL)
    found = []
    for size in config.batch_sizes:
        for form in forms:
            is_result = form in (PATCHED, FOLDED)
            names = {} if form == UNPATCHED else dict.fromkeys(_RATIOS, "ratio")
            names |= {} if form == CONTROL else units
            for name, unit in names.items():
                better: Better = "higher" if name == "tokens_per_s" else "lower"
                full = f"{form}{name}_batch_{size}"
                found.append(Measure(full, better if is_result else None, unit, low=0.0, transform="median"))
    return tuple(found)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse generations that do not fit into the model's context. Raises ValueError."""
    if facts.max_positions and config.prompt_tokens + config.new_tokens > facts.max_positions:
        raise ValueError(
            f"prompt_tokens {config.prompt_tokens} and new_tokens {config.new_tokens} are more than the model's context holds: "
            f"{facts.max_positions}"
        )


def run(model: SteeredModel, config: Config, clock: Clock = time.perf_counter) -> Result:
    """Time the contenders at every strength and batch size."""
    model.check_strengths(config.strengths)
    _check_length(model, config)
    observations, samples = [], []
    model.detach()
    try:
        for number, strength in enumerate(config.strengths):
            model.progress(number, len(config.strengths))
            found, sample = _timed(model, strength, config, clock)
            observations += found
            samples.append(sample)
    finally:
        model.attach()
    return Result(observations, samples, measures(config))


def _timed(model: SteeredModel, strength: float, config: Config, clock: Clock) -> tuple[list[Observation], dict[str, object]]:
    """Time the contenders at one strength; the copy of the folded model, if there is one, does not outlive this."""
    contenders, note = at_strength(model, strength, config.folded)
    found = []
    for size in config.batch_sizes:
        timings = race(contenders, prompts(model, size, config.prompt_tokens, config.seed), config, clock)
        found += observe(timings, size, config.new_tokens, strength)
    return found, {"strength": strength, **_conditions(model), **({"folded": note} if config.folded else {})}


def observe(
    timings: Mapping[str, Sequence[Timing]], batch_size: int, new_tokens: int, strength: float = 1.0
) -> list[Observation]:
    """Turn the timings of the contenders, by name and repeat, into ratios to the unpatched model and absolute numbers."""
    measured = {name: [_measures(t, batch_size, new_tokens) for t in found] for name, found in timings.items()}
    found = []
    for name in (name for name in measured if name != UNPATCHED):
        for ratio, measure in _RATIOS.items():
            pairs = zip(measured[name], measured[UNPATCHED], strict=True)
            values = [_ratio(own[measure], plain[measure]) for own, plain in pairs]
            found += _observations(f"{name}{ratio}", values, batch_size, strength)
    for name in (name for name in measured if name != CONTROL):
        for measure in measured[name][0]:
            values = [own[measure] for own in measured[name]]
            found += _observations(f"{name}{measure}", values, batch_size, strength)
    return found


def _measures(timing: Timing, batch_size: int, new_tokens: int) -> dict[str, float | None]:
    return {
        "decode_ms": 1e3 * timing.decode_s / (new_tokens - 1),
        "prefill_ms": 1e3 * timing.prefill_s,
        "tokens_per_s": batch_size * new_tokens / (timing.prefill_s + timing.decode_s),
        "peak_memory_bytes": timing.peak_bytes,
    }


def _ratio(own: float | None, plain: float | None) -> float | None:
    return None if own is None or plain is None else own / plain


def _observations(name: str, values: Sequence[float | None], batch_size: int, strength: float) -> list[Observation]:
    metric = f"efficiency/{name}_batch_{batch_size}"
    return [Observation(metric, str(repeat), value, 1.0, strength) for repeat, value in enumerate(values)]


def race(contenders: Sequence[Contender], batch: Batch, config: Config, clock: Clock) -> dict[str, list[Timing]]:
    """Let the contenders generate in turn, each repeat in another order; the result is indexed [name][repeat]."""
    generator = random.Random(config.seed)
    found: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    for _ in range(config.warmup + config.repeats):
        for contender in sorted(contenders, key=lambda _: generator.random()):
            found[contender.name].append(_measured(contender, batch, config.new_tokens, clock))
    return {name: timings[config.warmup :] for name, timings in found.items()}


def _measured(contender: Contender, batch: Batch, new_tokens: int, clock: Clock) -> Timing:
    """Time one generation, with its peak of memory on a GPU."""
    device = batch.input_ids.device
    if device.type != "cuda":
        with contender.open() as model:
            return Timing(*generate(model, batch, contender.strength, new_tokens, clock), None)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    with contender.open() as model:
        times = generate(model, batch, contender.strength, new_tokens, clock)
    # What else is on the device, such as the weights of another contender, is not this one's.
    return Timing(*times, contender.weight_bytes + torch.cuda.max_memory_allocated(device) - held)


@torch.inference_mode()
def generate(model: SteeredModel, batch: Batch, strength: float, new_tokens: int, clock: Clock) -> tuple[float, float]:
    """Write exactly `new_tokens` tokens a row with a cache; return the seconds of the prefill and of the rest."""
    strength_B = torch.full((len(batch.input_ids),), strength)
    model.prefill(batch, strength_B)  # not timed: changed weights are written by the first call after attaching
    start_s = _now_s(model.device, clock)
    decoding = model.prefill(batch, strength_B)
    token_B = decoding.logits_BV.argmax(-1)
    first_s = _now_s(model.device, clock)
    for _ in range(new_tokens - 1):
        decoding.step(token_B)
        token_B = decoding.logits_BV.argmax(-1)
    return first_s - start_s, _now_s(model.device, clock) - first_s


def _now_s(device: torch.device, clock: Clock) -> float:
    """Read the clock when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def prompts(model: SteeredModel, batch_size: int, num_tokens: int, seed: int) -> Batch:
    """Make a batch of random tokens, of the roles instruction and data."""
    vocabulary: int = models.text_config(model.model).vocab_size
    ids_BT = torch.randint(vocabulary, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))
    roles = [INSTRUCTION] * (num_tokens // 2) + [DATA] * (num_tokens - num_tokens // 2)
    rows = [Encoded(ids, roles, [False] * num_tokens, [0] * num_tokens) for ids in ids_BT.tolist()]
    return collate(rows, model.encoder.pad_id, side="left").to(model.device)


def _check_length(model: SteeredModel, config: Config) -> None:
    limit = models.max_positions(model.model)
    if config.prompt_tokens + config.new_tokens > limit:
        raise ValueError(
            f"prompt_tokens {config.prompt_tokens} and new_tokens {config.new_tokens} are more than the model's context holds: "
            f"{limit}"
        )


def _conditions(model: SteeredModel) -> dict[str, object]:
    """Say what the absolute numbers depend on."""
    is_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "dtype": str(model.model.dtype), "attention": model.model.config._attn_implementation}


TASK = Task(Config, run, measures, check=check, chats=plain_texts)
