"""IAV's heads in the tiny world: which of the two preferences each of them can express.

steerlab sweep jobs/tiny/iav.yaml search_spaces/tiny/heads.py --seeds 3
"""

from ray import tune

SPACE = {
    "method.head, method.rank": tune.grid_search([("linear", 16), ("low_rank", 4), ("mlp", 64)]),
    "strength": tune.grid_search([0.0, 0.5, 1.0, 2.0]),
}
METRIC = "tiny_answers/win_rate"
MODE = "max"
WITHIN = {"preference/kl": 0.1}
PRICES = ["preference/kl"]
PREDICTIONS = [
    {
        "metric": "tiny_answers/form",
        "over": "strength",
        "where": {"method.head": head},
        "between": [0.0, 1.0],
        "expected": expected,
        "because": reason,
    }
    for head, expected, reason in (
        ("linear", "flat", "an exclusive or of owner and verb is no linear function of both"),
        ("low_rank", "flat", "a linear head of lower rank expresses less"),
        ("mlp", "rises", "a layer of hidden units can express it, if the last hidden state still knows the owner"),
    )
]
