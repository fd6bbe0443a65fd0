"""One loaded model with its patches: generate, score and read hidden states, for every task and method.

Decoding is batched and cached; roles are given by position for every chunk, so embedding patches see the right role in
prefill and in each decoding step. Sampling draws from a generator of its own for each prompt, so what a prompt gets depends on
the batch and on other strengths by rounding alone. The file is as long as the class is: what it is asked for all works on the
same batches, caches and strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from steerlab import models
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import GENERATION, Batch, Conversation, Encoded, Row, collate
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.patches import taps
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.model import Asked, Shown, Steered
from steerlab.steered.prefilled import Decoding
from steerlab.steered.sampling import Sampling, choose, uniforms
from steerlab.steered.stacks import load_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")
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
            uniforms_BT = uniforms([p for _, p in chunk], max_new_tokens, seed) if temperature else None
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
    prompt: Mapping[str, object] | None = None,
    snapshot: int | None = None,
    sampler: Mapping[str, object] | None = None,
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
