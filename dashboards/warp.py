"""Safety-WaRP: which share of the rotated coordinates is kept while a model is fine-tuned?"""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Safety-WaRP",
    about="Coordinates that matter for refusals are kept; random rotations and random masks are the controls.",
    methods=("warp", "vanilla"),
    metrics=("refusal/attack_success", "refusal/over_refusal", "math/solved"),
    parameters=("method.name", "method.keep_ratio", "method.rotation", "method.mask", "train.lr", "train.seed"),
    curves=("train/loss", "train/grad_norm"),
    log=frozenset({"train.lr"}),
    media=("samples/refusal", "samples/math"),
)
