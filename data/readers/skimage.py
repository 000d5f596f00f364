"""`skimage`: eight photographs of the installed scikit-image, one of them with metric depth.

Smoke data: real pixels without a download.
"""

import copy
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader

# Middlebury 2014 "Motorcycle" at a quarter of its size, as scikit-image's `stereo_motorcycle` documents it.
FOCAL_LENGTH = 994.978  # pixels
BASELINE = 0.193001  # metres
DISPARITY_OFFSET = 31.086  # pixels, the difference of the two principal points


@dataclass(frozen=True)
class Piece:
    """A photograph or its part `box` = (top, bottom, left, right) in pixels; `disparity` is a file name."""

    id: str
    split: str
    file: str
    box: tuple[int, int, int, int] | None = None
    disparity: str = ""


def _motorcycle(part: str, split: str, box: tuple[int, int, int, int]) -> Piece:
    return Piece(f"motorcycle_{part}", split, "motorcycle_left.png", box, "motorcycle_disp.npz")


# The one photograph with depth is divided, so that every split has depth and training sees no part of another split.
PIECES = (
    Piece("astronaut", "train", "astronaut.png"),
    Piece("camera", "train", "camera.png"),
    Piece("coffee", "train", "coffee.png"),
    Piece("gravel", "train", "gravel.png"),
    Piece("hubble_deep_field", "train", "hubble_deep_field.jpg"),
    _motorcycle("left", "train", (0, 500, 0, 371)),
    Piece("rocket", "val", "rocket.jpg"),
    _motorcycle("upper_right", "val", (0, 250, 371, 741)),
    Piece("chelsea", "test", "chelsea.png"),
    _motorcycle("lower_right", "test", (250, 500, 371, 741)),
)


class SkimageReader(Reader):
    """Photographs for super-resolution; for tasks with depth, the pieces of the one with depth. No captions."""

    prefix = "skimage"
    layout = "no location: the photographs are part of the installed scikit-image"
    embedded = True
    offers = frozenset(("image", "depth"))

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        if location:
            raise UserError(
                f"'skimage:{location}' has a location, but the photographs come with scikit-image: write 'skimage'."
            )
        self.spec, self.split, self.fields = self.prefix, split, self.offers
        self.folder = _data_folder()
        self._set_pieces([piece for piece in PIECES if split in (piece.split, "all")][:limit])

    def _set_pieces(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.ids = [piece.id for piece in pieces]

    def __getitem__(self, index: int) -> Item:
        from crossflow.data.images import is_grey, load_image

        piece = self.pieces[index]
        top, bottom, left, right = piece.box or (None, None, None, None)
        try:
            image = load_image(self.folder / piece.file)[top:bottom, left:right]
            depth = _depth(self.folder / piece.disparity)[top:bottom, left:right] if piece.disparity else None
        except (ValueError, OSError) as error:
            raise BadItem(piece.id, f"{error} ({piece.file} of the installed scikit-image)") from error
        return Item(
            piece.id,
            np.ascontiguousarray(image),
            depth=None if depth is None else np.ascontiguousarray(depth),
            grey=is_grey(image, self.folder / piece.file),
        )

    def with_required(self, fields: Collection[str]) -> "SkimageReader":
        """For `depth`, only the pieces that have it."""
        assert self.fields.issuperset(fields)
        reader = copy.copy(self)
        reader._set_pieces([piece for piece in self.pieces if piece.disparity or "depth" not in fields])
        return reader

    def fingerprint(self) -> str:
        """From the pieces and the bytes of their files."""
        digest = hashlib.blake2b(digest_size=16)
        for piece in self.pieces:
            digest.update(repr(piece).encode())
            for name in (piece.file, piece.disparity):
                path = self.folder / name
                if name and path.is_file():
                    digest.update(path.read_bytes())
        return digest.hexdigest()


def _data_folder() -> Path:
    """The folder of the photographs, located without importing scikit-image. Nothing is ever downloaded."""
    from importlib.util import find_spec

    package = find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "The data 'skimage' are part of the package scikit-image, which is not installed: pip install scikit-image."
        )
    return Path(package.submodule_search_locations[0]) / "data"


def _depth(file: Path) -> np.ndarray:
    """z = f b / (disparity + offset), float32 (H, W) metres; 0 where the disparity (pixels) is not finite."""
    with np.load(file, allow_pickle=False) as archive:
        disparity = archive["arr_0"].astype(np.float64)
    known = np.isfinite(disparity)
    depth = FOCAL_LENGTH * BASELINE / (np.where(known, disparity, 0.0) + DISPARITY_OFFSET)
    return np.where(known, depth, 0.0).astype(np.float32)
