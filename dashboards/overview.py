"""All runs of a project: what they measured, by method."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Overview",
    about="Every method, measured by the same tasks: separation, refusals, toxicity, preferences, utility.",
    metrics=(
        "separation/sep",
        "perplexity/value",
        "toxicity/share",
        "refusal/attack_success",
        "preference/accuracy",
        "math/solved",
    ),
    parameters=("method.name", "strength", "train.steps", "train.lr", "train.seed"),
    curves=("train/loss", "train/grad_norm"),
    log=frozenset({"perplexity/value", "train.lr"}),
    media=("samples/separation", "samples/toxicity", "samples/refusal"),
)
