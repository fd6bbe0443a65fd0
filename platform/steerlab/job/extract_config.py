"""Config of the activations that are read, and of how they are stored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from steerlab.job.selection import Selection
from steerlab.job.typed import Frozen

Pixels = Literal["mean", "pixel"]
Pooling = Literal["mean", "median", "max", "min", "last", "none"]


class ExtractConfig(Frozen):
    """Settings of the activations that are read from the model, and of how they are stored."""

    select: Selection = Selection()
    """Modules and tokens that are read."""
    pooling: tuple[Pooling, ...] = Field(("mean",), min_length=1)
    """Reduction of the vectors of a row's selected tokens to one; `none`, which cannot be combined, stores one per token.
    Padding never counts."""
    keep: Literal["rows", "moments"] = "rows"
    """rows: one Parquet row per text (or token); moments: only count, mean and variance of each neuron over all rows."""
    second_moment: bool = False
    """With keep moments: also the uncentred second moment, a D x D matrix per module of width D."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type on disk; with float16 a value above its range is an error."""
    max_tokens: int = Field(512, ge=1)
    """Tokens of a text; longer texts are cut, and their number is reported."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of one forward pass, including padding; texts of similar length are batched together."""
    rows_per_shard: int = Field(4096, ge=1)
    """Rows of the data set per Parquet file. An extraction that was killed continues after its last complete file."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_bfloat16(cls, value: object) -> object:
        if value == "bfloat16":
            raise ValueError("Arrow has no bfloat16: float16 has more digits in the same space, float32 all of them")
        return value

    @model_validator(mode="after")
    def _check(self) -> ExtractConfig:
        if "none" in self.pooling and len(self.pooling) > 1:
            raise ValueError("pooling none stores one row for each token and cannot be combined with others")
        if len(set(self.pooling)) < len(self.pooling):
            raise ValueError(f"pooling {list(self.pooling)} names one twice")
        if self.second_moment and self.keep != "moments":
            raise ValueError("second_moment needs keep: moments")
        return self
