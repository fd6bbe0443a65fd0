"""No method: the model as it is, for baselines and for jobs that only extract or evaluate."""

from __future__ import annotations

from typing import Literal

from steerlab.job import MethodConfig
from steerlab.methods.contract import ANY_KIND, Plain


# A job without a method has this one: what follows reads a method without asking whether there is one.
class Config(MethodConfig):
    """The model as it is; there are no hyperparameters."""

    name: Literal["none"] = "none"
    """The method."""


# All kinds of model: nothing here reads one.
METHOD = Plain(Config, kinds=ANY_KIND, example="jobs/tiny/extract.yaml")
