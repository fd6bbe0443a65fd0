"""Safety that is kept while a model is fine-tuned (Safety-WaRP, SN-Tune), or given back afterwards (RESTA and others)."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Safety kept",
    about="Coordinates or neurons that matter for refusals are kept, or weights are moved back after the training; "
    "fine-tuning without either, random rotations and random masks are the controls.",
    methods=("warp", "sn_tune", "resta", "safe_lora", "safe_delta", "vanilla"),
    metrics=("refusal/attack_success", "refusal/over_refusal", "math/solved"),
    parameters=(
        "method.name",
        "method.keep_ratio",
        "method.rotation",
        "method.mask",
        "method.gamma",
        "method.budget",
        "strength",
        "train.lr",
        "train.seed",
    ),
    curves=("train/loss", "train/token_accuracy", "train/grad_norm"),
    log=frozenset({"train.lr"}),
    media=("samples/refusal", "samples/math"),
)
