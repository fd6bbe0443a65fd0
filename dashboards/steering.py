"""LinEAS, ReFT and the closed forms (AcT, AurA, CAA, ITI, RepE, ablation, imported vectors): effect against fluency."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Steering by activations",
    about="Maps move activations towards a goal. Strength 0 is the model itself; an effect counts while perplexity stays near.",
    methods=(
        "lineas",
        "reft",
        "linear_act",
        "mean_act",
        "gaussian_act",
        "aura",
        "caa",
        "iti",
        "iti_heads",
        "prompt",
        "ablation",
        "repe",
        "imported",
    ),
    metrics=("toxicity/share", "perplexity/value", "toxicity/base_perplexity", "sentiment/positive"),
    parameters=("method.name", "strength", "method.pooling", "method.gamma", "train.lr", "snapshot"),
    curves=("train/loss", "train/support", "train/token_accuracy", "train/grad_norm"),
    log=frozenset({"perplexity/value", "toxicity/base_perplexity", "train.lr"}),
    media=("samples/toxicity", "samples/sentiment"),
)
