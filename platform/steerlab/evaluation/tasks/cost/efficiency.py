"""Cost of a patch: latency, throughput and memory of generation, relative to the same model without the patch.

Every contender reads prompts of one length and generates a fixed number of tokens with a KV cache. The patched model runs at
each strength. In each repeat the same model with its patches detached runs as well, in a random order, so that a change in the
machine's speed affects both. The main result is their ratio. Each repeat is one observation, and they are summarised by their
median with the interval of a sign test (from six repeats on):

    efficiency/decode_ratio_batch_<n>    seconds of decoding, patched / unpatched              1 is free, lower is better
    efficiency/prefill_ratio_batch_<n>   seconds of prefill, patched / unpatched
    efficiency/memory_ratio_batch_<n>    peak memory, patched / unpatched

The unpatched model runs twice in each repeat. `control_..._ratio` divides one of these runs by the other and shows how far from
1 a ratio can be by noise alone. With `folded`, `folded_..._ratio` compares a copy of the model with the patch
merged into its weights with the unpatched one; if the patch cannot be folded, these metrics are skipped with a warning.
Absolute numbers follow, for the patched model and, as `folded_...` and `unpatched_...`, for the others. They hold for one
machine at one moment:

    decode_ms            milliseconds per token of a row, without the first token, which belongs to the prefill
    prefill_ms           milliseconds from prompt to first token
    tokens_per_s         new tokens of all rows per second, prefill included
    peak_memory_bytes    weights, patches, and the largest amount allocated on the GPU in addition to them

On a CPU memory is not measured, and its observations are unparsable: resident memory shows no peak of a second run, because the
allocator retains the memory that the first run freed.

Prompts are random tokens; the first half has the role of instructions, the rest that of data. The loop is the one of every
generation, with its cache, roles and strengths, but without sampling and without stopping at an end-of-sequence token. Like any
other evaluation, a finished one is not run again: to repeat the measurement, set another seed.
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
"""Function that returns the time in seconds; tests pass another one."""
_RATIOS = {"decode_ratio": "decode_ms", "prefill_ratio": "prefill_ms", "memory_ratio": "peak_memory_bytes"}


class Config(TaskConfig):
    """Latency, throughput and memory of generation, relative to the model without the patch."""

    task: Literal["efficiency"] = "efficiency"
    """This task."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 8), min_length=1)
    """Numbers of rows that are generated at once; each is measured."""
    prompt_tokens: int = Field(128, ge=2)
    """Length of every prompt in tokens."""
    new_tokens: int = Field(128, ge=2)
    """Number of tokens generated for every row."""
    repeats: int = Field(10, ge=1)
    """Number of measurements of each contender; fewer than 6 give no interval."""
    warmup: int = Field(2, ge=1)
    """Number of runs of each contender before the measured ones."""
    folded: bool = False
    """Measure the folded patch as well, which needs memory for a second copy of the model."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.limit is not None:
            raise ValueError("limit: this task has no rows; set batch_sizes and repeats")
        return self


class Timing(NamedTuple):
    """Times and memory of generating one batch."""

    prefill_s: float
    """Seconds from prompt to first token."""
    decode_s: float
    """Seconds of all tokens after the first."""
    peak_bytes: int | None
    """Largest memory in bytes, with weights and patches; None on a CPU, where it is not measured."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; numbers of the unpatched model, and its ratios to itself, have no better direction."""
    units = {"decode_ms": "ms a token", "prefill_ms": "ms", "tokens_per_s": "tokens/s", "peak_memory_bytes": "bytes"}
    forms = (PATCHED, *((FOLDED,) if config.folded else ()), UNPATCHED, CONTROL)
    measured = []
    for size in config.batch_sizes:
        for form in forms:
            is_result = form in (PATCHED, FOLDED)
            names = {} if form == UNPATCHED else dict.fromkeys(_RATIOS, "ratio")
            names |= {} if form == CONTROL else units
            for name, unit in names.items():
                better: Better = "higher" if name == "tokens_per_s" else "lower"
                full = f"{form}{name}_batch_{size}"
                measured.append(Measure(full, better if is_result else None, unit, low=0.0, transform="median"))
    return tuple(measured)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse prompts and new tokens that together exceed the model's context. Raises ValueError."""
    # 0 means that the model's config has no limit.
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
    # Patches are detached between measurements, so that the unpatched contender does not pay for hooks.
    model.detach()
    try:
        for number, strength in enumerate(config.strengths):
            model.progress(number, len(config.strengths))
            new, sample = _timed(model, strength, config, clock)
            observations += new
            samples.append(sample)
    finally:
        model.attach()
    return Result(observations, samples, measures(config))


def _timed(model: SteeredModel, strength: float, config: Config, clock: Clock) -> tuple[list[Observation], dict[str, object]]:
    """Time the contenders at one strength; return the observations and a sample that describes the conditions."""
    # The folded copy of the model is freed at the end of this function, before the copy of the next strength is made.
    contenders, note = at_strength(model, strength, config.folded)
    observations = []
    for size in config.batch_sizes:
        timings = race(contenders, prompts(model, size, config.prompt_tokens, config.seed), config, clock)
        observations += observe(timings, size, config.new_tokens, strength)
    return observations, {"strength": strength, **_conditions(model), **({"folded": note} if config.folded else {})}


def observe(
    timings: Mapping[str, Sequence[Timing]], batch_size: int, new_tokens: int, strength: float = 1.0
) -> list[Observation]:
    """Turn timings, indexed [name of the contender][repeat], into ratios to the unpatched model and absolute numbers."""
    measured = {name: [_measures(t, batch_size, new_tokens) for t in repeats] for name, repeats in timings.items()}
    observations = []
    for name in (name for name in measured if name != UNPATCHED):
        for ratio, measure in _RATIOS.items():
            # Runs are paired within a repeat, so that the machine's speed cancels in the ratio.
            pairs = zip(measured[name], measured[UNPATCHED], strict=True)
            values = [_ratio(own[measure], plain[measure]) for own, plain in pairs]
            observations += _observations(f"{name}{ratio}", values, batch_size, strength)
    for name in (name for name in measured if name != CONTROL):
        for measure in measured[name][0]:
            values = [own[measure] for own in measured[name]]
            observations += _observations(f"{name}{measure}", values, batch_size, strength)
    return observations


def _measures(timing: Timing, batch_size: int, new_tokens: int) -> dict[str, float | None]:
    return {
        # The first of the new tokens comes from the prefill.
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
    """Let the contenders generate in turn, in a random order for each repeat; the result is indexed [name][repeat].

    Args:
        contenders: forms of the model.
        batch: the prompts.
        config: warm-up, repeats, new tokens and seed.
        clock: returns seconds.
    """
    generator = random.Random(config.seed)
    runs: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    for _ in range(config.warmup + config.repeats):
        # The order is random in each repeat: a machine's clock rate drifts, and the second of two equal runs has warmer caches.
        for contender in sorted(contenders, key=lambda _: generator.random()):
            runs[contender.name].append(_measured(contender, batch, config.new_tokens, clock))
    # The first runs include allocations, compilation of kernels and their selection by cuBLAS.
    return {name: timings[config.warmup :] for name, timings in runs.items()}


def _measured(contender: Contender, batch: Batch, new_tokens: int, clock: Clock) -> Timing:
    """Time one generation, and on a GPU measure its peak memory."""
    device = batch.input_ids.device
    if device.type != "cuda":
        with contender.open() as model:
            return Timing(*generate(model, batch, contender.strength, new_tokens, clock), None)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    with contender.open() as model:
        times = generate(model, batch, contender.strength, new_tokens, clock)
    # The device also holds the weights of other contenders, so only the increase is measured; own weights are added.
    return Timing(*times, contender.weight_bytes + torch.cuda.max_memory_allocated(device) - before_bytes)


@torch.inference_mode()
def generate(model: SteeredModel, batch: Batch, strength: float, new_tokens: int, clock: Clock) -> tuple[float, float]:
    """Generate exactly `new_tokens` tokens for each row, greedily and with a cache.

    Returns:
        Seconds of the prefill with the first token, and seconds of all further tokens.
    """
    strength_B = torch.full((len(batch.input_ids),), strength)
    model.prefill(batch, strength_B)  # not timed: patches of weights change them in the first call after they are attached
    start_s = _now_s(model.device, clock)
    decoding = model.prefill(batch, strength_B)
    token_B = decoding.logits_BV.argmax(-1)
    first_s = _now_s(model.device, clock)
    for _ in range(new_tokens - 1):
        decoding.step(token_B)
        token_B = decoding.logits_BV.argmax(-1)
    return first_s - start_s, _now_s(model.device, clock) - first_s


def _now_s(device: torch.device, clock: Clock) -> float:
    """Read the clock once the device has finished its work."""
    # Kernels run asynchronously: without this, the clock would measure only their launch.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def prompts(model: SteeredModel, batch_size: int, num_tokens: int, seed: int) -> Batch:
    """Return a batch of random tokens, the first half with the role of instructions, the rest with that of data."""
    # Tokens are random: the time does not depend on the text, and a model may have no template.
    vocabulary: int = models.text_config(model.model).vocab_size
    ids_BT = torch.randint(vocabulary, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))
    # Both roles occur, because a patch may act on one of them only.
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
    """Return the device, data type and attention kernel, on which the absolute numbers depend."""
    is_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "dtype": str(model.model.dtype), "attention": model.model.config._attn_implementation}


TASK = Task(Config, run, measures, check=check, chats=plain_texts)
