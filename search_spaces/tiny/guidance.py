"""Strength of a steering map on a diffusion model: threes become eights, at two guidance scales.

steerlab sweep jobs/tiny/diffusion_act.yaml search_spaces/tiny/guidance.py

The control has threes on both sides, with other noise, so there is nothing to steer to.
"""

from ray import tune

SPACE = {
    "model.sampler.guidance, data.target.compose.text": tune.grid_search([(2.0, "eight"), (1.0, "eight"), (2.0, "three")]),
    "strength": tune.grid_search([0.0, 0.25, 0.5, 0.75, 1.0]),
}
# Each seed fits the maps on 32 other drawings of each digit; the drawings that are evaluated are the same ones.
SEEDS = [
    {"data.source.seeds": [start, start + 32], "data.target.seeds": [start + 100, start + 132]}
    for start in range(200, 1200, 200)
]
METRIC = "image_concept/rate"
MODE = "max"
PRICES = ["image_similarity/ssim"]
CONTROLS = [{"data.target.compose.text": "three"}]
_TO_EIGHT = {"model.sampler.guidance": 2.0, "data.target.compose.text": "eight"}
PREDICTIONS = [
    {
        "metric": "image_concept/rate",
        "over": "strength",
        "where": _TO_EIGHT,
        "expected": "rises",
        "because": "the maps move activations of threes to where those of eights are",
    },
    {
        "metric": "image_similarity/ssim",
        "over": "strength",
        "where": _TO_EIGHT,
        "expected": "falls",
        "because": "an eight has other pixels than a three",
    },
    {
        "metric": "image_concept/rate",
        "over": "model.sampler.guidance",
        "where": {"data.target.compose.text": "eight", "strength": 0.75},
        "expected": "falls",
        "because": "guidance pulls towards the prompt, which still says three",
    },
    {
        "metric": "image_concept/rate",
        "over": "strength",
        "where": {"data.target.compose.text": "three"},
        "expected": "flat",
        "because": "control: source and target have the same distribution",
    },
]
