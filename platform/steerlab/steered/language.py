"""A loaded language model with its patches: it generates text, scores texts and reads hidden states.

Decoding is batched and cached. Each call of the model gets the role of every token, so that patches which depend on roles act
correctly on the prompt and in each decoding step. Each prompt samples from a random generator of its own, so that its
continuation depends on other prompts and strengths of a batch by rounding alone.

The file is longer than 300 lines because it is one class: all its methods share batches, caches and strengths.

Axes besides those of tokens.py: S strengths, N chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from steerlab import models
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import GENERATION, Batch, Conversation, Encoded, Row, collate
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.patches import foreign, taps
from steerlab.steered.continuing import Room, Waiting, continued
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.model import SAMPLING_OPTIONS, Asked, Shown, Steered
from steerlab.steered.prefilled import Decoding
from steerlab.steered.sampling import Sampling, uniforms
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
"""Instructions and data of `SteeredModel.probe`: short and long, with and without data, with digits and punctuation."""
Watch = Callable[[Mapping[tuple[int, int], str]], None]
"""Takes the texts that are being generated, by (number of the strength, number of the prompt)."""
_SHOWN_TOKENS = 64
"""Number of tokens that `side_by_side` generates by default."""
_ROW_TOKENS = 256
"""Number of tokens of a row whose embeddings alone are read."""
_BATCH_TOKENS = 4096
"""Number of tokens in one batch: rows with their padding, and the tokens that may be generated."""
_BYTES_PER_CHARACTER = 4
"""A tokenizer of bytes may need a token for each byte of a character."""
_BEFORE_STOP = 16
"""Tokens in front of a stop text that are decoded with it."""


class Generation(NamedTuple):
    """One continuation of a prompt."""

    text: str
    num_tokens: int
    """Number of generated tokens, including the one that ends the text and those after a stop text."""
    finished: bool
    """True if the model ended the text or a stop text occurred; False if it was cut at `max_new_tokens`."""
    too_long: bool = False
    """True if prompt and continuation do not fit into the model's context, so that nothing was generated."""


class TokenLogProbs(NamedTuple):
    """Log-probabilities of tokens 1..T-1 of one row; the first token has none, since nothing predicts it."""

    log_prob: list[float]
    """Log-probability of each token, in nats."""
    roles: list[int]
    """Role of each token."""
    in_response: list[bool]
    """Whether each token belongs to the response."""
    too_long: bool = False
    """True if the row does not fit into the model's context; the lists are then empty."""


@dataclass
class SteeredModel(Steered):
    """A language model, its encoder and the patches attached to it."""

    model: PreTrainedModel
    encoder: Encoder
    batch_tokens: int = _BATCH_TOKENS
    """Number of tokens in one batch of rows that are read, padding and the tokens that may be generated included. As many rows
    are continued at once as the memory has room for (steered/continuing.py)."""

    def __post_init__(self) -> None:
        self.model.eval()
        # `reads_padding` runs the model once and remembers the answer; it needs the model without patches, so it is called now.
        models.reads_padding(self.model)
        super().__post_init__()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(models.layer_names(self.model))

    @property
    def max_tokens(self) -> float:
        """Number of tokens in the model's context; infinity if it has no limit."""
        return models.max_positions(self.model)

    def fits(self, conversations: Sequence[Conversation], longest: float = math.inf) -> list[bool]:
        """Return for each conversation whether it has at most `longest` tokens and fits into the model's context."""
        return [len(row) <= min(longest, self.max_tokens) for row in self.encoder.encode_all(conversations)]

    @property
    def device(self) -> torch.device:
        """Device of the input embedding."""
        return next(models.embedding(self.model).parameters()).device

    def answer(self, instruction: str, data: str = "", *, max_new_tokens: int = 128, strength: float = 1.0) -> str:
        """Answer one instruction about some data, with greedy decoding."""
        prompt = self.encoder.conversation(instruction, data)
        return self.generate([prompt], max_new_tokens=max_new_tokens, strengths=(strength,))[0][0].text

    def side_by_side(self, request: Asked, watch: Callable[[Shown], None] | None = None) -> Shown:
        """Continue a prompt at several strengths."""
        told = None if watch is None else lambda shown: watch(shown[0])
        return self.each_side_by_side([request], told)[0]

    def each_side_by_side(self, requests: Sequence[Asked], watch: Callable[[list[Shown]], None] | None = None) -> list[Shown]:
        """Continue the prompts of requests that differ by prompt and data alone, in common batches."""
        first = requests[0]
        for request in requests:
            request.check("a language model", "data", "max_new_tokens", *SAMPLING_OPTIONS)
        num = first.samples or 1
        # Sample by sample, not prompt by prompt: the first sample of a prompt is then the one that it gets with one sample.
        prompts = [self.encoder.conversation(r.prompt, r.data or "") for _ in range(num) for r in requests]
        shown = [[[""] * num for _ in first.strengths] for _ in requests]

        def put(texts: Mapping[tuple[int, int], str]) -> list[Shown]:
            for (strength, prompt), text in texts.items():
                sample, request = divmod(prompt, len(requests))
                shown[request][strength][sample] = text
            of_requests = [zip(first.strengths, texts_of, strict=True) for texts_of in shown]
            return [Shown([(s, text) for s, samples in of_one for text in samples], {}) for of_one in of_requests]

        outputs = self.generate(
            prompts,
            max_new_tokens=first.max_new_tokens or _SHOWN_TOKENS,
            temperature=first.temperature or 0.0,
            top_p=1.0 if first.top_p is None else first.top_p,
            top_k=first.top_k or 0,
            min_p=first.min_p or 0.0,
            seed=first.seed or 0,
            strengths=first.strengths,
            watch=None if watch is None else lambda texts: watch(put(texts)),
        )
        return put({(s, p): output.text for s, row in enumerate(outputs) for p, output in enumerate(row)})

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities (nats) of the tokens of a few fixed conversations, (T-1,) each."""
        prompts = [self.encoder.conversation(instruction, data) for instruction, data in _PROBES]
        # Models with a context of a few dozen tokens are compared by the shorter ones.
        limit = models.max_positions(self.model)
        fitting = [p for p, row in zip(prompts, self.encoder.encode_all(prompts), strict=True) if len(row) <= limit]
        return [torch.tensor(scored.log_prob) for scored in self.token_log_probs(fitting, strength=strength)]

    def probe_alone(self, strength: float) -> None:
        """Run the conversations of `probe` one at a time, without padding, for hooks that read every token."""
        prompts = [self.encoder.conversation(instruction, data) for instruction, data in _PROBES]
        for prompt, fits in zip(prompts, self.fits(prompts), strict=True):
            if fits:
                self.token_log_probs([prompt], strength=strength)

    @property
    def tolerance(self) -> float:
        """Nats, for bfloat16 as well: log-probabilities are computed in float32."""
        return 1e-2

    def save_model(self, directory: Path) -> None:
        """Write the model and its tokenizer as transformers does."""
        if self.model.generation_config is not None:
            # With all tokens that end a turn here, so that plain transformers stops at the same tokens.
            self.model.generation_config.eos_token_id = sorted(self.end_ids)
        models.save_model(self.model, self.encoder.tokenizer, directory)

    def loading_lines(self, directory: Path) -> str:
        """Return Python code that loads the checkpoint of `save_model` with transformers."""
        kind = "AutoModelForCausalLM"
        return f"from transformers import {kind}\nmodel = {kind}.from_pretrained({str(directory)!r})"

    def asking_line(self, strength: float = 1.0) -> str:
        """Return Python code that answers an instruction with `model`."""
        return f"print(model.answer('instruction', 'data', strength={strength:g}))"

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        strengths: Sequence[float] = (1.0,),
        stop: Sequence[str] = (),
        skip_long: bool = False,
        watch: Watch | None = None,
    ) -> list[list[Generation]]:
        """Continue every prompt at every strength.

        Args:
            prompts: The prompts.
            max_new_tokens: Number of tokens at which a continuation is cut.
            temperature: Sampling temperature; 0 for greedy decoding.
            top_p: Nucleus sampling (Holtzman et al., https://arxiv.org/abs/1904.09751): sample from the most likely tokens
                whose probabilities reach this sum, including the token that crosses it.
            top_k: Number of likeliest tokens that can be sampled; 0 for all. All filters: steered/sampling.py.
            min_p: Least probability of a token that can be sampled, relative to the likeliest one's; 0 for all.
            repetition_penalty: Factor against tokens that occurred before (Keskar et al., https://arxiv.org/abs/1909.05858,
                section 4.1); 1 for none.
            seed: Seed of sampling.
            strengths: Strengths of the newest patch.
            stop: Texts at which a continuation ends; they are not part of it.
            skip_long: Whether a prompt that does not fit into the context gets an empty continuation, marked `too_long`.
            watch: Called after every token of a batch with the texts so far, by (number of the strength, number of the prompt).

        Returns:
            The continuations, indexed [strength][prompt].

        Raises:
            ValueError: a prompt and its continuation do not fit into the model's context, and `skip_long` is False.
        """
        self.check_strengths(strengths)
        encoded = list(self.encoder.encode_all(prompts, continued=True))
        fitting = self._fitting(encoded, max_new_tokens, skip_long)
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
        # By the prompt's number in the call, not by its row in a batch: its random numbers are the same for all strengths,
        # whatever else is in the batch.
        drawn_PN = uniforms(fitting, max_new_tokens, seed) if temperature and fitting else [None] * len(fitting)
        # Prompts outside: rows of equal length, the strengths of one prompt, then meet in one batch without padding.
        waiting = [
            Waiting((s, p), encoded[p], strength, drawn_N)
            for p, drawn_N in zip(fitting, drawn_PN, strict=True)
            for s, strength in enumerate(strengths)
        ]
        results: dict[tuple[int, int], Generation] = {}
        ends = partial(self._ends, self.end_ids, stop)
        tell = None if watch is None else self._teller(watch, stop)
        for group, mixes in self._groups(waiting, max_new_tokens):
            room = Room(max_new_tokens, self.batch_tokens, mixes)
            for one, ids in continued(group, self._prefilled, room, sampling, ends, tell):
                results[one.job] = self._finish(ids, stop)
                self.progress(len(results), len(waiting))
        unread = Generation("", 0, False, too_long=True)
        return [[results.get((s, p), unread) for p in range(len(encoded))] for s in range(len(strengths))]

    @torch.inference_mode()
    def token_log_probs(
        self, conversations: Sequence[Conversation], *, strength: float = 1.0, skip_long: bool = False
    ) -> list[TokenLogProbs]:
        """Return the log-probabilities of the tokens of complete conversations under the patched model.

        Raises:
            ValueError: a conversation does not fit into the model's context; with `skip_long` it is marked `too_long` instead.
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
                # Padding lies on the right, so the first T - 1 scores are those of the row.
                length = len(encoded[i]) - 1
                results[i] = TokenLogProbs(
                    log_probs_BT[row, :length].tolist(), encoded[i].roles[1:], encoded[i].in_response[1:]
                )
            self.progress(len(results), len(fitting))
        unread = TokenLogProbs([], [], [], too_long=True)
        return [results.get(i, unread) for i in range(len(encoded))]

    def batches(self, rows: Sequence[Row], loss_on: str = "all") -> Iterator[tuple[list[int], Batch]]:
        """Yield padded batches of complete rows on the model's device, each with the numbers of its rows; the longest first.

        Args:
            rows: Conversations, or pairs of them.
            loss_on: Tokens that get labels: "all" or "response".

        Raises:
            ValueError: a row does not fit into the model's context.
        """
        self._fitting(rows, 0, skip_long=False)
        # Beyond a length, some rotary embeddings (dynamic, longrope) depend on the longest row of the batch. Such rows share a
        # batch only with rows of the same length, so that a row's scores do not depend on its batch.
        alike = models.alike_up_to(self.model)
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(len(row) * (len(row) > alike), []).append(number)
        size = lambda i: len(rows[i]) * len(rows[i].sequences)  # noqa: E731
        for chunk in (chunk for length in sorted(groups, reverse=True) for chunk in self._chunks(groups[length], size)):
            yield chunk, collate([rows[i] for i in chunk], self.encoder.pad_id, loss_on=loss_on).to(self.device)

    @torch.inference_mode()
    def logits(self, batch: Batch, strength: float, only: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the logits of a batch at one strength.

        Args:
            batch: The rows.
            strength: Strength of the newest patch.
            only: Rows and positions, (N,) both, whose logits are computed; None for all.

        Returns:
            Logits (B, T, V), or (1, N, V) with `only`.
        """
        strengths = self._strengths(torch.full((len(batch.labels),), strength))
        return self.model(**batch.patched_inputs, strengths=strengths, only=only, use_cache=False).logits

    @torch.inference_mode()
    def hidden_states(
        self, conversations: Sequence[Conversation], *, strength: float = 1.0
    ) -> Iterator[tuple[Tensor, Encoded]]:
        """Yield the hidden states of each conversation: the output of the embedding and of every layer, with patches.

        Yields:
            Hidden states (L+1, T, D) in float32 on the CPU, and the encoded conversation.

        Raises:
            ValueError: a conversation does not fit into the model's context.
        """
        self.check_strengths((strength,))
        # Read by hooks, not by transformers' `output_hidden_states`, whose last entry is the output of the final norm.
        embedding = next(n for n, m in self.model.named_modules() if m is models.embedding(self.model))
        names = [embedding, *models.layer_names(self.model)]
        reader = taps.Reader(self.model, [taps.Tap(name) for name in names])
        try:
            # One conversation at a time: all layers' states of a batch would fill the memory.
            for row in self.encoder.encode_all(conversations):
                self._fitting([row], 0, skip_long=False)
                batch = collate([row], self.encoder.pad_id).to(self.device)
                outputs = reader(**batch.patched_inputs, strengths=self._strengths(torch.full((1,), strength)))
                yield torch.stack([outputs[name][0].float().cpu() for name in names]), row
        finally:
            reader.close()

    @torch.inference_mode()
    def embeddings(self, ids: Sequence[int], role: int, *, strength: float = 1.0) -> Tensor:
        """Return the input embeddings of tokens that all have one role, with patches: (N, D) in float32 on the CPU."""
        self.check_strengths((strength,))
        name = next(n for n, m in self.model.named_modules() if m is models.embedding(self.model))
        reader = taps.Reader(self.model, [taps.Tap(name)])
        parts: list[Tensor] = []
        try:
            # The whole model is called, since patches act within its call; it ends after the embedding.
            for start in range(0, len(ids), size := int(min(self.max_tokens, _ROW_TOKENS))):
                row = list(ids[start : start + size])
                encoded = Encoded(row, [role] * len(row), [False] * len(row), [0] * len(row))
                batch = collate([encoded], self.encoder.pad_id).to(self.device)
                outputs = reader(**batch.patched_inputs, strengths=self._strengths(torch.full((1,), strength)))
                parts.append(outputs[name][0].float().cpu())
        finally:
            reader.close()
        return torch.cat(parts)

    @torch.inference_mode()
    def attention(self, conversations: Sequence[Conversation], *, strength: float = 1.0) -> Iterator[tuple[Tensor, Encoded]]:
        """Yield the attention weights of each conversation, computed by the eager kernel, with patches.

        Yields:
            Weights (L, H, T, T) in float32, where row t holds the weights with which token t attends to each token, and the
            encoded conversation.

        Raises:
            ValueError: the model does not return attention weights for every layer, or a conversation does not fit.
        """
        self.check_strengths((strength,))
        # One conversation at a time: the weights of all layers grow with the square of its length.
        for row in self.encoder.encode_all(conversations):
            self._fitting([row], 0, skip_long=False)
            batch = collate([row], self.encoder.pad_id).to(self.device)
            with models.eager_attention(self.model):
                inputs = {**batch.patched_inputs, "strengths": self._strengths(torch.full((1,), strength))}
                outputs = self.model(**inputs, use_cache=False, output_attentions=True)
            weights = models.attention_weights(self.model, outputs)
            yield torch.stack([weights_1HTT[0].float() for weights_1HTT in weights]), row

    def prefill(self, batch: Batch, strength_B: Tensor) -> Decoding:
        """Read a batch of prompts, padded on the left, and return the state from which they are continued.

        Raises:
            ValueError: the batch has padding, which this model would read as text.
        """
        # Models that take no positions or masks, such as recurrent ones.
        if not models.reads_padding(self.model) and not bool(batch.attention_mask.all()):
            raise ValueError(f"{type(self.model).__name__} takes no positions: it reads rows of one length at a time")
        written = {"roles": self.encoder.response_role_id, "phases": GENERATION}
        return Decoding(self.model, batch.patched_inputs, written, strength_B, self._strengths)

    def _prefilled(self, waiting: list[Waiting]) -> Decoding:
        # Padded on the left, so that the last token of every row is in the last column, from which the next one is predicted.
        batch = collate([one.row for one in waiting], self.encoder.pad_id, side="left").to(self.device)
        return self.prefill(batch, torch.tensor([one.strength for one in waiting]))

    def _teller(self, watch: Watch, stop: Sequence[str]) -> Callable[[Mapping[tuple[int, int], list[int]]], None]:
        """Return a function that turns the tokens of a batch so far into texts and hands them to `watch`."""
        return lambda written: watch({job: self._finish(ids, stop).text for job, ids in written.items()})

    @property
    def end_ids(self) -> set[int]:
        """Ids of the tokens that end a text: those of the model's generation config, and the end of a turn."""
        ids: Any = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = ids if isinstance(ids, list) else [ids]
        return {int(i) for i in listed if i is not None} | self.encoder.end_ids

    def _ends(self, end_ids: set[int], stop: Sequence[str], ids: list[int]) -> bool:
        """Return whether the last token of a continuation ends it."""
        return ids[-1] in end_ids or (bool(stop) and self._stopped(ids, stop))

    def _stopped(self, ids: list[int], stop: Sequence[str]) -> bool:
        # On the decoded text, because a stop text may be divided into tokens in several ways. On its tail, because only the
        # last token is new: decoding everything for every token would cost the square of the length.
        tail = ids[-_BYTES_PER_CHARACTER * max(map(len, stop)) - _BEFORE_STOP :]
        if not any(text in self.encoder.decode(tail) for text in stop):
            return False
        # The first token of a tail may be decoded without the space in front of it.
        return len(tail) == len(ids) or any(text in self.encoder.decode(ids) for text in stop)

    def _finish(self, ids: list[int], stop: Sequence[str]) -> Generation:
        text = self.encoder.decode(ids)
        # Cut at the first of the stop texts; a token may hold its beginning and more text after it.
        ends = [text.find(s) for s in stop if s in text]
        finished = bool(ends) or (bool(ids) and ids[-1] in self.end_ids)
        return Generation(text[: min(ends)] if ends else text, len(ids), finished)

    def _groups(self, waiting: Sequence[Waiting], more: int) -> Iterator[tuple[list[Waiting], bool]]:
        """Yield prompts that may share a batch, and whether their lengths may differ; they become longer by `more` tokens."""
        # A model that cannot read padding needs prompts of one length; others do beyond the length explained in `batches`.
        together = models.alike_up_to(self.model) if models.reads_padding(self.model) else 0
        groups: dict[tuple[float, int], list[Waiting]] = {}
        for one in waiting:
            length = len(one.row)
            groups.setdefault((self._shared(one.strength), length * (length + more > together)), []).append(one)
        for key in sorted(groups):
            yield groups[key], not key[1]

    def _shared(self, strength: float) -> float:
        """Return a number that is the same for strengths at which rows may share a batch."""
        kind = self.patches[-1].kind if self.patches else None
        # A patch of the weights has one strength in a call of the model; other patches take one for each row.
        if kind == "weight":
            return strength
        # A reward model does not read rows at strength 0, so that its cache would fall behind that of the model.
        return float(kind == "reward" and strength == 0)

    def _chunks(self, items: list[_T], length: Callable[[_T], int]) -> Iterator[list[_T]]:
        """Yield groups of items of similar length, the longest first, so that a padded batch has at most `batch_tokens`."""
        # The longest first: a batch that is too large for the memory fails at the start and not after an hour.
        chunk: list[_T] = []
        for item in sorted(items, key=length, reverse=True):
            # Padded to the longest row, which is the first. A row longer than `batch_tokens` is a batch alone.
            if chunk and (len(chunk) + 1) * length(chunk[0]) > self.batch_tokens:
                yield chunk
                chunk = []
            chunk.append(item)
        if chunk:
            yield chunk

    def in_common(self, prompts: Sequence[int], more: Sequence[int], strengths: Sequence[float], limit: int) -> list[int]:
        """Return the numbers of the rows that can be continued in one batch with the first one, at most `limit`.

        Args:
            prompts: Number of tokens of each prompt.
            more: Number of tokens by which each may become longer.
            strengths: Strength of the newest patch in each row.
            limit: Number of rows at most.
        """
        together = models.alike_up_to(self.model) if models.reads_padding(self.model) else 0
        chosen = [0]
        for number in range(1, len(prompts)):
            inside = (*chosen, number)
            longest = max(prompts[i] for i in inside) + max(more[i] for i in inside)
            fits = len(inside) <= limit and len(inside) * longest <= self.batch_tokens
            alike = longest <= together or prompts[number] == prompts[0]
            if fits and alike and self._shared(strengths[number]) == self._shared(strengths[0]):
                chosen.append(number)
        return chosen

    def _fitting(self, rows: Sequence[Row], max_new_tokens: int, skip_long: bool) -> list[int]:
        """Return the numbers of the rows that fit into the model's context.

        Raises:
            ValueError: a row does not fit, and `skip_long` is False.
        """
        # Prompt and new tokens together: beyond its context a model does not fail but writes nonsense.
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
    """Return log p(ids) in nats, (B, T), in float32."""
    # Row by row: a float32 copy of all logits would need twice the memory of those in bfloat16.
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
    inverse: bool = False,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
    patch: str | Path | Sequence[str | Path] = (),
) -> SteeredModel | SteeredPipeline:
    """Load a model with its patches from an artifact, an exported folder or a plain checkpoint.

    Args:
        directory: The artifact, folder or checkpoint.
        dtype: "float32" or "bfloat16"; None for the type in which the model was saved, or float32 for a plain checkpoint.
        attention: Attention implementation of transformers.
        device: Device of model and patches: auto (a GPU if torch can use one), cpu, cuda, cuda:1.
        prompt: Prompt settings of a plain checkpoint, which has none of its own (the fields of `SavedPrompt`).
        snapshot: Training step after which the patch was saved; None for the patch at the end of the training.
        inverse: Load the inverse of the newest patch, which induces what its maps remove.
        sampler: How a pipeline draws (the fields of `SamplerConfig`); None for the settings with which it was made.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        patch: Control vector (.gguf), folder of a PEFT adapter, or folder of a saved patch, which is added to the model's own
            patches; several in a list, of which the strength scales the last.

    Returns:
        A `SteeredModel` for a language model, a `SteeredPipeline` for a diffusion model.

    Raises:
        ValueError: a file of the artifact is damaged or missing, it holds no patch of that snapshot, the patch has no inverse,
            or `patch` does not fit the model.
    """
    where = models.device(device)  # before minutes of loading
    model, encoder, stack = load_stack(
        directory,
        dtype=dtype,
        attention=attention,
        prompt=prompt,
        snapshot=snapshot,
        inverse=inverse,
        sampler=sampler,
        trust_remote_code=trust_remote_code,
    )
    added = (patch,) if isinstance(patch, str | Path) else tuple(patch)
    if added and isinstance(model, Diffusion):
        raise ValueError(f"{added[0]} is a patch for a language model, and {directory} holds a diffusion pipeline")
    stack = (*stack, *(foreign.read(Path(path), model) for path in added))
    # The patches follow when they are attached.
    if isinstance(model, Diffusion):
        return SteeredPipeline(model.to(where), encoder, stack)
    return SteeredModel(model.to(where), encoder, stack)
