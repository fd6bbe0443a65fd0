"""The closed-form maps beside each other, each with the pooling that it is made for; activations are extracted once."""

from ray import tune

SPACE = {
    "method.name, method.pooling": tune.grid_search(
        [
            ("linear_act", "mean"),
            ("mean_act", "mean"),
            ("gaussian_act", "mean"),
            ("caa", "last"),
            ("iti", "mean"),
            ("aura", "max"),
        ]
    ),
}
