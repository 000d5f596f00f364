"""Metric depth <-> the latent the flow lives in: a function of depth, scaled to mean 0 and variance 1 on the
training data.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically

DepthTarget = Literal["log", "linear", "disparity"]
FILE = "depth_scale.json"


@dataclass(frozen=True)
class DepthScale:
    """z = (f(d) - shift) / scale with f = log d, d or 1/d; `near` and `far` in metres bound what is decoded."""

    target: DepthTarget
    near: float
    far: float
    shift: float = 0.0
    scale: float = 1.0

    def _forward(self, depth: Tensor) -> Tensor:
        if self.target == "linear":
            return depth
        return depth.log() if self.target == "log" else depth.reciprocal()

    def valid(self, depth: Tensor) -> Tensor:
        """Where depth (metres, 0 = missing) is measured and inside [near, far]: bool, same shape."""
        return torch.isfinite(depth) & (depth >= self.near) & (depth <= self.far)

    def encode(self, depth: Tensor) -> Tensor:
        """Depth (B, 1, H, W) in metres -> latents; 0 where it is not valid."""
        valid = self.valid(depth)
        z = (self._forward(torch.where(valid, depth, torch.ones_like(depth))) - self.shift) / self.scale
        return torch.where(valid, z, torch.zeros_like(z))

    def metres(self, z: Tensor) -> Tensor:
        """Latents -> depth in metres, not clamped, so that a loss of it has a gradient everywhere."""
        f = z.float() * self.scale + self.shift
        if self.target == "log":
            return f.exp()
        return f if self.target == "linear" else 1 / f.clamp(min=1 / self.far)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> depth in metres, clamped to [near, far]."""
        return self.metres(z).clamp(self.near, self.far)

    @classmethod
    def fit(cls, target: DepthTarget, near: float, far: float, depths: Iterable[Tensor]) -> "DepthScale":
        """Measures shift and scale on depth maps in metres. Raises UserError when none of them has a valid pixel."""
        raw = cls(target, near, far)
        values = [raw.encode(depth)[raw.valid(depth)].double() for depth in depths]
        flat = torch.cat(values) if values else torch.zeros(0)
        if len(flat) < 2:
            raise UserError(
                f"The training data has no depth between depth.near = {near:g} and depth.far = {far:g} metres; "
                "widen the range, or check the unit of the depth files (millimetres)."
            )
        return cls(target, near, far, flat.mean().item(), max(flat.std().item(), 1e-6))

    def save(self, folder: Path) -> None:
        """Writes the scale as JSON into a run directory."""
        write_atomically(folder / FILE, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "DepthScale":
        """Reads what `save` wrote. Raises UserError when it is missing."""
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} holds no {FILE}, which a depth run needs to turn latents into metres.")
        return cls(**json.loads((folder / FILE).read_text()))
