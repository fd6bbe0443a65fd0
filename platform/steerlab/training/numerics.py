"""Numerical settings of a training: deterministic operations, and the precision of float32 matrix products on GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steerlab.job import TrainConfig

_NONE = "does not have a deterministic implementation"
"""Part of the error of torch (2.13) about an operation without a deterministic implementation."""


@contextmanager
def of(train: TrainConfig) -> Iterator[None]:
    """Apply a training's numerical settings within a `with` block, and restore the process's own afterwards.

    Raises:
        ValueError: an operation of the training has no deterministic implementation, but `train.deterministic` requires one.
    """
    # The settings apply to the whole process, so they are restored: a warm process trains again with other settings.
    was, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    if train.deterministic:
        # cuBLAS reads this when its first handle is created: with a separate buffer per stream, it adds in a fixed order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if train.tf32:
        # TF32 keeps 10 bits of the mantissa of each factor and sums in float32.
        torch.set_float32_matmul_precision("high")
    try:
        yield
    except RuntimeError as error:
        if train.deterministic and _NONE in str(error):
            operation = str(error).partition(_NONE)[0].strip()
            # Only torch's message distinguishes this error from others of the same class.
            raise ValueError(
                f"train.deterministic: {operation} has no deterministic form in torch {torch.__version__}"
            ) from None
        raise
    finally:
        torch.use_deterministic_algorithms(was)
        torch.set_float32_matmul_precision(precision)
