"""Which part of an image a steering map moves: the mean of each channel, or each of its pixels. Threes become eights.

steerlab sweep jobs/tiny/diffusion_act.yaml search_spaces/tiny/pixel_form.py

The maps are fitted on means over the pixels of a channel. The form `mean` moves that mean alone; `pixel` applies the same map
to each pixel. The predictions were written before the first run (commit of this file).
"""

from ray import tune

SPACE = {
    "method.name, method.support": tune.grid_search(
        [("mean_act", None), ("gaussian_act", None), ("linear_act", None), ("linear_act", [0.0, 1.0])]
    ),
    "method.pixels": tune.grid_search(["mean", "pixel"]),
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
_FORMS = {"over": "method.pixels", "between": ["mean", "pixel"]}
PREDICTIONS = [
    {
        **_FORMS,
        "metric": "image_similarity/ssim",
        "where": {"method.name": "mean_act", "strength": 0.75},
        "expected": "flat",
        "because": "control: a shift moves every pixel by as much as it moves their mean, so both forms are one map",
    },
    {
        **_FORMS,
        "metric": "image_similarity/ssim",
        "where": {"method.name": "gaussian_act", "strength": 0.5},
        "expected": "falls",
        "because": "the slope, fitted on the small spread of means, also widens the large spread of pixels",
    },
    {
        **_FORMS,
        "metric": "image_similarity/ssim",
        "where": {"method.name": "linear_act", "method.support": None, "strength": 0.5},
        "expected": "falls",
        "because": "as for Gaussian-AcT",
    },
    {
        **_FORMS,
        "metric": "image_concept/rate",
        "where": {"method.name": "linear_act", "method.support": [0.0, 1.0], "strength": 1.0},
        "expected": "falls",
        "because": "the bounds are quantiles of means, and most pixels lie outside them and are not mapped",
    },
]
