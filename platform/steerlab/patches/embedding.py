"""The patch that rotates and shifts input embeddings by token role: ASIDE and ISE."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.inputs.tokens import DATA, RESPONSE
from steerlab.patches.attaching import CannotFold, Forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EmbeddingPatch(nn.Module):
    """Rotation and shift of input embeddings by token role (ASIDE, arXiv 2503.10566; ISE, arXiv 2410.09102).

    The rotation costs O(D) for each token and stores no matrix. Axes besides those of tokens.py: P pairs of coordinates, R
    roles.

    Args:
        hidden_size: width D of the embeddings.
        angle_rad: angle in radians by which data tokens are rotated, in every pair of coordinates (2k, 2k+1); 0: no rotation.
        direction: right computes e M with the rotation matrix M, left M e, which is right with the angle -a.
        learned: give each pair of coordinates its own angle, `angle_rad` plus a trained difference, which starts at 0.
        shift: add a trained vector for each of the three roles.
    """

    kind: ClassVar[str] = "embedding"
    strength_range: tuple[float, float] | None = None

    def __init__(
        self,
        hidden_size: int,
        angle_rad: float = 0.0,
        direction: Literal["right", "left"] = "right",
        learned: bool = False,
        shift: bool = False,
    ) -> None:
        super().__init__()
        # A patch that only shifts does not pair coordinates.
        if hidden_size % 2 and (angle_rad or learned):
            raise ValueError(f"a rotation needs pairs of coordinates; the hidden size {hidden_size} is odd")
        self.hidden_size = hidden_size
        self.angle_rad = angle_rad
        self.direction: Literal["right", "left"] = direction
        # One angle for each pair ensures that the map is a rotation; a free matrix, as in the authors' code, would not remain
        # one.
        self.difference_P = nn.Parameter(torch.zeros(hidden_size // 2)) if learned else None
        # RESPONSE is the last of the three roles that a token can have.
        self.shift_RD = nn.Parameter(torch.zeros(RESPONSE + 1, hidden_size)) if shift else None
        self.progress = 1.0
        """Share of the angle that is applied, from 0 to 1; below 1 only during a training with a gradual rotation."""

    def forward(self, e_BTD: Tensor, roles_BT: Tensor, strength_B11: Tensor | None = None) -> Tensor:
        """Rotate and shift embeddings.

        Args:
            e_BTD: embeddings.
            roles_BT: role of each token.
            strength_B11: strength of each row; it scales the angle and the shift. None means 1.
        """
        out_BTD = e_BTD
        if self.angle_rad or self.difference_P is not None:
            # Without training the angle is a plain number, whose sine and cosine are computed once, in double precision.
            angle: Tensor | float = self.angle_rad * self.progress
            if self.difference_P is not None:
                angle = (self.angle_rad + self.difference_P.float()) * self.progress
            if strength_B11 is not None:
                angle = strength_B11.float() * angle  # scaling the angle makes every strength a rotation
            # All tokens are rotated and those of data are selected, because the shape of a gather depends on the data, so that
            # the CPU would wait for the GPU.
            rotated_BTD = rotate(e_BTD, angle, self.direction)
            out_BTD = torch.where((roles_BT == DATA).unsqueeze(-1), rotated_BTD, e_BTD)
        if self.shift_RD is not None:
            # Padding (role 3) has no row in the table; its value does not matter, since no token attends to it. The gather
            # gives (B, T, D).
            shift_BTD = self.shift_RD[roles_BT.clamp(max=RESPONSE)]
            out_BTD = out_BTD + (shift_BTD if strength_B11 is None else strength_B11 * shift_BTD).to(out_BTD.dtype)
        return out_BTD

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register a hook on the output of the input embedding; the output head does not change, even with tied weights."""

        def edit(_module: nn.Module, _inputs: object, e_BTD: Tensor) -> Tensor:
            return self(e_BTD, forward.roles(), forward.strength(number, 3))

        # The hook is on the module instead of its weights, because a tied output head reads the same table, which must not be
        # rotated.
        return [models.embedding(model).register_forward_hook(edit)]

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments as JSON values."""
        return {
            "hidden_size": self.hidden_size,
            "angle_rad": self.angle_rad,
            "direction": self.direction,
            # `progress` is not saved, because a finished patch always applies the whole angle.
            "learned": self.difference_P is not None,
            "shift": self.shift_RD is not None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained angles and shifts; empty for a fixed rotation without a shift."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Raise CannotFold, unless the patch has no effect."""
        # A token has one row in the embedding table, but would need one embedding for each role.
        if strength and (self.angle_rad or self.difference_P is not None or self.shift_RD is not None):
            raise CannotFold("an embedding patch depends on token roles, which plain transformers does not know")


def rotate(x: Tensor, angle: Tensor | float, direction: str = "right") -> Tensor:
    """Rotate every pair of coordinates (2k, 2k+1) of the last axis, in float32 (ASIDE, arXiv 2503.10566, section 4).

    Args:
        x: values whose last axis has even length.
        angle: radians, a number or a tensor that broadcasts over the pairs.
        direction: right multiplies the row vector by the paper's block-diagonal rotation matrix, that is
            (u, v) -> (u cos a + v sin a, v cos a - u sin a); left is right with the angle -a.

    Returns:
        The rotated values, in the shape and type of `x`.
    """
    if direction == "left":
        angle = -angle
    if isinstance(angle, Tensor):
        cos: Tensor | float = torch.cos(angle)
        sin: Tensor | float = torch.sin(angle)
    else:
        # cos(pi/2) is 6e-17 in double precision; with 0 instead, a quarter turn is exactly a swap and a change of sign.
        cos, sin = (0.0 if abs(c) < 1e-12 else c for c in (math.cos(angle), math.sin(angle)))
    # The rotation is computed in float32, because cos and sin in bfloat16 would change the norm of each embedding by up to
    # 1/256.
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    # (..., P, 2) becomes (..., D): the pairs (2k, 2k+1) are neighbours in memory.
    return torch.stack((u * cos + v * sin, v * cos - u * sin), -1).flatten(-2).to(x.dtype)
