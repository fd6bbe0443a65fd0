"""The table of tasks: name -> config and function. Tasks do not know methods; a new one is a file and a line here."""

from steerlab.evaluation import (
    alpaca,
    bipia,
    forbidden_words,
    injection,
    perplexity,
    probing,
    separation,
    struq,
)
from steerlab.evaluation.metrics import Task

TASKS: dict[str, Task] = {
    "separation": Task(separation.Config, separation.run),
    "injection": Task(injection.Config, injection.run),
    "struq": Task(struq.Config, struq.run),
    "bipia": Task(bipia.Config, bipia.run),
    "gandalf": Task(forbidden_words.GandalfConfig, forbidden_words.run_gandalf),
    "purple": Task(forbidden_words.PurpleConfig, forbidden_words.run_purple),
    "perplexity": Task(perplexity.Config, perplexity.run),
    "probing": Task(probing.Config, probing.run),
    "alpaca": Task(alpaca.Config, alpaca.run),
}
