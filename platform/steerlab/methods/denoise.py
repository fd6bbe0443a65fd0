"""Training of a diffusion model: the denoiser learns to predict the noise in an image.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, https://arxiv.org/abs/2006.11239, eq. 14.
Ho and Salimans, "Classifier-Free Diffusion Guidance", https://arxiv.org/abs/2207.12598, algorithm 1: some rows train without
their prompt, so that one model predicts with and without it.
Salimans and Ho, "Progressive Distillation", https://arxiv.org/abs/2202.00512, appendix D: the velocity as the target.

    x_t = alpha_t x + sigma_t eps        t uniform, eps standard normal
    target = eps, or the velocity v = alpha_t eps - sigma_t x, depending on the scheduler's `prediction_type`
    loss = mean over pixels of |target - prediction|^2, summed over images

The random draws of a row (t, eps, whether the prompt is dropped) depend only on the seed, the step and the row's number in the
data, so that the number of workers does not change them. Only pipelines that work on pixels are trained, such as the embedded
ones; a pipeline with an autoencoder is refused. Axes: B images, C channels, H and W pixels.
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
    # This is p_uncond of algorithm 1. At 0 the empty prompt is never trained, and guidance would extrapolate from noise.
    drop_prompt: float = Field(0.1, ge=0, lt=1)
    """Share of rows that train without their prompt; 0 keeps every prompt. Ho and Salimans: 0.1 to 0.2."""
    seed: Seed = 0
    """Seed of the noise, the timesteps and the choice of rows without a prompt."""


# The seed depends on the row's number in the data instead of its place in the batch, so that 2 workers with 4 rows draw what 1
# worker with 8 rows draws.
def _row_seed(seed: int, step: int, number: int) -> int:
    """Return the seed of one row in one step."""
    # The row's number has 24 bits; the result is taken modulo 2^64, because torch raises for larger seeds. The factor between
    # seed and step is large, because (seed, step) and (seed + 1, step - 1) would otherwise draw the same noise.
    return (((seed * 1_000_003 + step) << 24) + number) % 2**64


class Denoise(WholeModel):
    """A diffusion pipeline whose denoiser and prompt embeddings train on the denoising loss."""

    def __init__(self, model: Diffusion, config: Config, inputs: Inputs) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        # A pipeline with an autoencoder trains on latents, which this loss does not compute.
        if model.architecture != "PixelPipeline":
            raise ValueError(f"method denoise trains the embedded models, which draw pixels; this is a {model.architecture}")
        self.config = config
        # alpha_t and sigma_t are those of its noise schedule.
        self._scheduler = model.pipeline.scheduler
        # One number per step suffices: the passes of a step have different rows, whose numbers are in their seeds.
        self._step = 0

    def forward(self, batch: Drawings) -> Loss:
        """Return the squared error of the predictions, a mean over pixels and a sum over images (DDPM, eq. 14)."""
        # (B, C, H, W)
        assert batch.images is not None, "the data are images"
        x_BCHW = batch.images
        t_B, noise_BCHW, with_prompt_B = self._draws(batch, x_BCHW)
        # x_t = alpha_t x + sigma_t eps, by the pipeline's own scheduler, whose alphas the sampler will use, too.
        noisy_BCHW = self._scheduler.add_noise(x_BCHW, noise_BCHW, t_B)
        # The target is eps, or v = alpha_t eps - sigma_t x: what this pipeline's sampler expects the denoiser to return. The
        # velocity stays well scaled where alpha_t is near 0 and x_t is nearly pure noise, so that eps says almost nothing about
        # x.
        if self._scheduler.config.prediction_type == "v_prediction":
            target_BCHW = self._scheduler.get_velocity(x_BCHW, noise_BCHW, t_B)
        else:
            target_BCHW = noise_BCHW
        # The empty prompt is the unconditional model of classifier-free guidance.
        prompts = [prompt if has_prompt else "" for prompt, has_prompt in zip(batch.prompts, with_prompt_B, strict=True)]
        # The denoiser is called directly: the loss is that of one timestep, and the pipeline's call would sample all of them.
        # The result is eps or v, (B, C, H, W).
        predicted = self.model.denoiser(noisy_BCHW, t_B, **self.model.pipeline.condition(prompts)).sample
        # The error is computed in float32, because squares of small errors underflow in half precision. It is a mean over
        # pixels, so that an image of any size counts 1, as `counts` returns.
        error_B = (predicted.float() - target_BCHW.float()).square().flatten(1).mean(1)
        # The loop divides the sum over (B,) by the number of images of the whole step.
        return Loss(error_B.sum(), {})

    def _draws(self, batch: Drawings, x_BCHW: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
        """Draw the timestep and the noise of each row, and whether it keeps its prompt."""
        times, noise, with_prompt = [], [], []
        for number in batch.numbers.tolist() or range(len(batch.prompts)):
            # Each row has its own generator on the CPU: the draws depend neither on the other rows of the pass nor on the
            # device.
            generator = torch.Generator().manual_seed(_row_seed(self.config.seed, self._step, number))
            # The order of draws is fixed and the prompt's draw is last, so that another `drop_prompt` does not change timesteps
            # and noise. Timesteps are uniform over those of training, which eq. 14 weighs equally; a sampler uses only a few of
            # them.
            times.append(int(torch.randint(self._scheduler.config.num_train_timesteps, (), generator=generator)))
            noise.append(torch.randn(x_BCHW.shape[1:], generator=generator))
            with_prompt.append(float(torch.rand((), generator=generator)) >= self.config.drop_prompt)
        # The copies are asynchronous, so that a GPU can continue to compute.
        t_B, noise_BCHW = (drawn.to(x_BCHW.device, non_blocking=True) for drawn in (torch.tensor(times), torch.stack(noise)))
        return t_B, noise_BCHW.to(x_BCHW.dtype), with_prompt

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1: the loss is a mean over images."""
        return 1

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Store the step, on which the seeds of the noise depend."""
        self._step = step


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for data that are not images."""
    for role in ("train", "validation"):
        if role in job.data.by_role and job.data.by_role[role].format != "image":
            raise ValueError(f"data.{role}.format {job.data.by_role[role].format}: method {config.name} trains on images")


METHOD = Trained(Config, Denoise, check=check, kinds=("diffusion",), example="jobs/tiny/digits.yaml")
