"""A language model with its patches: it generates text, scores texts and returns internal values.

Decoding is batched and cached. Each call of the model gets the role of every token, so that patches which depend on roles act
on the prompt and in each decoding step. Each prompt has a random generator of its own, so that its continuation depends on the
rest of the batch only by rounding.

Axes besides those of tokens.py: S strengths, N chosen tokens, H attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerlab import models
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import GENERATION, Batch, Conversation, Encoded, Row, collate
from steerlab.patches import SavedPatch
from steerlab.steered import batching, fixed_probe, internals, shown_texts, token_scores
from steerlab.steered.batching import Size
from steerlab.steered.continuing import continue_prompts
from steerlab.steered.generated_text import Ends, Generation
from steerlab.steered.model import Asked, Shown, Steered
from steerlab.steered.prefilled import Decoding
from steerlab.steered.prompt_queue import Capacity, Key, Listed, Waiting
from steerlab.steered.sampling import Sampling, uniforms
from steerlab.steered.token_scores import TokenLogProbs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Watch = Callable[[Mapping[tuple[int, int], str]], None]
"""Takes the texts that are being generated, by (number of the strength, number of the prompt)."""
_BATCH_TOKENS = 4096
"""Number of tokens in one batch: rows with their padding, and the tokens that may be generated."""


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
        """Continue the prompts of requests that differ only by prompt and data, in common batches."""
        return shown_texts.side_by_side(self, requests, watch)

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities (nats) of the tokens of a few fixed conversations, (T-1,) each."""
        prompts = fixed_probe.conversations(self.encoder)
        # Models with a context of a few dozen tokens are compared by the shorter ones.
        limit = models.max_positions(self.model)
        fitting = [p for p, row in zip(prompts, self.encoder.encode_all(prompts), strict=True) if len(row) <= limit]
        return [torch.tensor(scored.log_prob) for scored in self.token_log_probs(fitting, strength=strength)]

    def probe_alone(self, strength: float) -> None:
        """Run the conversations of `probe` one at a time, without padding, for hooks that read every token."""
        prompts = fixed_probe.conversations(self.encoder)
        for prompt, fits in zip(prompts, self.fits(prompts), strict=True):
            if fits:
                self.token_log_probs([prompt], strength=strength)

    @property
    def tolerance(self) -> float:
        """Nats, also for bfloat16, because log-probabilities are computed in float32."""
        return 1e-2

    def save_model(self, directory: Path) -> None:
        """Write the model and its tokenizer as transformers does."""
        if self.model.generation_config is not None:
            # The config gets all tokens that end a turn, so that plain transformers stops at the same tokens.
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
        fitting = batching.fitting(encoded, max_new_tokens, self.max_tokens, skip_long=skip_long)
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
        # The prompt's number in the call decides, not its row in a batch, so that all strengths get the same random numbers.
        drawn_PN = uniforms(fitting, max_new_tokens, seed) if temperature and fitting else [None] * len(fitting)
        # The loop over prompts is outside, so that the strengths of one prompt share a batch without padding.
        waiting = [
            Waiting((s, p), encoded[p], strength, drawn_N, sampling, max_new_tokens)
            for p, drawn_N in zip(fitting, drawn_PN, strict=True)
            for s, strength in enumerate(strengths)
        ]
        results: dict[tuple[int, int], Generation] = {}
        ends = Ends(self.encoder, self.end_ids, stop)
        tell = None if watch is None else lambda steps: watch({step.row.key: ends.cut(step.written).text for step in steps})
        for group, mixes in batching.groups(self.model, self._newest, waiting, max_new_tokens):
            capacity = Capacity(self.batch_tokens, mixes)
            queue = Listed(group, capacity)
            for one, ids in continue_prompts(queue, self.read_prompts, capacity, lambda _, ids: ends.reached(ids), tell):
                results[one.key] = ends.cut(ids)
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
        return token_scores.of_conversations(self, conversations, strength, skip_long)

    def batches(self, rows: Sequence[Row], loss_on: str = "all") -> Iterator[tuple[list[int], Batch]]:
        """Yield padded batches of complete rows on the model's device, each with the numbers of its rows; the longest first.

        Args:
            rows: Conversations, or pairs of them.
            loss_on: Tokens that get labels: "all" or "response".

        Raises:
            ValueError: a row does not fit into the model's context.
        """
        batching.fitting(rows, 0, self.max_tokens, skip_long=False)
        for chunk in batching.chunks(self.model, rows, self.batch_tokens):
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

    def hidden_states(
        self, conversations: Sequence[Conversation], *, strength: float = 1.0
    ) -> Iterator[tuple[Tensor, Encoded]]:
        """Yield the hidden states of each conversation: the output of the embedding and of every layer, with patches.

        Yields:
            Hidden states (L+1, T, D) in float32 on the CPU, and the encoded conversation.

        Raises:
            ValueError: a conversation does not fit into the model's context.
        """
        return internals.hidden_states(self, conversations, strength)

    def embeddings(self, ids: Sequence[int], role: int, *, strength: float = 1.0) -> Tensor:
        """Return the input embeddings of tokens that all have one role, with patches: (N, D) in float32 on the CPU."""
        self.check_strengths((strength,))
        return internals.embeddings(self, ids, role, strength)

    def attention(self, conversations: Sequence[Conversation], *, strength: float = 1.0) -> Iterator[tuple[Tensor, Encoded]]:
        """Yield the attention weights of each conversation, computed by the eager kernel, with patches.

        Yields:
            Weights (L, H, T, T) in float32, row t those with which token t attends to each token; the encoded conversation.

        Raises:
            ValueError: the model does not return attention weights for every layer, or a conversation does not fit.
        """
        return internals.attention(self, conversations, strength)

    def prefill(self, batch: Batch, strength_B: Tensor) -> Decoding:
        """Read a batch of prompts, padded on the left, and return the state from which they are continued.

        Raises:
            ValueError: the batch has padding, which this model would read as text.
        """
        # Some models accept no positions or masks, such as recurrent ones.
        if not models.reads_padding(self.model) and not bool(batch.attention_mask.all()):
            raise ValueError(f"{type(self.model).__name__} takes no positions: its batches need rows of one length")
        written = {"roles": self.encoder.response_role_id, "phases": GENERATION}
        return Decoding(self.model, batch.patched_inputs, written, strength_B, self._strengths)

    def read_prompts(self, waiting: Sequence[Waiting[Key]]) -> Decoding:
        """Read prompts as one batch, and return the state from which they are continued."""
        # Padded on the left, the batch has the last token of every row in its last column, which predicts the next one.
        batch = collate([one.row for one in waiting], self.encoder.pad_id, side="left").to(self.device)
        return self.prefill(batch, torch.tensor([one.strength for one in waiting]))

    @property
    def end_ids(self) -> set[int]:
        """Ids of the tokens that end a text: those of the model's generation config, and the end of a turn."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = ids if isinstance(ids, list) else [ids]
        return {int(i) for i in listed if i is not None} | self.encoder.end_ids

    def joining(self, running: Sequence[Size], waiting: Sequence[Size], limit: int) -> list[int]:
        """Return the numbers of the waiting rows that can join a batch of running rows, which then has at most `limit`."""
        return batching.joining(self.model, self._newest, running, waiting, limit, self.batch_tokens)

    @property
    def _newest(self) -> SavedPatch | None:
        return self.patches[-1] if self.patches else None
