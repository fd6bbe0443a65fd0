"""IAV as a whole: head, rank and learning rate drawn at random, every head at several alphas."""

from ray import tune

SPACE = {
    "method.head, method.rank": tune.choice([("linear", 16), ("low_rank", 4), ("low_rank", 16), ("mlp", 16)]),
    "method.lambda_kl": tune.choice([0.0, 0.01, 0.1]),
    "train.lr": tune.loguniform(2e-4, 1e-2),
    "strength": tune.grid_search([0.5, 1.0, 1.5]),
}
METRIC = "preference/accuracy"
MODE = "max"
