"""LinEAS's steering steps and strength in the tiny world: from texts about the farm to texts about the sea.

steerlab sweep jobs/tiny/lineas.yaml search_spaces/tiny/steering_steps.py

The control has texts about the farm on both sides, so there is nothing to steer to.
"""

from ray import tune

STEPS = (5, 15, 30, 60, 100)
SPACE = {
    "snapshot, data.target.equals.label": tune.grid_search([*((step, "sea") for step in STEPS), (STEPS[-1], "farm")]),
    "strength": tune.grid_search([0.0, 0.5, 1.0, 1.5, 2.0]),
}
DEVELOPMENT = [
    {"task": "tiny_sentences", "topics": ["sea"]},
    {"task": "perplexity", "data": {"source": "tiny:texts/validation", "format": "text", "limit": 100}},
]
# A step takes all 32 texts, so the training seed alone would change nothing: each seed fits on other texts.
SEEDS = [{"data.source.shuffle": seed, "data.target.shuffle": seed} for seed in range(5)]
METRIC = "tiny_sentences/about"
MODE = "max"
PRICES = ["perplexity/value"]
CONTROLS = [{"data.target.equals.label": "farm"}]
_TO_SEA = {"data.target.equals.label": "sea"}
PREDICTIONS = [
    {
        "metric": "tiny_sentences/about",
        "over": "snapshot",
        "where": {**_TO_SEA, "strength": 1.0},
        "expected": "rises",
        "because": "the maps start at the identity and come nearer to the target with each step",
    },
    {
        "metric": "tiny_sentences/about",
        "over": "strength",
        "where": {**_TO_SEA, "snapshot": STEPS[-1]},
        "expected": "rises",
        "because": "a strength of 1 is the map, and beyond it activations move on in the same direction",
    },
    {
        "metric": "tiny_sentences/coherent",
        "over": "strength",
        "where": {**_TO_SEA, "snapshot": STEPS[-1]},
        "between": [0.0, 1.0],
        "expected": "falls",
        "because": "half way between two topics a sentence takes words of both",
    },
    {
        "metric": "perplexity/value",
        "over": "strength",
        "where": {**_TO_SEA, "snapshot": STEPS[-1]},
        "expected": "rises",
        "because": "texts of all topics are read with activations that are moved towards one",
    },
    {
        "metric": "tiny_sentences/about",
        "over": "strength",
        "where": {"data.target.equals.label": "farm", "snapshot": STEPS[-1]},
        "between": [0.0, 1.0],
        "expected": "flat",
        "because": "control: source and target have the same distribution",
    },
]
