"""The kinds of stages and how each uses Ray, and how a job becomes a plan of stages."""

from steerlab.stages.job_plan import Evaluation, JobType, Plan

__all__ = ["Evaluation", "JobType", "Plan"]
