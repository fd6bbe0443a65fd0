"""No method: the model as it is. The zero of every comparison, and the method of a job that only extracts or evaluates."""

from __future__ import annotations

from typing import Literal

from steerlab.job import MethodConfig
from steerlab.methods.contract import ANY_KIND, Method


class Config(MethodConfig):
    """There is nothing to set."""

    name: Literal["none"] = "none"
    """The method."""


METHOD = Method(Config, trains_model=False, needs_training=False, leaves_patch=False, kinds=ANY_KIND)
