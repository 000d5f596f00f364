"""`scenes`: the embedded procedural world, which needs no files. See `crossflow.data.scenes`."""

import hashlib
from collections.abc import Sequence

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader

NUM_SCENES = {"train": 20_000, "val": 500, "test": 1_000}
DEFAULT_SIZE = 64
PIXELS_TOGETHER = 2**20  # per call of the renderer, which holds a few hundred bytes for each


class ScenesReader(Reader):
    """Rendered scenes with captions, metric depth and attributes. `load` renders its scenes together: the fast way.

    `limit` may also ask for more than the usual number: the world does not end, and scene i stays the same.
    """

    prefix = "scenes"
    layout = "nothing behind it: the scenes are made on the fly"
    embedded = True
    offers = frozenset(("image", "captions", "depth", "scene"))
    batch_hint = 32

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        if location:
            raise UserError(f"'scenes:{location}' names a place, but scenes have none: write 'scenes'.")
        if split == "all":
            raise UserError("'scenes' has the splits train, val and test, without end; there is no 'all' of them.")
        self.spec, self.split = self.prefix, split
        self.size = image_size or DEFAULT_SIZE
        self.fields = self.offers
        self.ids = [f"{split}/{index:06d}" for index in range(limit or NUM_SCENES[split])]

    def __getitem__(self, index: int) -> Item:
        (item,) = self.load([index])
        assert isinstance(item, Item)
        return item

    def captions(self, index: int) -> tuple[str, ...]:
        from crossflow.data.scenes import captions, make_scene, scene_seed

        return captions(make_scene(scene_seed(self.split, index)))

    def load(self, indices: Sequence[int]) -> list[Item | BadItem]:
        from crossflow.data.scenes import captions, make_scene, render, scene_seed

        ids = [self.ids[index] for index in indices]  # an index out of range stops here
        scenes = [make_scene(scene_seed(self.split, index % len(self))) for index in indices]
        items: list[Item | BadItem] = []
        part = max(1, PIXELS_TOGETHER // self.size**2)
        for start in range(0, len(scenes), part):
            images, depths, _ = render(scenes[start : start + part], self.size)
            for number, scene in enumerate(scenes[start : start + part]):
                # Copies, so that an item kept in memory does not keep its whole part.
                image, depth = images[number].copy(), depths[number].copy()
                items.append(Item(ids[start + number], image, captions(scene), depth, scene))
        return items

    def fingerprint(self) -> str:
        """Of the number, the size and the first four scenes as rendered, so a change of the world shows."""
        digest = hashlib.blake2b(f"{self.spec} {self.split} {len(self)} {self.size}".encode(), digest_size=16)
        for item in self.load(range(min(4, len(self)))):
            assert isinstance(item, Item)
            assert item.image is not None
            assert item.depth is not None
            digest.update("\n".join(item.captions).encode() + item.image.tobytes() + item.depth.tobytes())
        return digest.hexdigest()
