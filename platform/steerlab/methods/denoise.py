"""Training of a diffusion model: the denoiser learns to tell noise and image apart.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, https://arxiv.org/abs/2006.11239, eq. 14; the
prompt is left out of some rows, so that one model draws with and without it: Ho and Salimans, "Classifier-Free Diffusion
Guidance", https://arxiv.org/abs/2207.12598, algorithm 1. What is predicted is the scheduler's affair: the noise, or the
velocity v = alpha eps - sigma x (Salimans and Ho, "Progressive Distillation", https://arxiv.org/abs/2202.00512, appendix D).

    x_t = alpha_t x + sigma_t eps,   t uniform, eps normal        loss = mean over pixels of |target - predicted|^2

What a row draws (t, eps, whether its prompt is left out) is a function of the seed, the step and the row's number in the data
alone, so that the number of workers changes nothing. The embedded models draw pixels; a pipeline with an autoencoder is
refused. Axes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.inputs.drawings import Drawings
from steerlab.inputs.tokens import Row
from steerlab.job import Job, MethodConfig, Seed
from steerlab.methods.contract import Inputs, Loss, Trained, WholeModel
from steerlab.models import ModelFacts
from steerlab.models.diffusion.pipelines import Diffusion


class Config(MethodConfig):
    """Hyperparameters of denoising training."""

    name: Literal["denoise"] = "denoise"
    """The method."""
    drop_prompt: float = Field(0.1, ge=0, lt=1)
    """Share of rows without their prompt. Ho and Salimans: 0.1 to 0.2."""
    seed: Seed = 0
    """Seed of the noise and the times."""


def _draw(seed: int, step: int, number: int) -> int:
    """Return the seed of a row of a step, in the 64 bits that torch takes."""
    return (((seed * 1_000_003 + step) << 24) + number) % 2**64


class Denoise(WholeModel):
    """A denoiser with its table of words, and its loss."""

    def __init__(self, model: Diffusion, config: Config, inputs: Inputs) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        if model.architecture != "PixelPipeline":
            raise ValueError(f"method denoise trains the embedded models, which draw pixels; this is a {model.architecture}")
        self.config = config
        self._scheduler = model.pipeline.scheduler
        self._step = 0

    def forward(self, batch: Drawings) -> Loss:
        """Return the squared error of each row's prediction, summed over rows, a mean over pixels."""
        assert batch.images is not None, "the data are images"
        x_BCHW = batch.images
        t_B, noise_BCHW, kept_B = self._draws(batch, x_BCHW)
        noisy_BCHW = self._scheduler.add_noise(x_BCHW, noise_BCHW, t_B)
        if self._scheduler.config.prediction_type == "v_prediction":
            target_BCHW = self._scheduler.get_velocity(x_BCHW, noise_BCHW, t_B)
        else:
            target_BCHW = noise_BCHW
        prompts = [prompt if kept else "" for prompt, kept in zip(batch.prompts, kept_B, strict=True)]
        predicted = self.model.denoiser(noisy_BCHW, t_B, **self.model.pipeline.condition(prompts)).sample
        error_B = (predicted.float() - target_BCHW.float()).square().flatten(1).mean(1)
        return Loss(error_B.sum(), {})

    def _draws(self, batch: Drawings, x_BCHW: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
        """Draw times, noise and which prompts stay, each row from a generator of its own."""
        times, noise, kept = [], [], []
        for number in batch.numbers.tolist() or range(len(batch.prompts)):
            generator = torch.Generator().manual_seed(_draw(self.config.seed, self._step, number))
            times.append(int(torch.randint(self._scheduler.config.num_train_timesteps, (), generator=generator)))
            noise.append(torch.randn(x_BCHW.shape[1:], generator=generator))
            kept.append(float(torch.rand((), generator=generator)) >= self.config.drop_prompt)
        t_B = torch.tensor(times, device=x_BCHW.device)
        return t_B, torch.stack(noise).to(x_BCHW), kept

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """One an image."""
        return 1

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Remember the step, of which the noise is a function."""
        self._step = step


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Refuse data that are no images."""
    for role in ("train", "validation"):
        if role in job.data.by_role and job.data.by_role[role].format != "image":
            raise ValueError(f"data.{role}.format {job.data.by_role[role].format}: method {config.name} trains on images")


METHOD = Trained(Config, Denoise, check=check, kinds=("diffusion",))
