"""ASIDE, ISE and vanilla fine-tuning: does rotating the data's embeddings separate them from instructions?"""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="ASIDE",
    about="Data tokens are rotated at the embedding; angle 0 and ISE are controls. Separation is bought with utility.",
    methods=("aside", "ise", "vanilla"),
    metrics=("separation/sep", "separation/utility", "perplexity/value"),
    parameters=("method.name", "method.angle_rad", "strength", "train.lr", "train.steps", "train.seed"),
    curves=("train/loss", "train/token_accuracy", "train/grad_norm"),
    log=frozenset({"perplexity/value", "train.lr"}),
    media=("samples/separation",),
)
