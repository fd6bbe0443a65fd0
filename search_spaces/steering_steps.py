"""After how many steps LinEAS's maps are taken: snapshots of one training, each at every strength of the job's `choose`.

steerlab sweep jobs/tiny/lineas.yaml search_spaces/steering_steps.py
"""

from ray import tune

SPACE = {"snapshot": tune.grid_search([5, 15, 30, 60])}
