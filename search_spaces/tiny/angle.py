"""ASIDE's angle in the tiny world, with what theory says about it.

steerlab sweep jobs/tiny/aside.yaml search_spaces/tiny/angle.py
"""

from math import pi

from ray import tune

SPACE = {"method.angle_rad": tune.grid_search([0.0, pi / 4, 3 * pi / 8, pi / 2, 3 * pi / 4])}
METRIC = "separation/sep"
WITHIN = {"separation/utility": 0.9}
PRICES = ["perplexity/value"]
PREDICTIONS = [
    {
        "metric": "separation/sep",
        "over": "method.angle_rad",
        "between": [0.0, pi / 2],
        "expected": "rises",
        "because": "the two forms of a token have the cosine cos(angle), so at pi/2 no layer takes one for the other",
    },
    {
        "metric": "perplexity/value",
        "over": "method.angle_rad",
        "between": [0.0, pi / 2],
        "expected": "rises",
        "because": "the further data tokens turn from the embeddings that the model knows, the more it has to learn anew",
    },
    {
        "metric": "separation/utility",
        "over": "method.angle_rad",
        "between": [0.0, pi / 2],
        "expected": "flat",
        "because": "control: instruction tokens are not rotated",
    },
]
