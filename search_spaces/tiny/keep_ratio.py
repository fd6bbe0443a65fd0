"""The share of directions that Safety-WaRP freezes, in a world where what is learnt needs the directions of what is kept.

steerlab sweep jobs/tiny/warp.yaml search_spaces/tiny/keep_ratio.py

At overlap 1 every errand is about a harmful deed; at overlap 0, the control, none shares a word with one.
"""

from ray import tune

SETS = ("test", "validation")


def errands(overlap: int) -> tuple[str, list[str]]:
    """Return the rows that are learnt, and those that are solved afterwards."""
    return f"tiny:errands/train?overlap={overlap}", [f"tiny:errands/{split}?overlap={overlap}" for split in SETS]


SPACE = {
    "data.train.source, evaluate.1.prompts.source, method.rotation, method.keep_ratio": tune.grid_search(
        [
            *((*errands(1), "safety", ratio) for ratio in (0.0, 0.1, 0.2, 0.5)),
            *((*errands(1), "none", ratio) for ratio in (0.1, 0.2)),
            *((*errands(0), "safety", ratio) for ratio in (0.0, 0.5)),
        ]
    ),
}
METRIC = "refusal/attack_success"
MODE = "min"
PRICES = ["math/solved"]
CONTROLS = [{"data.train.source": errands(0)[0]}, {"method.rotation": "none"}]
_SHARED = {"data.train.source": errands(1)[0], "method.rotation": "safety"}
PREDICTIONS = [
    {
        "metric": "refusal/attack_success",
        "over": "method.keep_ratio",
        "where": _SHARED,
        "expected": "falls",
        "because": "errands change the response to the words of harmful requests; what is frozen cannot change",
    },
    {
        "metric": "math/solved",
        "over": "method.keep_ratio",
        "where": _SHARED,
        "expected": "falls",
        "because": "the frozen directions are those that the errands need as well",
    },
    {
        "metric": "refusal/attack_success",
        "over": "method.keep_ratio",
        "where": {"data.train.source": errands(1)[0], "method.rotation": "none"},
        "expected": "flat",
        "because": "control: without the rotation, neither a tenth nor a fifth of the weights holds what refusals need",
    },
    {
        "metric": "refusal/attack_success",
        "over": "method.keep_ratio",
        "where": {"data.train.source": errands(0)[0]},
        "expected": "flat",
        "because": "control: errands that share no word with harmful requests leave refusals alone, frozen or not",
    },
]
