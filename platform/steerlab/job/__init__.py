"""The typed job: read a YAML file, apply overrides, validate, dump, print its JSON schema.

A job is a tree of scalars. The configs of methods and tasks are defined next to their mathematics; `job_type` joins them into
one closed type, so that a misspelt key anywhere gives one short message before any work starts.
"""

from steerlab.job.data_config import PROMPT_FIELDS, DataConfig
from steerlab.job.data_set import DataSet
from steerlab.job.entries import Entries
from steerlab.job.extract_config import ExtractConfig, Pixels, Pooling
from steerlab.job.file import base_job, dump, inlined, override, put, read, read_tree, validate
from steerlab.job.job import Job, job_type, prompt_settings
from steerlab.job.messages import cut, explain
from steerlab.job.model_config import JOB_PREFIX, ModelConfig, SamplerConfig
from steerlab.job.preamble import Example, Preamble
from steerlab.job.schema import schema
from steerlab.job.selection import Phase, Role, Selection, Span
from steerlab.job.settings import (
    UNPATCHED,
    UNPATCHED_NAME,
    ChooseConfig,
    Limit,
    MethodConfig,
    MlflowConfig,
    ScaleConfig,
    TaskConfig,
    TrackConfig,
    WandbConfig,
    headline_first,
    with_headline,
)
from steerlab.job.source_fields import Source, Template, described, written_out
from steerlab.job.table import Table
from steerlab.job.train_config import TrainConfig, stops
from steerlab.job.typed import SEED_LIMIT, Frozen, Implied, JobError, Radians, Seed

__all__ = [
    "JOB_PREFIX",
    "PROMPT_FIELDS",
    "SEED_LIMIT",
    "UNPATCHED",
    "UNPATCHED_NAME",
    "ChooseConfig",
    "DataConfig",
    "DataSet",
    "Entries",
    "Example",
    "ExtractConfig",
    "Frozen",
    "Implied",
    "Job",
    "JobError",
    "Limit",
    "MethodConfig",
    "MlflowConfig",
    "ModelConfig",
    "Phase",
    "Pixels",
    "Pooling",
    "Preamble",
    "Radians",
    "Role",
    "SamplerConfig",
    "ScaleConfig",
    "Seed",
    "Selection",
    "Source",
    "Span",
    "Table",
    "TaskConfig",
    "Template",
    "TrackConfig",
    "TrainConfig",
    "WandbConfig",
    "base_job",
    "cut",
    "described",
    "dump",
    "explain",
    "headline_first",
    "inlined",
    "job_type",
    "override",
    "prompt_settings",
    "put",
    "read",
    "read_tree",
    "schema",
    "stops",
    "validate",
    "with_headline",
    "written_out",
]
