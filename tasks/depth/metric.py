"""How near predicted depth is to measured depth: the errors of the KITTI and NYU tables (Eigen et al., 2014).

p predicted, g measured depth in metres, means over the pixels that were measured:
abs_rel |p - g| / g, sq_rel (p - g)^2 / g, rmse sqrt((p - g)^2), rmse_log the same of natural logarithms,
log10 |log10 p - log10 g|, silog 100 sqrt(mean d^2 - (mean d)^2) with d = ln p - ln g,
delta1..3 the share with max(p / g, g / p) < 1.25, 1.25^2, 1.25^3. All in float64.
"""

from typing import Literal, get_args

import numpy as np

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.metrics import Row, TaskMetric

Alignment = Literal["none", "median", "affine"]
Space = Literal["depth", "disparity"]
CROPS = {  # top, bottom, left, right, as shares of height and width
    "none": (0.0, 1.0, 0.0, 1.0),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),  # KITTI, Eigen et al. 2014
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # KITTI, Garg et al. 2016
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),  # NYU Depth V2, inside its white border
}


class DepthMetric(TaskMetric):
    """abs_rel, sq_rel, rmse, rmse_log, log10, silog, delta1, delta2, delta3, averaged over pictures.

    A pixel counts when its measured depth lies strictly between `min_depth` and `max_depth` and inside the crop.
    Predictions are aligned on those pixels, then clipped to [min_depth, max_depth]: so a depth of zero or below, or
    beyond the cap, counts as the limit. A picture without a measured pixel has None for every number; "num_pixels"
    says how many counted. A constant prediction aligns to the median or mean of the truth.

    Args:
        alignment: `none` for metric depth; `median` multiplies by median(g) / median(p); `affine` takes the scale and
            shift of least squares, as zero-shot tables do.
        space: where the scale and shift are fitted and applied: `depth`, or `disparity` (1 / depth; there an aligned
            disparity of zero or below becomes `max_depth`, or the farthest truth when there is no cap).
        min_depth, max_depth: metres; max_depth None has no cap (the tables use 10 for NYU, 80 for KITTI).
        crop: none, eigen or garg (KITTI), nyu (Eigen's for NYU), scaled to the picture's size.

    Raises (from `add`):
        ValueError: shapes differ, the prediction is NaN or infinite at a measured pixel, or it cannot be aligned.
    """

    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")

    def __init__(
        self,
        alignment: Alignment = "none",
        *,
        space: Space = "depth",
        min_depth: float = 1e-3,
        max_depth: float | None = None,
        crop: str = "none",
    ) -> None:
        super().__init__()
        if alignment not in get_args(Alignment):
            raise unknown_name("alignment", alignment, get_args(Alignment))
        if space not in get_args(Space):
            raise unknown_name("alignment space", space, get_args(Space))
        if crop not in CROPS:
            raise unknown_name("crop", crop, CROPS)
        if not 0 < min_depth < (np.inf if max_depth is None else max_depth):
            raise UserError(f"Depth limits need 0 < min_depth < max_depth, got {min_depth} and {max_depth} metres.")
        self.alignment = alignment
        self.space = space
        self.min_depth = min_depth
        self.max_depth = np.inf if max_depth is None else max_depth
        self.crop = crop

    def score(self, output: np.ndarray, truth: np.ndarray) -> Row:
        """The nine numbers of one picture and num_pixels; predicted and measured depth (H, W) in metres."""
        if output.ndim != 2 or output.shape != truth.shape:
            raise ValueError(
                f"predicted and measured depth must both be (H, W); got {output.shape} and {truth.shape}: "
                "resize the prediction first"
            )
        valid = measured(truth, self.min_depth, self.max_depth, self.crop)
        if not valid.any():
            return {"num_pixels": 0, **dict.fromkeys(self.names)}
        p, g = output[valid].astype(np.float64), truth[valid].astype(np.float64)
        if not np.isfinite(p).all():
            raise ValueError(f"the prediction is NaN or infinite at {int((~np.isfinite(p)).sum())} of {p.size} pixels")
        if self.alignment == "median":
            p = align_median(p, g)
        elif self.alignment == "affine":
            p = self._align_affine(p, g)
        return {"num_pixels": int(g.size), **depth_errors(np.clip(p, self.min_depth, self.max_depth), g)}

    def _align_affine(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        if self.space == "depth":
            return align_affine(p, g)
        disparity = align_affine(1 / np.maximum(p, self.min_depth), 1 / g)
        farthest = g.max() if np.isinf(self.max_depth) else self.max_depth
        return 1 / np.maximum(disparity, 1 / farthest)  # a disparity of zero or below is no finite depth


def measured(truth: np.ndarray, min_depth: float, max_depth: float, crop: str) -> np.ndarray:
    """Boolean (H, W): finite depth strictly inside the limits and inside the named crop."""
    height, width = truth.shape
    top, bottom, left, right = CROPS[crop]
    inside = np.zeros(truth.shape, dtype=bool)
    inside[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    return inside & np.isfinite(truth) & (truth > min_depth) & (truth < max_depth)


def align_median(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """p scaled so that its median is that of g; both (N,)."""
    middle = float(np.median(p))
    if middle <= 0:
        raise ValueError(f"the prediction's median is {middle:g}: median alignment needs a positive one")
    return p * (float(np.median(g)) / middle)


def align_affine(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """s p + t with the s and t of least squares against g; both (N,). A constant p becomes the mean of g."""
    centred = p - p.mean()
    spread = float(centred @ centred)
    # a constant differs from its mean by rounding only, from which no scale can be told
    constant = spread <= p.size * (np.finfo(np.float64).eps * np.abs(p).max()) ** 2 * 16
    scale = 0.0 if constant else float(centred @ g) / spread
    return scale * centred + g.mean()


def depth_errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    """The nine numbers for predicted and measured depths (N,), metres, > 0, float64."""
    log_error = np.log(p) - np.log(g)
    ratio = np.maximum(p / g, g / p)
    errors = {
        "abs_rel": np.mean(np.abs(p - g) / g),
        "sq_rel": np.mean((p - g) ** 2 / g),
        "rmse": np.sqrt(np.mean((p - g) ** 2)),
        "rmse_log": np.sqrt(np.mean(log_error**2)),
        "log10": np.mean(np.abs(log_error)) / np.log(10),
        "silog": 100 * np.std(log_error),  # sqrt(mean d^2 - mean^2 d), without its cancellation
        "delta1": np.mean(ratio < 1.25),
        "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
    }
    return {name: float(value) for name, value in errors.items()}
