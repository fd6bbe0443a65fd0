"""IAV, GenARM and ARGS beside the model, DPO and SimPO in its weights: preferences."""

from steerlab.tracking.wandb_client.workspaces import Board

BOARD = Board(
    title="Preferences",
    about="A small head or a second model adds alignment to the logits at a chosen alpha; alpha 0 is the model itself, DPO "
    "and SimPO, which train its weights, are the controls.",
    methods=("iav", "genarm", "args", "dpo", "simpo"),
    metrics=("preference/accuracy", "preference/margin", "perplexity/value"),
    parameters=(
        "method.name",
        "strength",
        "method.head",
        "method.rank",
        "method.beta",
        "method.lambda_kl",
        "train.lr",
    ),
    curves=("train/loss", "train/accuracy", "train/margin", "train/chosen_logp", "train/kl", "train/grad_norm"),
    log=frozenset({"perplexity/value", "train.lr"}),
    media=("samples/preference",),
)
