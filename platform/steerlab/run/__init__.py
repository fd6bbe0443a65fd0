"""Run a job: check it before it starts, execute its stages, write its run folder, and compare two runs."""

import sys

from steerlab.guards.called_package import CalledPackage
from steerlab.run.checks import check, facts_of
from steerlab.run.cluster import check_address, connect
from steerlab.run.comparison import Comparison, Side, compare
from steerlab.run.execution import Run, default_root, execute, new_id
from steerlab.run.record import MetricNumbers, Reported, RunSummary, environment, reported_strength, root_cause, summarise

# `import steerlab as sl` also gives the function `sl.run(...)`, which this package would otherwise hide.
sys.modules[__name__].__class__ = CalledPackage

__all__ = [
    "Comparison",
    "MetricNumbers",
    "Reported",
    "Run",
    "RunSummary",
    "Side",
    "check",
    "check_address",
    "compare",
    "connect",
    "default_root",
    "environment",
    "execute",
    "facts_of",
    "new_id",
    "reported_strength",
    "root_cause",
    "summarise",
]
