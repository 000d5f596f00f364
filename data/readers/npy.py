"""`npy:DIR`: feature folders of the released CrossFlow scripts, one .npy file per sample.

Such a file holds a pickled dictionary of arrays, which `safe_pickle` reads without executing it.
"""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.annotations import json_lines
from crossflow.data.files import inside
from crossflow.data.item import BadItem, Item, Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.safe_pickle import read_npy
from crossflow.data.splits import split_by_hash

CAPTIONS = ("batch_caption", "promt", "prompt", "caption")
ARRAYS = ("image_latent_", "token_embedding", "token_mask")
CAPTION_NUMBER = re.compile(r"(\d+)_(\d+)")


class NpyReader(FileReader):
    """Items with released features, which `crossflow cache` imports.

    A training folder (img_text_pair.jsonl, imgs/, features/) has pictures too. In a validation folder N.npy holds the
    moments of picture N, and N_0.npy, N_1.npy, ... its captions.
    """

    prefix = "npy"
    layout = (
        "a folder of .npy files written by the released CrossFlow scripts, or one with features/ and imgs/ in it "
        "(import it by crossflow cache)"
    )
    offers = frozenset(("image", "captions", "released"))

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(location, split, image_size=image_size, limit=limit, seed=seed)
        self.size = image_size
        with_images = any(record.image for record in self.records)
        self.fields = frozenset({"captions", "released"} | ({"image"} if with_images else set()))

    def listing(self, path: Path, split: str) -> Listing:
        """The feature files."""
        root = path if path.is_dir() else path.parent
        folder = root / "features" if (root / "features").is_dir() else root
        names = sorted(file.stem for file in folder.glob("*.npy"))
        several = {name for name in names if (m := CAPTION_NUMBER.fullmatch(name)) and m[1] in names}
        names = [name for name in names if name != "empty_context" and f"{name}_0" not in several]
        if not names:
            raise UserError(f"{self.spec!r} has no .npy files. Expected {self.layout}.")
        members = split_by_hash(self.spec, names, split)
        images = _images(root)
        prefix = folder.relative_to(root)
        # The second file of a record, `depth`, is the feature file.
        records = [
            Record(name, images.get(name, ""), depth=(prefix / f"{name}.npy").as_posix())
            for name in names
            if name in members
        ]
        return Listing(root, records, (root, folder, *([root / "imgs"] if (root / "imgs").is_dir() else [])))

    def __getitem__(self, index: int) -> Item:
        from crossflow.data.images import load_image

        record = self.records[index]
        try:
            content = read_npy(inside(self.root, record.depth, self.allowed))
            if not isinstance(content, dict):
                raise ValueError(f"it holds {type(content).__name__}, not a dictionary")
            caption = next((content[name] for name in CAPTIONS if isinstance(content.get(name), str)), None)
            if caption is None:
                raise ValueError(f"it has no caption under {', '.join(CAPTIONS)}")
            arrays = {
                name: value
                for name, value in content.items()
                if name.startswith(ARRAYS) and isinstance(value, np.ndarray)
            }
            arrays |= self._moments_beside(record)
            image = load_image(inside(self.root, record.image, self.allowed)) if record.image else None
        except (ValueError, OSError) as error:
            raise BadItem(record.id, str(error)) from error
        return Item(record.id, image, (caption,), features=arrays)

    def _moments_beside(self, record: Record) -> dict[str, np.ndarray]:
        """The moments in a validation folder, where each picture has a file of its own."""
        match = CAPTION_NUMBER.fullmatch(record.id)
        beside = Path(record.depth).with_name(f"{match[1]}.npy").as_posix() if match else ""
        if not beside or not (self.root / beside).is_file():
            return {}
        moments = read_npy(inside(self.root, beside, self.allowed))
        if not isinstance(moments, np.ndarray) or moments.ndim != 3:
            raise ValueError(f"{beside} does not hold moments (2C, h, w)")
        return {f"image_latent_{8 * moments.shape[-1]}": moments}  # the released autoencoder reduces 8 times

    def with_required(self, fields: Collection[str]) -> "NpyReader":
        """The same data: whether an item has the fields is known only when its file is read."""
        assert self.fields.issuperset(fields)
        return self

    def captions(self, index: int) -> tuple[str, ...]:
        """The caption of item `index`; none when its file is unusable."""
        try:
            return self[index].captions
        except BadItem:
            return ()

    @classmethod
    def recognise(cls, path: Path) -> str:
        """.npy files in the folder or in features/."""
        has_features = path.is_dir() and any(any(place.glob("*.npy")) for place in (path, path / "features"))
        return ".npy files" if has_features else ""


def _images(root: Path) -> dict[str, str]:
    """name of a feature file without its ending -> its picture, according to img_text_pair.jsonl."""
    file = root / "img_text_pair.jsonl"
    if not file.is_file() or not (root / "imgs").is_dir():
        return {}
    lines = (line for _, line in json_lines(file) if isinstance(line, dict))
    paths = [line["img_path"] for line in lines if isinstance(line.get("img_path"), str)]
    return {Path(path).stem: (Path("imgs") / path).as_posix() for path in paths}
