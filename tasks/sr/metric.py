"""How near an enlarged picture is to the real one: PSNR and SSIM, on RGB and on luma, as the tables use them.

PSNR = 10 log10(255^2 / mean (a - b)^2). SSIM as Wang et al. (2004): an 11 x 11 Gaussian window of sigma 1.5, K = 0.01
and 0.03, only windows that lie inside the picture. Luma is MATLAB's, rounded to whole numbers as there; a picture
stored with one channel is scored on that channel, which spans 0 to 255 where luma spans 16 to 235.
"""

from collections.abc import Callable

import numpy as np

from crossflow.core.errors import UserError
from crossflow.core.metrics import Row, TaskMetric
from crossflow.data.images import rgb_to_y

HIGHEST_PSNR = 100.0  # dB; of equal pictures it is infinite, which no mean survives
SSIM_WINDOW = 11


class SrMetric(TaskMetric):
    """psnr_y, ssim_y, psnr_rgb, ssim_rgb for uint8 (H, W, 3) outputs and (H, W, 3) or grey (H, W) truths, dB and 0..1.

    A grey truth is scored on its own channel instead of luma (psnr_y, ssim_y), as the tables' MATLAB scripts do; a
    coloured output is converted to grey.

    Both pictures are cropped from the top left to a multiple of the scale, then `shave` pixels are left out at every
    side. SSIM on RGB is the mean over the three channels. A side shorter than 11 pixels has no SSIM: its row says None.

    Args:
        scale: how many times the input was enlarged.
        shave: pixels left out at every side; None means `scale`, the custom of the published tables.
        lpips: a perceptual distance of two pictures, uint8 (H, W, 3); gives the number "lpips".
    """

    names: tuple[str, ...] = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")

    def __init__(
        self,
        scale: int = 4,
        shave: int | None = None,
        lpips: Callable[[np.ndarray, np.ndarray], float] | None = None,
    ) -> None:
        super().__init__()
        if scale < 1 or (shave is not None and shave < 0):
            raise UserError(f"scale must be at least 1 and shave at least 0, got scale {scale} and shave {shave}.")
        self.scale = scale
        self.shave = scale if shave is None else shave
        self._lpips = lpips
        if lpips is not None:
            self.names = (*self.names, "lpips")

    def score(self, output: np.ndarray, truth: np.ndarray) -> Row:
        """The row of one picture; see the class. Raises ValueError for pictures that do not fit together."""
        is_grey = truth.ndim == 2
        if is_grey:
            truth = np.repeat(truth[..., None], 3, axis=-1)
        for name, picture in (("output", output), ("truth", truth)):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
                raise ValueError(
                    f"the {name} must be uint8 (H, W, 3), rounded as it would be saved; "
                    f"got {picture.dtype} {picture.shape}"
                )
        height, width = (side // self.scale * self.scale for side in truth.shape[:2])
        if output.shape not in (truth.shape, (height, width, 3)):
            raise ValueError(f"the output has shape {output.shape} and the truth {truth.shape}")
        if min(height, width) <= 2 * self.shave:
            raise ValueError(
                f"nothing is left of {truth.shape[:2]} pixels at scale {self.scale} and shave {self.shave}"
            )
        inside = (slice(self.shave, height - self.shave), slice(self.shave, width - self.shave))
        a, b = output[inside], truth[inside]
        y_a, y_b = (_grey(picture) if is_grey else np.floor(rgb_to_y(picture) + 0.5) for picture in (a, b))
        row: Row = {
            "psnr_y": psnr(y_a, y_b),
            "ssim_y": ssim(y_a, y_b),
            "psnr_rgb": psnr(a, b),
            "ssim_rgb": ssim(a, b),
        }
        return row if self._lpips is None else row | {"lpips": self._lpips(a, b)}


def _grey(image: np.ndarray) -> np.ndarray:
    """Grey values 0..255, whole numbers (H, W), of uint8 (H, W, 3); the channel itself where all three are equal."""
    return np.floor((rgb_to_y(image) - 16) * (255 / 219) + 0.5)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape with values 0..255, at most 100."""
    error = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return min(HIGHEST_PSNR, 10 * float(np.log10(255**2 / error))) if error > 0 else HIGHEST_PSNR


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Structural similarity in [-1, 1] of two (H, W) or (H, W, C) arrays, values 0..255; None below 11 x 11 pixels."""
    from skimage.metrics import structural_similarity

    if min(a.shape[:2]) < SSIM_WINDOW:
        return None
    return float(
        structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,  # the weighted covariance of the paper
            data_range=255,
            channel_axis=-1 if a.ndim == 3 else None,
        )
    )
