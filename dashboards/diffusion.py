"""Diffusion models under the same maps: images over strength and guidance."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Diffusion",
    about="The same maps on a diffusion model; every strength draws from the same noise, so that images compare one by one.",
    methods=("lineas", "linear_act", "mean_act", "gaussian_act"),
    metrics=("image_concept/rate", "image_similarity/ssim"),
    parameters=("method.name", "method.pooling", "train.lr", "snapshot"),
    curves=("train/loss",),
    log=frozenset({"train.lr"}),
    media=("images/0.000_1.000", "images/0.500_1.000", "images/1.000_1.000"),
    in_report=False,
)
