"""How a training computes: by deterministic operations alone, and with which precision a GPU multiplies matrices of float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steerlab.job import TrainConfig

_NONE = "does not have a deterministic implementation"
"""Part of torch's (2.13) error about an operation that has none."""


@contextmanager
def of(train: TrainConfig) -> Iterator[None]:
    """Compute in this block as a training asks; the process may train again afterwards, with other settings.

    Raises:
        ValueError: an operation of the training has no deterministic implementation, and `train.deterministic` wants all to.
    """
    # Of the whole process, so that they are put back: a warm process trains again with other settings.
    was, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    if train.deterministic:
        # cuBLAS reads it when its first handle is made: it adds in one order if it has a buffer of its own for each stream.
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
            # Only torch's own message tells this error from others of the same class.
            raise ValueError(
                f"train.deterministic: {operation} has no deterministic form in torch {torch.__version__}"
            ) from None
        raise
    finally:
        torch.use_deterministic_algorithms(was)
        torch.set_float32_matmul_precision(precision)
