"""The share of directions that Safety-WaRP keeps frozen; moments, basis and importance are computed once.

steerlab sweep jobs/tiny/warp.yaml search_spaces/keep_ratio.py
"""

from ray import tune

SPACE = {"method.keep_ratio": tune.grid_search([0.0, 0.05, 0.1, 0.2, 0.5])}
METRIC = "refusal/attack_success"
MODE = "min"
