"""The kinds of patch: what a method leaves on a model, and how several of them share one model.

`attach` hangs patches on a model by hooks. The model is then called as before, with a few more keyword arguments that the hooks
read: `roles` and `phases` (B, T), the role and the phase of every token of this very call (one column in cached decoding), and
`strengths`, (B,) for all patches or (N, B) with a row for each. Strength 0 is the model without the patch, bit for bit; left
out, every strength is 1. With `only`, rows and positions of N tokens, the logits of these alone are made, (1, N, V).
"""

from steerlab.patches.activation import ActivationPatch
from steerlab.patches.attaching import Attached, CannotFold, Forward, Patch, attach
from steerlab.patches.embedding import EmbeddingPatch, rotate
from steerlab.patches.logit import LogitPatch
from steerlab.patches.saving import KINDS, SavedPatch, exists, load, save
from steerlab.patches.second_model import SecondModelPatch
from steerlab.patches.weight import WeightPatch

__all__ = [
    "KINDS",
    "ActivationPatch",
    "Attached",
    "CannotFold",
    "EmbeddingPatch",
    "Forward",
    "LogitPatch",
    "Patch",
    "SavedPatch",
    "SecondModelPatch",
    "WeightPatch",
    "attach",
    "exists",
    "load",
    "rotate",
    "save",
]
