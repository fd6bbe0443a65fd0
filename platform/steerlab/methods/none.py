"""No method: the model as it is. The zero of every comparison, and the method of a job that only extracts or evaluates."""

from __future__ import annotations

from typing import Literal

from steerlab.job import MethodConfig
from steerlab.methods.contract import ANY_KIND, Plain


class Config(MethodConfig):
    """There is nothing to set."""

    name: Literal["none"] = "none"
    """The method."""


METHOD = Plain(Config, kinds=ANY_KIND)
