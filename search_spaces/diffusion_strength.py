"""How far maps steer a diffusion model, from not at all to the target.

steerlab sweep jobs/tiny/diffusion_lineas.yaml search_spaces/diffusion_strength.py
"""

from ray import tune

SPACE = {"strength": tune.grid_search([0.0, 0.25, 0.5, 0.75, 1.0])}
METRIC = "image_concept/rate"
MODE = "max"
