"""`imagenet:DIR`, `div2k:DIR`, `set5:DIR`, `set14:DIR`, `b100:DIR`, `urban100:DIR`: pictures for super-resolution."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np

from crossflow.core.errors import PARSING_ERRORS, UserError
from crossflow.core.files import user_cache
from crossflow.data.files import IMAGE_SUFFIXES, image_files, inside, save_array, with_links
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.spec import Option, Options
from crossflow.data.splits import require_split, split_folders

logger = logging.getLogger(__name__)

VERSION = "1"  # of the stored sizes; changes with how they are read


class ImagenetReader(FileReader):
    """ImageNet as CrossFlow uses it: the central squares of pictures with sides of `min_side` pixels or more.

    Squares are reduced to `size`. Smaller pictures are left out, not bad. Sizes are read once and stored.
    """

    prefix = "imagenet"
    layout = "a folder with train/ and val/ (each of nNNNNNNNN/*.JPEG or *.JPEG), or ILSVRC/Data/CLS-LOC with these"
    offers = frozenset(("image",))
    options: ClassVar[Options] = {
        "min_side": Option("minimum of the shorter side in pixels", "256", number=True),
        "size": Option("side in pixels to which squares are reduced; none: full size", "256", number=True),
    }

    def listing(self, path: Path, split: str) -> Listing:
        """The pictures of train/ or val/ that are large enough."""
        inner = path / "ILSVRC/Data/CLS-LOC"
        root = inner if inner.is_dir() else path
        folders = split_folders(root)
        if not folders:
            raise UserError(f"{self.spec!r} has neither train/ nor val/. Expected {self.layout}.")
        require_split(self.spec, split, folders)
        names = [
            f"{folder.name}/{name}"
            for word, folder in folders.items()
            if split in (word, "all")
            for name in image_files(folder)
        ]
        least = self.number_option("min_side") or 0
        sides = shorter_sides(root, names, with_links(root))
        records = [
            Record(name, name, problem="" if side else "its size cannot be read")
            for name, side in zip(names, sides, strict=True)
            if side >= least or not side
        ]
        logger.info("%s: %d of %d pictures are large enough.", self.spec, len(records), len(names))
        if names and not records:
            raise UserError(
                f"{self.spec!r}: none of the {len(names)} pictures has a shorter side of {least:g} pixels or more. "
                "For smaller pictures, write ?min_side=64&size=64."
            )
        return Listing(root, records, with_links(root))

    def read(self, record: Record) -> tuple[np.ndarray, None]:
        """The central square of a picture, reduced to `size`."""
        from crossflow.data.resize import center_crop_resize

        image, _ = super().read(record)
        size = self.number_option("size")
        return center_crop_resize(image, min(image.shape[:2]) if size is None else int(size)), None

    @classmethod
    def recognise(cls, path: Path) -> str:
        """A folder train/n0*."""
        train = path / "train"
        synset = next((child for child in train.glob("n0*") if child.is_dir()), None) if train.is_dir() else None
        return f"train/{synset.name}" if synset else ""


class Div2kReader(FileReader):
    """DIV2K (Agustsson and Timofte, 2017): 800 pictures for training, 100 for validation."""

    prefix = "div2k"
    layout = "a folder with DIV2K_train_HR/ and DIV2K_valid_HR/"
    offers = frozenset(("image",))
    parts: ClassVar[dict[str, tuple[str, int]]] = {"train": ("DIV2K_train_HR", 800), "val": ("DIV2K_valid_HR", 100)}

    def listing(self, path: Path, split: str) -> Listing:
        """The pictures of a published folder."""
        present = {word: part for word, part in self.parts.items() if (path / part[0]).is_dir()}
        if not present:
            raise UserError(f"{self.spec!r} has none of the published folders. Expected {self.layout}.")
        require_split(self.spec, split, present, "the test pictures were never published")
        records = []
        for folder, count in (part for word, part in present.items() if split in (word, "all")):
            names = image_files(path / folder)
            if len(names) != count:
                logger.warning(
                    "%s has %d pictures in %s; the published one has %d.", self.spec, len(names), folder, count
                )
            records += [Record(Path(name).stem, f"{folder}/{name}") for name in names]
        return Listing(path, records, with_links(path))

    @classmethod
    def recognise(cls, path: Path) -> str:
        """One of the published folders."""
        return next((folder for folder, _ in cls.parts.values() if (path / folder).is_dir()), "")


class PictureSet(FileReader):
    """A complete set of pictures that is scored as a whole: `val`, `test` and `all` are the same."""

    offers = frozenset(("image",))
    names: ClassVar[tuple[str, ...]]
    count: ClassVar[int]

    def listing(self, path: Path, split: str) -> Listing:
        """All pictures. Raises UserError unless their number is the published one."""
        require_split(self.spec, split, ("val", "test"), "it is scored, never trained on")
        inner = ("", "original", "HR", "image_SRF_4", "image_SRF_2", "image_SRF_3")
        folders = [path / name / part for name in ("", *self.names) for part in inner]
        pictures = {folder: _pictures(folder) for folder in folders if folder.is_dir()}
        for folder, names in pictures.items():
            if len(names) == self.count:
                return Listing(folder, [Record(Path(name).stem, name) for name in names])
        counts = ", ".join(f"{len(names)} in {folder}" for folder, names in pictures.items() if names)
        raise UserError(
            f"{self.spec!r}: {self.names[0]} has {self.count} pictures, got {counts or 'none'}. A score on others "
            f"would not be comparable; to score any pictures, write 'folder:{path}@all'."
        )


class Set5Reader(PictureSet):
    """Set5 (Bevilacqua et al., 2012)."""

    prefix, names, count = "set5", ("Set5",), 5
    layout = "Set5: its 5 pictures, or a folder with Set5/ (or SelfExSR's image_SRF_4/*_HR.png)"


class Set14Reader(PictureSet):
    """Set14 (Zeyde et al., 2010)."""

    prefix, names, count = "set14", ("Set14",), 14
    layout = "Set14: its 14 pictures, or a folder with Set14/ (or SelfExSR's image_SRF_4/*_HR.png)"


class B100Reader(PictureSet):
    """The test pictures of BSDS300 (Martin et al., 2001)."""

    prefix, names, count = "b100", ("B100", "BSD100", "BSDS100"), 100
    layout = "B100: the 100 test pictures of BSDS300, or a folder with B100/ or BSD100/"


class Urban100Reader(PictureSet):
    """Urban100 (Huang et al., 2015)."""

    prefix, names, count = "urban100", ("Urban100",), 100
    layout = "Urban100: its 100 pictures, or a folder with Urban100/ (or SelfExSR's image_SRF_4/*_HR.png)"


def _pictures(folder: Path) -> list[str]:
    """The pictures in a folder, not below it; of pairs only the high-resolution ones."""
    names = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    sharp = [name for name in names if Path(name).stem.endswith("_HR")]
    return sharp or names


def shorter_sides(root: Path, names: Sequence[str], allowed: Sequence[Path]) -> list[int]:
    """The shorter side of each picture in pixels, 0 if unreadable; stored in the user's cache directory."""
    folders = [folder.resolve() for folder in allowed]
    digest = hashlib.blake2b(VERSION.encode(), digest_size=16)
    for name in names:
        try:
            size = (root / name).stat().st_size
        except OSError:
            size = -1
        digest.update(f"{name}\0{size}\0".encode("utf-8", "replace"))
    store = user_cache() / "picture-sizes" / f"{digest.hexdigest()}.npy"
    try:
        stored = np.load(store, allow_pickle=False)
        if stored.shape == (len(names),):
            return [int(side) for side in stored]
    except (OSError, ValueError, EOFError):
        pass  # missing or damaged: read again
    if len(names) > 10_000:
        logger.warning("Reading the sizes of %d pictures (only once).", len(names))
    with ThreadPoolExecutor(8) as pool:
        sides = list(pool.map(lambda name: _shorter_side(root, name, folders), names, chunksize=64))
    save_array(store, np.array(sides, dtype=np.int32))
    return sides


def _shorter_side(root: Path, name: str, allowed: Sequence[Path]) -> int:
    from PIL import Image

    try:
        with Image.open(inside(root, name, allowed)) as image:
            return min(image.size)
    except (*PARSING_ERRORS, Image.DecompressionBombError):
        return 0
