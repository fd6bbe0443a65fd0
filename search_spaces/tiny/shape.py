"""What source and target differ in: mean alone, spread as well, or shape as well, for the closed-form maps.

steerlab sweep jobs/tiny/act.yaml search_spaces/tiny/shape.py

A narrow source (texts that know two qualities) has little spread; a target of two topics has two modes. Each seed fits the maps
on other texts.
"""

from ray import tune

plain, narrow, bimodal = "tiny:texts/train", "tiny:texts/train?narrow=1", "tiny:texts/train?second=0.5"
STRENGTHS = [0.0, 0.5, 1.0, 1.5, 2.0]
SPACE = {
    "method.name": tune.grid_search(["mean_act", "gaussian_act", "linear_act"]),
    "data.source.source, data.target.source": tune.grid_search([(plain, plain), (narrow, plain), (narrow, bimodal)]),
    "strength": tune.grid_search(STRENGTHS),
}
DEVELOPMENT = [{"task": "tiny_sentences", "topics": ["sea", "city"]}]
SEEDS = [{"data.source.shuffle": seed, "data.target.shuffle": seed} for seed in range(5)]
METRIC = "tiny_sentences/about"
MODE = "max"
PREDICTIONS = [
    {
        "metric": "tiny_sentences/about",
        "over": "strength",
        "where": {"method.name": "mean_act", "data.source.source": plain},
        "expected": "rises",
        "because": "the topic is a difference of means, which every one of the maps moves",
    },
    {
        "metric": "tiny_sentences/sentence",
        "over": "strength",
        "where": {"method.name": "mean_act", "data.target.source": bimodal},
        "expected": "flat",
        "because": "a shift leaves the spread of activations as it is",
    },
    {
        "metric": "tiny_sentences/sentence",
        "over": "strength",
        "where": {"method.name": "gaussian_act", "data.target.source": bimodal},
        "expected": "falls",
        "because": "slopes above 1 widen the spread, and a strength above 1 widens it beyond the target's",
    },
    {
        "metric": "tiny_sentences/sentence",
        "over": "strength",
        "where": {"method.name": "linear_act", "data.target.source": bimodal},
        "expected": "falls",
        "because": "as for Gaussian-AcT: two modes are far apart, so the fitted slopes are large",
    },
]
