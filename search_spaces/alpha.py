"""IAV's alpha: the strength of its patch on the logits. One training, one loaded model, one batch for all values.

steerlab sweep jobs/tiny/iav.yaml search_spaces/alpha.py
"""

from ray import tune

SPACE = {"strength": tune.grid_search([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0])}
METRIC = "preference/margin"
MODE = "max"
