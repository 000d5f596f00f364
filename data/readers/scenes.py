"""`scenes`: the embedded procedural world of `crossflow.data.scenes`, which needs no files."""

import hashlib
from collections.abc import Sequence

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader

NUM_SCENES = {"train": 20_000, "val": 500, "test": 1_000}
DEFAULT_SIZE = 64
PIXELS_PER_CALL = 2**20  # of the renderer, which needs a few hundred bytes for each pixel


class ScenesReader(Reader):
    """Rendered scenes with captions, metric depth and attributes. `load` renders several at once, which is faster.

    `limit` may exceed the default number of scenes: any number exists, and scene i is always the same.
    """

    prefix = "scenes"
    layout = "no location: scenes are rendered on the fly"
    embedded = True
    offers = frozenset(("image", "captions", "depth", "scene"))
    batch_hint = 32

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        if location:
            raise UserError(f"'scenes:{location}' has a location, but scenes are not read from files: write 'scenes'.")
        if split == "all":
            raise UserError("'scenes' has the splits train, val and test, each of unlimited size; 'all' is undefined.")
        self.spec, self.split = self.prefix, split
        self.size = image_size or DEFAULT_SIZE
        self.fields = self.offers
        self.ids = [f"{split}/{index:06d}" for index in range(limit or NUM_SCENES[split])]

    def __getitem__(self, index: int) -> Item:
        (item,) = self.load([index])
        assert isinstance(item, Item)
        return item

    def captions(self, index: int) -> tuple[str, ...]:
        """The five captions of scene `index`, without rendering it."""
        from crossflow.data.scenes import captions, make_scene, scene_seed

        return captions(make_scene(scene_seed(self.split, index)))

    def load(self, indices: Sequence[int]) -> list[Item | BadItem]:
        """Several scenes, rendered together."""
        from crossflow.data.scenes import captions, make_scene, render, scene_seed

        ids = [self.ids[index] for index in indices]  # raises IndexError
        scenes = [make_scene(scene_seed(self.split, index % len(self))) for index in indices]
        items: list[Item | BadItem] = []
        part = max(1, PIXELS_PER_CALL // self.size**2)
        for start in range(0, len(scenes), part):
            images, depths, _ = render(scenes[start : start + part], self.size)
            for number, scene in enumerate(scenes[start : start + part]):
                # Copies, so that an item in memory does not hold the arrays of its whole part.
                image, depth = images[number].copy(), depths[number].copy()
                items.append(Item(ids[start + number], image, captions(scene), depth, scene))
        return items

    def fingerprint(self) -> str:
        """From the number, the size and the first four rendered scenes, so that it changes with the renderer."""
        digest = hashlib.blake2b(f"{self.spec} {self.split} {len(self)} {self.size}".encode(), digest_size=16)
        for item in self.load(range(min(4, len(self)))):
            assert isinstance(item, Item)
            assert item.image is not None
            assert item.depth is not None
            digest.update("\n".join(item.captions).encode() + item.image.tobytes() + item.depth.tobytes())
        return digest.hexdigest()
