"""A loaded model in Python: generate, draw and extract activations, with patches that act within a `with` block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steerlab import models
from steerlab.activations import part_writing, reading
from steerlab.inputs.tokens import Encoded
from steerlab.interactive.model_origin import Origin
from steerlab.interactive.outputs import Activations, Images, Text, Texts
from steerlab.interactive.prompts import Prompt, asked
from steerlab.job import ExtractConfig
from steerlab.stages import extract
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel
from steerlab.storage.bases import PROMPT

if TYPE_CHECKING:
    from PIL import Image

    from steerlab.interactive.patch import Patch
    from steerlab.patches import SavedPatch

Tokens = Literal["last", "mean", "max", "min", "median", "all"]
"""Tokens whose activations are returned: the last one, all of them, or their mean as one vector."""


@dataclass
class Model:
    """A loaded model with its patches. `load` returns one.

    All attributes of `steered` are available too: `token_log_probs`, `hidden_states`, `attention` and others.
    """

    steered: SteeredModel | SteeredPipeline
    """The model that tasks use: scores of tokens, hidden states, attention."""
    origin: Origin
    strength: float = 1.0
    """Strength of the newest patch if a call gives none; for a run the strength that it reported."""
    num_own: int = 0
    """Number of patches with which the model was loaded."""

    @property
    def language(self) -> SteeredModel:
        """The language model. Raises ValueError for a model that draws."""
        if not isinstance(self.steered, SteeredModel):
            raise ValueError("this model draws images and does not process texts: use draw")
        return self.steered

    @property
    def drawing(self) -> SteeredPipeline:
        """The pipeline. Raises ValueError for a language model."""
        if not isinstance(self.steered, SteeredPipeline):
            raise ValueError("this model generates texts and does not draw: use generate")
        return self.steered

    @property
    def modules(self) -> list[str]:
        """Paths of the modules whose activations can be extracted and steered."""
        return [name for name, _ in self.steered.model.named_modules() if name]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model without its patches, by which a patch recognises its model."""
        self.steered.detach()
        try:
            return models.fingerprint(self.steered.model)
        finally:
            self.steered.attach()

    @contextmanager
    def patched(self, patch: Patch, *, strength: float = 1.0) -> Iterator[Model]:
        """Attach a patch to the model until the end of the `with` block; nested blocks add patches.

        Args:
            patch: From `fit` or `load_patch`.
            strength: Strength of the patch: 0 is the model without it, 1 the patch as it was fitted.

        Raises:
            ValueError: the patch is for another model, or comes with trained weights.
        """
        saved = patch.on(self)
        steered, before = self.steered, (self.steered.patches, self.steered.settled, self.strength)
        newest = (before[2],) if steered.patches else ()
        older = steered.settled or (1.0,) * max(0, len(steered.patches) - 1)
        self._restack((*steered.patches, saved.to(steered.device)), (*older, *newest), strength)
        try:
            yield self
        finally:
            self._restack(*before)

    def _restack(self, stack: tuple[SavedPatch, ...], settled: tuple[float, ...], strength: float) -> None:
        self.steered.detach()
        self.steered.patches, self.steered.settled, self.strength = stack, settled, strength
        self.steered.attach()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        strengths: float | Sequence[float] | None = None,
        samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Texts:
        """Continue prompts, in batches.

        Args:
            prompts: Texts, pairs (instruction, data), or chats as lists of messages.
            max_new_tokens: Largest number of tokens of a continuation.
            strengths: Strengths of the newest patch, one or several; None for that of the `patched` block.
            samples: Continuations of each prompt; more than one needs a temperature.
            temperature: Sampling temperature; 0 for greedy decoding.
            top_p: Probability of the nucleus from which tokens are sampled.
            top_k: Number of likeliest tokens from which to sample; 0 for all.
            min_p: Least probability, relative to the likeliest token's; 0 for all.
            repetition_penalty: Factor against tokens that occurred before; 1 for none.
            seed: Seed of sampling.
            stop: Texts at which a continuation ends.

        Raises:
            ValueError: a prompt has none of these forms, or a prompt and its continuation do not fit into the model's context.
        """
        model, given = self.language, asked(self.language.encoder, prompts)
        chosen = self._strengths(strengths)
        if samples < 1 or (samples > 1 and not temperature):
            raise ValueError(f"samples {samples}: give at least 1; several samples need a temperature above 0")
        # Ordered by sample, as in `steerlab generate`, so the first sample of a prompt is the same as with `samples=1`.
        outputs = model.generate(
            [one.conversation for _ in range(samples) for one in given],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            strengths=chosen,
            stop=stop,
        )
        rows = []
        for strength, of_strength in zip(chosen, outputs, strict=True):
            for number, one in enumerate(given):
                for sample in range(samples):
                    written = of_strength[sample * len(given) + number]
                    rows.append(Text(one.prompt, one.data, strength, sample, *written[:3]))
        return Texts(rows)

    def _strengths(self, strengths: float | Sequence[float] | None) -> tuple[float, ...]:
        if strengths is None:
            return (self.strength,)
        return (float(strengths),) if isinstance(strengths, int | float) else tuple(map(float, strengths))

    def answer(self, instruction: str, data: str = "", *, max_new_tokens: int = 128, strength: float | None = None) -> str:
        """Answer one instruction about some data, with greedy decoding."""
        prompt = (instruction, data) if data else instruction
        return self.generate([prompt], max_new_tokens=max_new_tokens, strengths=strength)[0]

    def read(
        self,
        texts: str | Sequence[Prompt],
        *,
        modules: str | Sequence[str],
        tokens: Tokens = "last",
        side: Literal["output", "input"] = "output",
        strength: float | None = None,
        max_tokens: int = 512,
        batch_tokens: int = 4096,
    ) -> Activations:
        """Extract activations of modules on texts, as the `extract` stage of a job does.

        Args:
            texts: Plain texts, which get no chat template; pairs (instruction, data) and chats are prompts.
            modules: Regular expression that matches whole paths of modules, or several.
            tokens: Tokens whose activations are returned.
            side: Whether outputs or inputs of the modules are extracted.
            strength: Strength of the newest patch; None for that of the `patched` block.
            max_tokens: Largest number of tokens of a text; longer ones are truncated.
            batch_tokens: Largest number of tokens in one forward pass.

        Raises:
            ValueError: no module matches, or a text is empty or does not fit into the model's context.
        """
        model = self.language
        texts = [texts] if isinstance(texts, str) else texts
        pooling = ("none",) if tokens == "all" else (tokens,)
        # The config is validated from a mapping, as in a job, so that a list of expressions is accepted.
        config = ExtractConfig.model_validate(
            {"select": {"modules": modules, "side": side}, "pooling": pooling, "max_tokens": max_tokens,
             "batch_tokens": batch_tokens}
        )  # fmt: skip
        reader = reading.TextReader(model, config, strength=self.strength if strength is None else strength)
        try:
            encoded = [self._encoded(reader, text, number, max_tokens) for number, text in enumerate(texts)]
            vectors = reading.in_order([part.cpu() for part in reader.read(encoded)])
            widths, about = reader.widths, reading.about_model(model, config)
        finally:
            reader.close()
        schema = part_writing.schema(widths, config.dtype, tokens == "all", about)
        rows: list[dict[str, object]] = [{"text": t} if isinstance(t, str) else {"messages": t} for t in texts]
        return Activations(vectors.values, extract.table(vectors, rows, "", schema))

    def _encoded(self, reader: reading.TextReader, text: Prompt, number: int, max_tokens: int) -> Encoded:
        """Return the tokens of a plain text, or of a prompt in its template. Raises ValueError for an empty text."""
        if isinstance(text, str):
            if not text.strip():
                raise ValueError(f"text {number} is empty")
            (encoded,), _ = reader.encode([{"text": text}], "text", number)
            return encoded
        (one,) = asked(self.language.encoder, [text])
        return self.language.encoder.encode(one.conversation, continued=True).cut(max_tokens)

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        strengths: float | Sequence[float] | None = None,
        guidance: float | None = None,
        steps: int | None = None,
    ) -> Images:
        """Draw prompts, each from the noise of one seed.

        Args:
            prompts: The prompts.
            seed: Seed of the noise; images with the same seed differ only by prompt and strength.
            strengths: Strengths of the newest patch, one or several; None for that of the `patched` block.
            guidance: Scale of classifier-free guidance; None for the sampler's.
            steps: Denoising steps; None for the sampler's.
        """
        listed, chosen = [prompts] if isinstance(prompts, str) else list(prompts), self._strengths(strengths)
        drawings = [self.drawing.encoder.from_row({"text": prompt, "seed": seed}, "text") for prompt in listed]
        images = self.drawing.draw(drawings, strengths=chosen, guidance=guidance, steps=steps)
        return Images(images, chosen, tuple(listed))

    def picture(
        self, prompt: str, *, seed: int = 0, strength: float | None = None, guidance: float | None = None
    ) -> Image.Image:
        """Draw one image."""
        return self.draw(prompt, seed=seed, strengths=strength, guidance=guidance)[0]

    def save(self, directory: str | Path) -> Path:
        """Write the model as a checkpoint of transformers or diffusers, with its prompt settings.

        Raises:
            ValueError: the folder exists, or the model has patches, which `Patch.fold` can merge.
        """
        path = Path(directory)
        if path.exists():
            raise ValueError(f"{path} exists already; name a new folder")
        if self.steered.patches:
            raise ValueError("the model has patches, which a checkpoint cannot hold: fold them, or save them by Patch.save")
        # The hooks are detached, so that the plain model is saved.
        self.steered.detach()
        try:
            self.steered.save_model(path)
        finally:
            self.steered.attach()
        (path / PROMPT).write_text(json.dumps(self.steered.encoder.saved_spec))
        return path

    def __getattr__(self, name: str) -> Any:
        # Python calls this for missing attributes. While an object is copied, `steered` itself is missing; looking it up would
        # call this function again without end.
        if name == "steered":
            raise AttributeError(name)
        return getattr(self.steered, name)

    def __repr__(self) -> str:
        architecture = type(self.steered.model).__name__
        stack = ", ".join(patch.kind for patch in self.steered.patches)
        return f"Model({architecture} from {self.origin.path}{f', patches: {stack}' if stack else ''})"
