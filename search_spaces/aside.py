"""ASIDE as a whole: angle, learning rate and steps, by Optuna; --samples says how many trials."""

from math import pi

from ray import tune
from ray.tune.search.optuna import OptunaSearch

SPACE = {
    "method.angle_rad": tune.uniform(0.0, pi),
    "train.lr": tune.loguniform(2e-4, 5e-3),
    "train.steps": tune.choice([75, 150, 300]),
}
METRIC = "separation/sep"
MODE = "max"
SEARCH_ALG = OptunaSearch(seed=0)
