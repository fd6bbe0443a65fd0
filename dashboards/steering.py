"""LinEAS and the closed forms (Linear-, Mean-, Gaussian-AcT, AurA, CAA, ITI): effect against fluency."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Steering by activations",
    about="Maps move activations towards a goal. Strength 0 is the model itself; an effect counts while perplexity stays near.",
    methods=("lineas", "linear_act", "mean_act", "gaussian_act", "aura", "caa", "iti"),
    metrics=("toxicity/share", "perplexity/value", "toxicity/base_perplexity", "sentiment/positive"),
    parameters=("method.name", "method.pooling", "method.gamma", "train.lr", "snapshot"),
    curves=("train/loss", "train/support", "train/grad_norm"),
    log=frozenset({"perplexity/value", "toxicity/base_perplexity", "train.lr"}),
    media=("samples/toxicity", "samples/sentiment"),
)
