"""Wordings of a prompt in the tiny world: sentences about the sea before a text about the farm.

steerlab sweep jobs/tiny/prompt.yaml search_spaces/tiny/prompt.py

The wording is chosen on development rows, as the strength of a map is. The control has a sentence about the farm.
"""

from ray import tune

SEA = (
    "the dark pirate rows the dark fish ; ",
    "the big sailor follows the big reef ; ",
    "the fast captain rows the fast crab ; ",
)
FARM = "the wet shepherd herds the hot pig ; "
SPACE = {"method.prefix": tune.grid_search([SEA[0], SEA[0] + SEA[1], "".join(SEA), FARM])}
DEVELOPMENT = [
    {"task": "tiny_sentences", "topics": ["sea"]},
    {"task": "perplexity", "data": {"source": "tiny:texts/validation", "format": "text", "limit": 100}},
]
METRIC = "tiny_sentences/about"
MODE = "max"
PRICES = ["tiny_sentences/coherent"]
CONTROLS = [{"method.prefix": FARM}]
