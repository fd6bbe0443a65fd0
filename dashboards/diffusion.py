"""Diffusion models under the same maps: images over strength and guidance."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Diffusion",
    about="The same maps on a diffusion model; every strength draws from the same noise, so that images compare one by one.",
    methods=(
        "lineas",
        "linear_act",
        "mean_act",
        "gaussian_act",
        "aura",
        "caa",
        "iti",
        "iti_heads",
        "repe",
        "denoise",
    ),
    metrics=("image_concept/rate", "image_similarity/ssim"),
    parameters=("method.name", "strength", "method.pooling", "train.lr", "snapshot"),
    curves=("train/loss", "train/support", "train/grad_norm"),
    log=frozenset({"train.lr"}),
    media=("images",),
    in_report=False,
)
