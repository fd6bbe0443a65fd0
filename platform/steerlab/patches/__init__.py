"""Patches: changes that a method makes to a model, and that are attached, saved, loaded and folded into weights.

`attach` adds a stack of patches to a model by hooks. The model is then called as before, with further keyword arguments that
the hooks read:

roles, phases   (B, T), role and phase of every token of this call (one column in cached decoding)
strengths       (B,) for all patches, or (N, B) with a row for each of N patches; without it every strength is 1
only            rows and positions of N tokens: only their logits are computed, (1, N, V)

Strength 0 gives the model without the patch, bit for bit.
"""

from steerlab.patches.activation import ActivationPatch
from steerlab.patches.attaching import Attached, CannotFold, Forward, Patch, attach, attached_patches
from steerlab.patches.embedding import EmbeddingPatch, rotate
from steerlab.patches.logit import LogitPatch
from steerlab.patches.reward import RewardPatch
from steerlab.patches.saving import KINDS, SavedPatch, exists, inverse, load, save
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
    "RewardPatch",
    "SavedPatch",
    "SecondModelPatch",
    "WeightPatch",
    "attach",
    "attached_patches",
    "exists",
    "inverse",
    "load",
    "rotate",
    "save",
]
