"""IAV and DPO: preferences by a head on the logits, or by the weights."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="IAV",
    about="A small head adds alignment to the logits at a chosen alpha; alpha 0 is the model itself, DPO the control.",
    methods=("iav", "dpo"),
    metrics=("preference/accuracy", "preference/margin", "perplexity/value"),
    parameters=("method.name", "method.head", "method.rank", "method.beta", "method.lambda_kl", "train.lr"),
    curves=("train/loss", "train/grad_norm"),
    log=frozenset({"perplexity/value", "train.lr"}),
    media=("samples/preference",),
)
