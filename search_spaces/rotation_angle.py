"""ASIDE's angle, from no rotation (plain fine-tuning) to a half turn, at several training seeds with --seeds.

steerlab sweep jobs/tiny/aside.yaml search_spaces/rotation_angle.py
"""

from math import pi

from ray import tune

SPACE = {"method.angle_rad": tune.grid_search([0.0, pi / 4, pi / 2, 3 * pi / 4, pi])}
METRIC = "separation/sep"
MODE = "max"
