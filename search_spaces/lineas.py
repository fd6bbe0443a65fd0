"""LinEAS as a whole: learning rate and sparsity drawn at random, steps and strengths from each training."""

from ray import tune

SPACE = {
    "train.lr": tune.loguniform(2e-3, 5e-2),
    "method.gamma": tune.choice([0.0, 1e-3, 1e-2, 1e-1]),
    "snapshot": tune.grid_search([20, 60]),
}
