"""IAV's alpha in the tiny world, where a tenth of the preferences is swapped and half of them no linear head can express.

steerlab sweep jobs/tiny/iav.yaml search_spaces/tiny/alpha.py

The control learns from labels that are pure noise.
"""

from ray import tune

NOISE = "tiny:preferences/train?form=0.5&noise={}"
SPACE = {
    "data.preference.source": tune.grid_search([NOISE.format(0.1), NOISE.format(0.5)]),
    "strength": tune.grid_search([0.0, 0.25, 0.5, 1.0, 1.5, 2.0]),
}
METRIC = "tiny_answers/win_rate"
MODE = "max"
WITHIN = {"preference/kl": 0.1}
PRICES = ["preference/kl"]
CONTROLS = [{"data.preference.source": NOISE.format(0.5)}]
_MEANT = {"data.preference.source": NOISE.format(0.1)}
PREDICTIONS = [
    {
        "metric": "tiny_answers/win_rate",
        "over": "strength",
        "where": _MEANT,
        "between": [0.0, 0.5],
        "expected": "rises",
        "because": "the tone is a direction of the last hidden state, which the head adds to the logits",
    },
    {
        "metric": "tiny_answers/win_rate",
        "over": "strength",
        "where": _MEANT,
        "between": [0.5, 2.0],
        "expected": "falls",
        "because": "the added logits grow without bound and in the end outweigh the grammar",
    },
    {
        "metric": "preference/kl",
        "over": "strength",
        "where": _MEANT,
        "between": [0.25, 2.0],
        "expected": "rises",
        "because": "the KL divergence to the base grows with the size of what is added",
    },
    {
        "metric": "tiny_answers/form",
        "over": "strength",
        "where": _MEANT,
        "expected": "flat",
        "because": "control: the rule about owner and verb is an exclusive or, which no linear head expresses",
    },
    {
        "metric": "tiny_answers/win_rate",
        "over": "strength",
        "where": {"data.preference.source": NOISE.format(0.5)},
        "between": [0.0, 0.5],
        "expected": "flat",
        "because": "control: labels that are noise prefer nothing",
    },
]
