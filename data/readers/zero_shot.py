"""`vkitti:DIR`, `eth3d:DIR`, `scannet:DIR`, `diode:DIR`: the other data sets of the zero-shot depth table."""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import image_files, with_links
from crossflow.data.item import Record
from crossflow.data.reader import Listing
from crossflow.data.readers.depth import LIST, DepthReader, cap_option, read_npy_array, stem
from crossflow.data.spec import Option, Options
from crossflow.data.splits import require_split, split_by_hash, split_folders


class VirtualKittiReader(DepthReader):
    """Virtual KITTI 2 (Cabon et al., 2020).

    Depth is 16-bit PNG in centimetres; 65535, the sky, is no measurement. The variations of a scene show the same
    street, so a hash of the scenes divides the splits.
    """

    prefix = "vkitti"
    layout = "a folder with SceneNN/VARIATION/frames/rgb/Camera_0/rgb_N.jpg and .../depth/Camera_0/depth_N.png"
    options: ClassVar[Options] = {"cap": cap_option("80"), "list": LIST}
    units_per_metre = 100.0
    sky = 655.35  # metres

    def list_pairs(self, path: Path, split: str) -> Listing:
        """The frames of all variations of the scenes of a split."""
        scenes = {child.name: child for child in sorted(path.glob("Scene[0-9][0-9]")) if child.is_dir()}
        if not scenes:
            raise UserError(f"{self.spec!r} has no scenes (Scene01, ...). Expected {self.layout}.")
        records = []
        for name in sorted(split_by_hash(self.spec, scenes, split)):
            for image in sorted(scenes[name].glob("*/frames/rgb/Camera_*/rgb_*.jpg")):
                rgb = image.relative_to(path).as_posix()
                depth = re.sub(r"/rgb/(Camera_\d+)/rgb_(.*)\.jpg$", r"/depth/\1/depth_\2.png", rgb)
                records.append(Record(stem(rgb), rgb, depth=depth))
        return Listing(path, records, with_links(path))

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image, and depth in metres without the sky."""
        from crossflow.data.images import load_depth_png, load_image

        depth = load_depth_png(self.path(record.depth), units_per_metre=self.units_per_metre)
        return load_image(self.path(record.image)), np.where(depth < np.float32(self.sky), depth, 0)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """A scene folder."""
        folder = next(path.glob("Scene[0-9][0-9]/*/frames/rgb"), None) if path.is_dir() else None
        return folder.relative_to(path).as_posix() if folder else ""


class Eth3dReader(DepthReader):
    """ETH3D's high-resolution training scenes (Schoeps et al., 2017), which are only scored.

    Depth files are raw float32 values in metres, one per pixel, infinite where nothing was measured.
    """

    prefix = "eth3d"
    layout = "a folder with SCENE/images/dslr_images/NAME.JPG and SCENE/ground_truth_depth/dslr_images/NAME.JPG"
    options: ClassVar[Options] = {"cap": cap_option("none"), "list": LIST}

    def list_pairs(self, path: Path, split: str) -> Listing:
        """All pictures of all scenes."""
        require_split(self.spec, split, ("test",), "it is scored, never trained on")
        records = []
        for folder in sorted(path.glob("*/images/dslr_images")):
            scene = folder.parent.parent
            for name in image_files(folder):
                depth = f"{scene.name}/ground_truth_depth/dslr_images/{name}"
                records.append(
                    Record(f"{scene.name}/{stem(name)}", f"{scene.name}/images/dslr_images/{name}", depth=depth)
                )
        return Listing(path, records, with_links(path))

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image as stored, and its depth in metres."""
        from crossflow.data.images import load_image

        image = load_image(self.path(record.image), upright=False)  # depth is stored in the pixels' orientation
        values = np.fromfile(self.path(record.depth), dtype="<f4")
        height, width = image.shape[:2]
        if values.size != height * width:
            raise ValueError(f"{record.depth} has {values.size} values, the picture {height} x {width} pixels")
        return image, values.reshape(height, width)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """A folder of ground-truth depth."""
        folder = next(path.glob("*/ground_truth_depth/dslr_images"), None) if path.is_dir() else None
        return folder.relative_to(path).as_posix() if folder else ""


class ScannetReader(DepthReader):
    """Exported frames of ScanNet (Dai et al., 2017).

    Depth is 16-bit PNG in millimetres, of lower resolution than the picture, which is reduced to it. Neighbouring
    frames are alike, so the option `every` takes every n-th one.
    """

    prefix = "scannet"
    layout = (
        "a folder with scannetv2_train.txt, scannetv2_val.txt or scannetv2_test.txt (a scene per line) and "
        "scans/SCENE/color/N.jpg and scans/SCENE/depth/N.png (scans/ may also be named scans_test/ or left out)"
    )
    options: ClassVar[Options] = {
        "every": Option("take every n-th frame of a scene", "1", number=True),
        "cap": cap_option("none"),
        "list": LIST,
    }

    def list_pairs(self, path: Path, split: str) -> Listing:
        """The frames of the scenes of a list."""
        lists = {name: path / f"scannetv2_{name}.txt" for name in ("train", "val", "test")}
        lists = {name: file for name, file in lists.items() if file.is_file()}
        scenes = {
            folder.parent.name: folder.parent
            for pattern in ("scene*/color", "scans/scene*/color", "scans_test/scene*/color")
            for folder in sorted(path.glob(pattern))
        }
        if not lists and split != "all":
            raise UserError(
                f"{self.spec!r} has no scene lists. Put scannetv2_train.txt, scannetv2_val.txt and scannetv2_test.txt "
                f"(from the data set's repository) there, or write '{self.spec}@all'."
            )
        require_split(self.spec, split, lists)
        names = sorted(scenes) if split == "all" else lists[split].read_text(encoding="utf-8-sig").split()
        step = self.number_option("every")
        if step is None or step != int(step):
            raise UserError(f"{self.spec!r}: every is {self.option['every']!r}; it must be a whole number.")
        records = []
        for name in names:
            if name not in scenes:
                records.append(Record(name, problem="the scene is in the list but has no folder"))
                continue
            files = [file for file in scenes[name].glob("color/*") if file.stem.isdigit()]
            for image in sorted(files, key=lambda file: int(file.stem))[:: int(step)]:
                depth = (scenes[name] / "depth" / f"{image.stem}.png").relative_to(path).as_posix()
                rgb = image.relative_to(path).as_posix()
                records.append(Record(f"{name}/{image.stem}", rgb, depth=depth))
        return Listing(path, records, with_links(path))

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image at the depth's resolution, and the depth in metres."""
        from crossflow.data.resize import center_crop_resize

        image, depth = super().read_pair(record)
        height, width = depth.shape
        if abs(image.shape[1] * height - image.shape[0] * width) > 0.02 * image.shape[0] * width:
            raise ValueError(
                f"the aspect ratio of the picture, {image.shape[0]}x{image.shape[1]}, is not that of its depth, "
                f"{height}x{width}"
            )
        if image.shape[:2] != depth.shape:
            image = center_crop_resize(image, (height, width))
        return image, depth

    @classmethod
    def recognise(cls, path: Path) -> str:
        """A scene list."""
        file = next(path.glob("scannetv2_*.txt"), None) if path.is_dir() else None
        return file.name if file else ""


class DiodeReader(DepthReader):
    """DIODE (Vasiljevic et al., 2019): laser depth indoors and outdoors. The test depth was never published."""

    prefix = "diode"
    layout = (
        "a folder with train/ or val/ of indoors|outdoor/SCENE/SCAN/NAME.png, NAME_depth.npy and NAME_depth_mask.npy"
    )
    options: ClassVar[Options] = {
        "part": Option("type of scenes", "both", ("both", "indoors", "outdoor")),
        "cap": cap_option("none"),
        "list": LIST,
    }

    def list_pairs(self, path: Path, split: str) -> Listing:
        """The pictures below train/ or val/."""
        folders = split_folders(path)
        if not folders:
            raise UserError(f"{self.spec!r} has neither train/ nor val/. Expected {self.layout}.")
        require_split(self.spec, split, folders, "the tables score val")
        parts = ("indoors", "outdoor", "outdoors") if self.option["part"] == "both" else (self.option["part"],)
        records = []
        for folder in (inner for name, inner in folders.items() if split in (name, "all")):
            for name in image_files(folder):
                if name.split("/")[0] not in parts:
                    continue
                rgb = f"{folder.name}/{name}"
                records.append(Record(stem(rgb), rgb, depth=f"{stem(rgb)}_depth.npy"))
        return Listing(path, records, with_links(path))

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image, and its depth in metres inside its mask."""
        from crossflow.data.images import load_image

        depth = read_npy_array(self.path(record.depth), (2, 3))
        mask = read_npy_array(self.path(f"{stem(record.depth)}_mask.npy"), (2, 3))
        depth, mask = (array[..., 0] if array.ndim == 3 else array for array in (depth, mask))
        if mask.shape != depth.shape:
            raise ValueError(f"its mask is {mask.shape}, its depth {depth.shape}")
        return load_image(self.path(record.image)), np.where(mask > 0, depth, 0)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """A folder of indoor or outdoor scenes."""
        return next((name for name in ("val/indoors", "val/outdoor", "train/indoors") if (path / name).is_dir()), "")
