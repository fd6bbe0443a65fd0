"""How each kind of stage uses Ray, and how a job becomes a plan of them."""

from steerlab.stages.job_plan import Evaluation, JobType, Plan

__all__ = ["Evaluation", "JobType", "Plan"]
