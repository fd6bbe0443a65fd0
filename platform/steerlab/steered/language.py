"""One loaded model with its patches: generate, score and read hidden states, for every task and method.

Decoding is batched and cached; roles are given by position for every chunk, so embedding patches see the right role in
prefill and in each decoding step. Sampling draws from a generator of its own for each prompt, so what a prompt gets depends on
the batch and on other strengths by rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from steerlab import models, patches
from steerlab.guards import saved
from steerlab.inputs import encoding
from steerlab.inputs.drawings import Prompter
from steerlab.inputs.encoded_rows import RowEncoder
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import GENERATION, Batch, Conversation, Encoded, Row, collate
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.patches import taps
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.model import Asked, Shown, Steered
from steerlab.storage import bases
from steerlab.storage.bases import BASE, PROMPT, SavedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")
BELOW = "below"
"""Folder of an artifact with the patches under its newest one, numbered from the lowest."""
_NUCLEUS = 512
"""Tokens among which a nucleus is looked for before the whole vocabulary is sorted."""
_PROBES = (
    ("Say what the text is about.", "It is about nothing in particular."),
    ("Name three colours.", ""),
    ("Translate into German, and keep the numbers: 12, 7.5 and 1,000.", "We sold 12 of them for 7.5 each, and got 1,000 back!"),
    (
        "Write a short answer to the letter, as its writer would like to hear it.",
        "Dear neighbour, last night your dog dug up the roses that my grandmother had planted before the war. I am not angry, "
        "but I would be glad if the fence were mended before spring, and if you came over for tea. Yours, Ada.",
    ),
)
"""Instructions and data by which two copies of a model are compared."""
_SHOWN_TOKENS = 64
"""Tokens that are generated for people who do not say how many."""
_BATCH_TOKENS = 4096
"""Tokens in one batch: prompts, padding and what may be generated."""


class Generation(NamedTuple):
    """One continuation of a prompt."""

    text: str
    num_tokens: int
    finished: bool
    """True when it ended by itself, False when it was cut at `max_new_tokens`."""
    too_long: bool = False
    """True when the prompt did not fit into the model's context, so that nothing was written."""


class TokenLogProbs(NamedTuple):
    """Log-probabilities (nats) of tokens 1..T-1 of one row, and what those tokens are."""

    log_prob: list[float]
    roles: list[int]
    in_response: list[bool]
    too_long: bool = False
    """True when the row did not fit into the model's context: the lists are empty."""


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass
class Decoding:
    """A batch that is being continued, with the cache of what it has read."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    """All that was read, (B, T) each: ids, mask, positions, roles, phases."""
    written: dict[str, int]
    """Role and phase of what is written."""
    strengths: Tensor | None
    cache: dict[str, Any] = field(init=False)
    """What the model keeps of what it has read, by the name of its argument; empty in a model that reads all of it again."""
    memory: dict[int, Any] | None = field(init=False)
    """What patches keep, by their number; None where nothing is kept."""
    logits_BV: Tensor = field(init=False)
    """Of the next token."""

    def __post_init__(self) -> None:
        self.memory = None if models.cache_name(self.model) is None else {}
        self.cache = models.empty_cache(self.model)
        self._read(self.inputs)

    def step(self, token_B: Tensor) -> None:
        """Read one more token of every row."""
        last_B1 = self.inputs["position_ids"][:, -1:]
        new = {"input_ids": token_B[:, None], "attention_mask": torch.ones_like(last_B1), "position_ids": last_B1 + 1}
        new |= {name: torch.full_like(last_B1, value) for name, value in self.written.items()}
        self.inputs = {name: torch.cat([read, new[name]], 1) for name, read in self.inputs.items()}
        self._read({**new, "attention_mask": self.inputs["attention_mask"]} if self.cache else self.inputs)

    def _read(self, inputs: dict[str, Tensor]) -> None:
        name = models.cache_name(self.model)
        if not models.reads_padding(self.model):
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        patched = {"strengths": self.strengths, "memory": self.memory}
        out = self.model(**inputs, **patched, **self.cache, use_cache=name is not None, logits_to_keep=1)
        if name is not None and name in out:
            self.cache = {name: out[name]}
        self.logits_BV = out.logits[:, -1]


@dataclass
class SteeredModel(Steered):
    """A language model, its tokenizer's encoder and the patches attached to it."""

    model: PreTrainedModel
    encoder: Encoder
    batch_tokens: int = _BATCH_TOKENS

    def __post_init__(self) -> None:
        self.model.eval()
        models.reads_padding(self.model)  # found while nothing is attached
        super().__post_init__()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(models.layer_names(self.model))

    @property
    def max_tokens(self) -> float:
        """Tokens that the model's context holds; infinity where there is no limit."""
        return models.max_positions(self.model)

    def fits(self, conversations: Sequence[Conversation], longest: float = math.inf) -> list[bool]:
        """Say of each conversation whether it has no more than `longest` tokens and fits into the model's context."""
        return [len(row) <= min(longest, self.max_tokens) for row in self.encoder.encode_all(conversations)]

    @property
    def device(self) -> torch.device:
        """Device of the input embedding."""
        return next(models.embedding(self.model).parameters()).device

    def answer(self, instruction: str, data: str = "", *, max_new_tokens: int = 128, strength: float = 1.0) -> str:
        """Answer one instruction about one piece of data, greedily."""
        prompt = self.encoder.conversation(instruction, data)
        return self.generate([prompt], max_new_tokens=max_new_tokens, strengths=(strength,))[0][0].text

    def side_by_side(self, asked: Asked) -> Shown:
        """Continue a prompt at several strengths."""
        asked.check("a language model", "data", "max_new_tokens", "temperature", "seed")
        outputs = self.generate(
            [self.encoder.conversation(asked.prompt, asked.data or "")],
            max_new_tokens=asked.max_new_tokens or _SHOWN_TOKENS,
            temperature=asked.temperature or 0.0,
            seed=asked.seed or 0,
            strengths=asked.strengths,
        )
        return Shown([(s, output.text) for s, (output,) in zip(asked.strengths, outputs, strict=True)], {})

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities (nats) of the tokens of fixed conversations, (T-1,) each."""
        prompts = [self.encoder.conversation(instruction, data) for instruction, data in _PROBES]
        limit = models.max_positions(self.model)
        fitting = [p for p, row in zip(prompts, self.encoder.encode_all(prompts), strict=True) if len(row) <= limit]
        return [torch.tensor(scored.log_prob) for scored in self.token_log_probs(fitting, strength=strength)]

    @property
    def tolerance(self) -> float:
        """Nats, in bfloat16 too."""
        return 1e-2

    def save_model(self, directory: Path) -> None:
        """Write the model and its tokenizer as transformers does."""
        if self.model.generation_config is not None:
            self.model.generation_config.eos_token_id = sorted(self._end_ids)  # plain transformers ends turns there, too
        models.save_model(self.model, self.encoder.tokenizer, directory)

    def loading_lines(self, directory: Path) -> str:
        """Return Python that loads what `save_model` wrote."""
        kind = "AutoModelForCausalLM"
        return f"from transformers import {kind}\nmodel = {kind}.from_pretrained({str(directory)!r})"

    def asking_line(self, strength: float = 1.0) -> str:
        """Return Python that answers."""
        return f"print(model.answer('instruction', 'data', strength={strength:g}))"

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        strengths: Sequence[float] = (1.0,),
        stop: Sequence[str] = (),
        skip_long: bool = False,
    ) -> list[list[Generation]]:
        """Continue every prompt at every strength; the result is indexed [strength][prompt].

        `temperature` 0 is greedy; the nucleus of `top_p` keeps the token that crosses it. With `skip_long` a prompt that does
        not fit, together with its continuation, is left out and gets an empty one that is marked `too_long`.

        Raises:
            ValueError: when a prompt and its continuation exceed the model's positions, unless `skip_long`.
        """
        self.check_strengths(strengths)
        encoded = list(self.encoder.encode_all(prompts, continued=True))
        fitting = self._fitting(encoded, max_new_tokens, skip_long)
        sampling = Sampling(temperature, top_p, repetition_penalty)
        jobs = [(s, p) for p in fitting for s in range(len(strengths))]
        results: dict[tuple[int, int], Generation] = {}
        for chunk in self._batches(jobs, lambda job: len(encoded[job[1]]), max_new_tokens):
            rows = [encoded[p] for _, p in chunk]
            strength_B = torch.tensor([strengths[s] for s, _ in chunk])
            uniforms_BT = _uniforms([p for _, p in chunk], max_new_tokens, seed) if temperature else None
            for job, ids in zip(
                chunk, self._decode(rows, strength_B, max_new_tokens, sampling, uniforms_BT, stop), strict=True
            ):
                results[job] = self._finish(ids, max_new_tokens, stop)
            self.progress(len(results), len(jobs))
        unread = Generation("", 0, False, too_long=True)
        return [[results.get((s, p), unread) for p in range(len(encoded))] for s in range(len(strengths))]

    @torch.inference_mode()
    def token_log_probs(
        self, conversations: Sequence[Conversation], *, strength: float = 1.0, skip_long: bool = False
    ) -> list[TokenLogProbs]:
        """Score the tokens of complete rows under the steered model.

        Raises:
            ValueError: when a row exceeds the model's positions; with `skip_long` it is marked `too_long` instead.
        """
        self.check_strengths((strength,))
        encoded = list(self.encoder.encode_all(conversations))
        fitting = self._fitting(encoded, 0, skip_long)
        results: dict[int, TokenLogProbs] = {}
        for chunk, batch in self.batches([encoded[i] for i in fitting]):
            logits_BTV = self.logits(batch, strength)
            log_probs_BT = _gathered_log_probs(logits_BTV[:, :-1], batch.input_ids[:, 1:]).cpu()
            for row, number in enumerate(chunk):
                i = fitting[number]
                length = len(encoded[i]) - 1
                results[i] = TokenLogProbs(
                    log_probs_BT[row, :length].tolist(), encoded[i].roles[1:], encoded[i].in_response[1:]
                )
            self.progress(len(results), len(fitting))
        unread = TokenLogProbs([], [], [], too_long=True)
        return [results.get(i, unread) for i in range(len(encoded))]

    def batches(self, rows: Sequence[Row], loss_on: str = "all") -> Iterator[tuple[list[int], Batch]]:
        """Yield padded batches of whole rows on the model's device, and which rows each holds; the longest rows first.

        Raises:
            ValueError: a row exceeds the model's positions.
        """
        self._fitting(rows, 0, skip_long=False)
        alike = models.alike_up_to(self.model)
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(len(row) * (len(row) > alike), []).append(number)
        size = lambda i: len(rows[i]) * len(rows[i].sequences)  # noqa: E731
        for chunk in (chunk for length in sorted(groups, reverse=True) for chunk in self._chunks(groups[length], size)):
            yield chunk, collate([rows[i] for i in chunk], self.encoder.pad_id, loss_on=loss_on).to(self.device)

    @torch.inference_mode()
    def logits(self, batch: Batch, strength: float, only: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the logits of a batch at one strength, (B, T, V), or those of some rows and positions, (1, N, V)."""
        strengths = self._strengths(torch.full((len(batch.labels),), strength))
        return self.model(**batch.patched_inputs, strengths=strengths, only=only, use_cache=False).logits

    @torch.inference_mode()
    def hidden_states(
        self, conversations: Sequence[Conversation], *, strength: float = 1.0
    ) -> Iterator[tuple[Tensor, Encoded]]:
        """Yield (L+1, T, D) float32 hidden states on the CPU for each row: the patched embedding, then every layer's output.

        Raises:
            ValueError: when a row exceeds the model's positions.
        """
        self.check_strengths((strength,))
        embedding = next(n for n, m in self.model.named_modules() if m is models.embedding(self.model))
        names = [embedding, *models.layer_names(self.model)]
        reader = taps.Reader(self.model, [taps.Tap(name) for name in names])
        try:
            for row in self.encoder.encode_all(conversations):
                self._fitting([row], 0, skip_long=False)
                batch = collate([row], self.encoder.pad_id).to(self.device)
                outputs = reader(**batch.patched_inputs, strengths=self._strengths(torch.full((1,), strength)))
                yield torch.stack([outputs[name][0].float().cpu() for name in names]), row
        finally:
            reader.close()

    def prefill(self, batch: Batch, strength_B: Tensor) -> Decoding:
        """Read prompts, padded on the left, and return what continues them.

        Raises:
            ValueError: there is padding, which the model would read as if it were text.
        """
        if not models.reads_padding(self.model) and not bool(batch.attention_mask.all()):
            raise ValueError(f"{type(self.model).__name__} takes no positions: it reads rows of one length at a time")
        written = {"roles": self.encoder.response_role_id, "phases": GENERATION}
        return Decoding(self.model, batch.patched_inputs, written, self._strengths(strength_B))

    def _decode(
        self,
        rows: list[Encoded],
        strength_B: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        uniforms_BT: Tensor | None,
        stop: Sequence[str],
    ) -> list[list[int]]:
        """Continue rows until each has ended; they are padded on the left so that all end together."""
        decoding = self.prefill(collate(rows, self.encoder.pad_id, side="left").to(self.device), strength_B)
        seen = [row.input_ids.copy() for row in rows]
        written: list[list[int]] = [[] for _ in rows]
        running = [True] * len(rows)
        for step in range(max_new_tokens):
            uniform_B = None if uniforms_BT is None else uniforms_BT[:, step]
            chosen_B = choose(decoding.logits_BV.float(), seen, sampling, uniform_B)
            for row, token in enumerate(chosen_B.tolist()):
                if running[row]:
                    written[row].append(token)
                    seen[row].append(token)
                    running[row] = token not in self._end_ids and not self._stopped(written[row], stop)
            if not any(running) or step == max_new_tokens - 1:
                return written
            decoding.step(chosen_B)
        return written

    @property
    def _end_ids(self) -> set[int]:
        ids: Any = self.model.generation_config.eos_token_id if self.model.generation_config else None
        known = ids if isinstance(ids, list) else [ids]
        return {int(i) for i in known if i is not None} | self.encoder.end_ids

    def _stopped(self, ids: list[int], stop: Sequence[str]) -> bool:
        return bool(stop) and any(text in self.encoder.decode(ids) for text in stop)

    def _finish(self, ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Generation:
        text = self.encoder.decode(ids)
        ends = [text.find(s) for s in stop if s in text]
        finished = bool(ends) or (bool(ids) and ids[-1] in self._end_ids)
        return Generation(text[: min(ends)] if ends else text, len(ids), finished)

    def _batches(
        self, jobs: list[tuple[int, int]], length: Callable[[tuple[int, int]], int], more: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Group (strength, prompt) pairs, whose prompts become longer by `more` tokens.

        Changed weights have one strength a call, other patches one a row; a model that reads no padding, one length.
        """
        one_strength = bool(self.patches) and self.patches[-1].kind == "weight"
        together = models.alike_up_to(self.model) if models.reads_padding(self.model) else 0
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for job in jobs:
            groups.setdefault((job[0] * one_strength, length(job) * (length(job) + more > together)), []).append(job)
        for group in sorted(groups):
            yield from self._chunks(groups[group], lambda job: length(job) + more)

    def _chunks(self, items: list[_T], length: Callable[[_T], int]) -> Iterator[list[_T]]:
        """Group items of similar length so that a padded batch stays within `batch_tokens`; longest first."""
        chunk: list[_T] = []
        for item in sorted(items, key=length, reverse=True):
            if chunk and (len(chunk) + 1) * length(chunk[0]) > self.batch_tokens:
                yield chunk
                chunk = []
            chunk.append(item)
        if chunk:
            yield chunk

    def _fitting(self, rows: Sequence[Row], max_new_tokens: int, skip_long: bool) -> list[int]:
        """Return the numbers of the rows that fit into the model's context; unless others are skipped, they are refused."""
        fitting, limit = [], self.max_tokens
        for number, row in enumerate(rows):
            if len(row) + max_new_tokens <= limit:
                fitting.append(number)
            elif not skip_long:
                raise ValueError(
                    f"row {number} has {len(row)} tokens and {max_new_tokens} new ones; the model's context holds {limit}"
                )
        return fitting


def choose(logits_BV: Tensor, seen: list[list[int]], sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """Choose the next token of each row, greedily at temperature 0, else by inverting the distribution at `uniform_B`."""
    if sampling.repetition_penalty != 1:
        for row, ids in enumerate(seen):
            index = torch.tensor(sorted(set(ids)), device=logits_BV.device)
            value = logits_BV[row, index]
            factor = sampling.repetition_penalty
            logits_BV[row, index] = torch.where(value > 0, value / factor, value * factor)
    if uniform_B is None:
        return logits_BV.argmax(-1)
    probs_BK, order_BK = _most_likely(torch.softmax(logits_BV / sampling.temperature, -1), sampling.top_p)
    before_BK = probs_BK.cumsum(-1) - probs_BK
    probs_BK = torch.where(before_BK < sampling.top_p, probs_BK, 0)
    cumulative_BK = probs_BK.cumsum(-1)
    target_B1 = uniform_B.to(cumulative_BK)[:, None] * cumulative_BK[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).clamp(max=probs_BK.shape[-1] - 1)
    return order_BK.gather(-1, rank_B1)[:, 0]


def _most_likely(probs_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities, the largest first, and their tokens: as many as the nucleus of every row needs, or all."""
    if top_p < 1 and probs_BV.shape[-1] > _NUCLEUS:
        # Sorting a whole vocabulary takes longer than the model's own layers.
        probs_BK, order_BK = probs_BV.topk(_NUCLEUS, dim=-1)
        if bool((probs_BK.sum(-1) > top_p).all()):
            return probs_BK, order_BK
    return probs_BV.sort(stable=True, dim=-1, descending=True)


def _uniforms(prompts: Sequence[int], num: int, seed: int) -> Tensor:
    """Return (B, num) uniform numbers, a row for each prompt's own generator."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + prompt) for prompt in prompts]
    return torch.stack([torch.rand(num, generator=generator) for generator in generators])


def _gathered_log_probs(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return log p(ids) in float32, a row at a time: a full float32 copy of the logits would double the memory."""
    return torch.stack(
        [
            -torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
            for logits, ids in zip(logits_BTV, ids_BT, strict=True)
        ]
    )


def load(
    directory: str | Path,
    *,
    dtype: str | None = None,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
    prompt: Mapping[str, Any] | None = None,
    snapshot: int | None = None,
    sampler: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> SteeredModel | SteeredPipeline:
    """Load an artifact or an exported folder: model (in its saved dtype if none is given), patches, prompt settings.

    A pipeline draws as `sampler` says, or else as the result was made. `prompt` holds the settings of a plain model, which has
    none; `snapshot` takes the patch as it was after that training step.
    """
    model, encoder, stack = load_stack(
        directory,
        dtype=dtype,
        attention=attention,
        prompt=prompt,
        snapshot=snapshot,
        sampler=sampler,
        trust_remote_code=trust_remote_code,
    )
    placed = tuple(patch.to(device) for patch in stack)
    if isinstance(model, Diffusion):
        return SteeredPipeline(model.to(device), encoder, placed)
    return SteeredModel(model.to(device), encoder, placed)


def encoder_of(model: Any, directory: Path, prompt: Mapping[str, Any] | None, trust_remote_code: bool = False) -> Any:
    """Return what makes rows of data into inputs of a model: the encoder of its tokenizer, or a pipeline's prompter."""
    encoder: RowEncoder = (
        Prompter(model) if isinstance(model, Diffusion) else encoding.load(directory, prompt, trust_remote_code)
    )
    return encoder


def load_stack(
    directory: str | Path,
    *,
    dtype: str | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    prompt: Mapping[str, Any] | None = None,
    snapshot: int | None = None,
    sampler: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Load a model, its encoder and the patches of its artifacts, the lowest first, none attached yet.

    A directory without prompt settings of its own is a plain model, prompted by `prompt`. An artifact of a frozen model holds
    its patch alone and names in `base.json` what it stands on: a source, or an artifact beside it.
    """
    directory = Path(directory)
    kernel: dict[str, Any] = {"attention": attention, "trust_remote_code": trust_remote_code}
    if not (directory / PROMPT).is_file():
        model = models.load_model(directory, dtype=dtype or "float32", seed=seed, sampler=sampler, **kernel)
        return model, encoder_of(model, directory, prompt, trust_remote_code), ()
    prompt = saved.read(directory / PROMPT, SavedPrompt).model_dump(mode="json", exclude_unset=True)
    sampler = prompt.get("sampler") if sampler is None else sampler
    below: tuple[Any, ...] = ()
    if (directory / BASE).is_file():
        bases.chain(directory)  # which ends
        model, encoder, below = load_stack(bases.below(directory), dtype=dtype, prompt=prompt, sampler=sampler, **kernel)
    else:
        checkpoint = directory / "model" if (directory / "model").is_dir() else directory
        # Other weights of a denoiser are in the checkpoint, trained further or not.
        sampler = None if sampler is None else {**sampler, "denoiser": None}
        model = models.load_model(checkpoint, dtype=dtype or models.saved_dtype(checkpoint), sampler=sampler, **kernel)
        encoder = encoder_of(model, checkpoint, prompt, trust_remote_code)
    numbered = [path for path in (directory / BELOW).glob("*") if path.name.isdecimal()]
    numbered.sort(key=lambda path: int(path.name))
    below = (*below, *(patches.load(path) for path in numbered))
    patch_dir = directory / "patch" if snapshot is None else directory / "snapshots" / str(snapshot)
    if not patches.exists(patch_dir):
        if snapshot is not None:
            raise ValueError(f"{directory} holds no patch of step {snapshot}; train.snapshots says which steps are kept")
        return model, encoder, below
    return model, encoder, (*below, patches.load(patch_dir, model if (directory / BASE).is_file() else None))


def model_directory(directory: Path) -> Path:
    """Return where the config and the tokenizer of a source or an artifact lie, whatever patches stand on it."""
    directory = bases.chain(directory)[-1]
    return directory / "model" if (directory / "model").is_dir() else directory
