"""No method: the model as it is, for baselines and for jobs that only extract or evaluate."""

from __future__ import annotations

from typing import Literal

from steerlab.job import MethodConfig
from steerlab.methods.contract import ANY_KIND, Plain


# A job without a method gets this one, so that other code can read a job's method without a test for None.
class Config(MethodConfig):
    """The unchanged model, without hyperparameters."""

    name: Literal["none"] = "none"
    """The method."""


# The method works on all kinds of model, since it reads none.
METHOD = Plain(Config, kinds=ANY_KIND, example="jobs/tiny/extract.yaml")
