"""Safety-WaRP against its controls: ratio, rotation and mask, where the safety that is kept is the question."""

from ray import tune

SPACE = {
    "method.keep_ratio": tune.grid_search([0.05, 0.1, 0.2]),
    "method.rotation, method.mask": tune.grid_search(
        [
            ("safety", "importance"),
            ("none", "importance"),
            ("random", "importance"),
            ("safety", "random"),
            ("safety", "magnitude"),
        ]
    ),
}
METRIC = "refusal/attack_success"
MODE = "min"
