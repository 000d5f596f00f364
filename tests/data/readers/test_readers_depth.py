"""The readers of depth benchmarks, each on a miniature of the published layout that is written here."""

import csv
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader, require
from crossflow.data.readers.depth import CROPS, mask_unscored
from crossflow.data.readers.hypersim import planar_depth
from crossflow.tasks.depth import metric as depth_metric

H, W = 48, 64
h5py = pytest.importorskip("h5py")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def picture(path: Path, height: int = H, width: int = W, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (colour, 90, 30)).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    return path


def png16(path: Path, units: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(units.astype(np.uint16)).save(path)
    return path


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def items(reader: Reader) -> dict[str, Item]:
    return {item.id: item for item in reader.load(range(len(reader))) if isinstance(item, Item)}


def reasons(reader: Reader) -> dict[str, str]:
    return {item.id: item.reason for item in reader.load(range(len(reader))) if isinstance(item, BadItem)}


# ------------------------------------------------------------------------------------------------------ crops and caps


def test_crops_equal_those_of_the_metric():
    assert CROPS == depth_metric.CROPS


def test_crops_in_pixels_equal_the_published_ones():
    """Garg's rows 153 to 371 and columns 44 to 1197 of 375 x 1242, Eigen's rows 45 to 471 and columns 41 to 601."""
    rows, columns = np.nonzero(mask_unscored(np.ones((375, 1242)), "garg"))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (153, 371, 44, 1197)
    rows, columns = np.nonzero(mask_unscored(np.ones((480, 640)), "nyu"))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (45, 471, 41, 601)


@pytest.mark.parametrize("crop", sorted(CROPS))
def test_masked_depth_scores_as_in_the_metrics_own_crop(crop, rng):
    truth = rng.uniform(0.5, 120, (375, 1242)).astype(np.float32) * (rng.random((375, 1242)) < 0.2)
    guess = rng.uniform(0.5, 80, truth.shape).astype(np.float32)
    own = depth_metric.DepthMetric(max_depth=80, crop=crop).score(guess, truth)
    expected_score = depth_metric.DepthMetric(max_depth=80).score(guess, mask_unscored(truth, crop, 80))
    assert own == expected_score
    assert own["num_pixels"] > 1000


# ----------------------------------------------------------------------------------------------------------------- nyu


def labelled_file(folder: Path, rng: np.random.Generator, total: int = 4) -> dict[str, np.ndarray]:
    """nyu_depth_v2_labeled.mat as MATLAB 7.3 writes it (arrays transposed, 512 bytes in front), and splits.mat."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "images": rng.integers(0, 256, (total, 3, 640, 480), dtype=np.uint8),
        "depths": rng.uniform(0.5, 12, (total, 640, 480)).astype(np.float32),
    }
    arrays["rawDepths"] = arrays["depths"] * (rng.random((total, 640, 480)) < 0.8)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = array
    savemat(folder / "splits.mat", {"trainNdxs": np.array([[1], [4]]), "testNdxs": np.array([[2], [3]])})
    return arrays


def test_nyu_labelled_file(tmp_path, rng):
    arrays = labelled_file(tmp_path, rng)
    train, val, test = (open_reader(f"nyu:{tmp_path}", split) for split in ("train", "val", "test"))
    assert (train.ids, val.ids, test.ids) == (["0004"], ["0001"], ["0002", "0003"])
    item = train[0]
    np.testing.assert_array_equal(item.image, arrays["images"][3].transpose(2, 1, 0))
    np.testing.assert_array_equal(item.depth, arrays["rawDepths"][3].T)  # training sees all of it
    scored_depth, raw = test[0].depth, arrays["rawDepths"][1].T
    inside = np.zeros(raw.shape, bool)
    inside[45:471, 41:601] = True
    np.testing.assert_array_equal(scored_depth, np.where(inside & (raw < 10), raw, 0))
    whole = open_reader(f"nyu:{tmp_path}/nyu_depth_v2_labeled.mat?crop=none&cap=none&depth=filled", "test")
    np.testing.assert_array_equal(whole[0].depth, arrays["depths"][1].T)
    assert len({test.fingerprint(), whole.fingerprint(), train.fingerprint()}) == 3
    assert len(open_reader(str(tmp_path), "all")) == 4


def test_nyu_errors_name_missing_files(tmp_path, rng, monkeypatch):
    labelled_file(tmp_path, rng, total=4)
    (tmp_path / "splits.mat").rename(tmp_path / "elsewhere.mat")
    with pytest.raises(UserError, match=r"put splits\.mat.*@all"):
        open_reader(f"nyu:{tmp_path}", "test")
    assert len(open_reader(f"nyu:{tmp_path}?splits=elsewhere.mat", "test")) == 2
    (tmp_path / "elsewhere.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match=r"cannot be read as splits\.mat"):
        open_reader(f"nyu:{tmp_path}?splits=elsewhere.mat", "test")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"pip install h5py, or .crossflow-toolkit\[hdf5\]"):
        open_reader(f"nyu:{tmp_path}", "all")
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(UserError, match=r"not a MATLAB 7\.3 file"):
        open_reader(f"nyu:{tmp_path}", "all")


def test_nyu_folders_of_the_official_split(tmp_path, rng):
    millimetres = rng.integers(500, 9000, (480, 640))
    for split, number in (("train", 3), ("train", 4), ("train", 5), ("test", 45)):
        picture(tmp_path / f"official_splits/{split}/kitchen/rgb_{number:05d}.jpg", 480, 640)
        png16(tmp_path / f"official_splits/{split}/kitchen/sync_depth_{number:05d}.png", millimetres)
    train, val, test = (open_reader(f"nyu:{tmp_path}", split) for split in ("train", "val", "test"))
    whole = {f"official_splits/train/kitchen/rgb_{number:05d}" for number in (3, 4, 5)}
    assert (len(train), len(val)) == (2, 1)
    assert {*train.ids, *val.ids} == whole
    np.testing.assert_allclose(train[0].depth, millimetres / 1000)
    number = train.ids[0][-5:]
    (tmp_path / f"official_splits/train/kitchen/sync_depth_{number}.png").unlink()
    train = open_reader(f"nyu:{tmp_path}", "train")
    assert reasons(train)[train.ids[0]] == f"sync_depth_{number}.png is missing beside it"
    assert test[0].depth[44].max() == 0 < test[0].depth[45].max()


def test_nyu_lists_of_pairs(tmp_path):
    text(tmp_path / "nyudepthv2_train_files_with_gt.txt", "/bath/rgb_00001.jpg /bath/sync_depth_00001.png 518.8")
    text(tmp_path / "nyudepthv2_test_files_with_gt.txt", "bath/rgb_00045.jpg bath/sync_depth_00045.png 518.8", "alone")
    for folder, number in (("sync", 1), ("official_splits/test", 45)):
        picture(tmp_path / folder / f"bath/rgb_{number:05d}.jpg", 480, 640)
        png16(tmp_path / folder / f"bath/sync_depth_{number:05d}.png", np.full((480, 640), 2000))
    assert open_reader(f"nyu:{tmp_path}", "train")[0].depth.min() == 2
    test = open_reader(f"nyu:{tmp_path}", "test")
    assert list(items(test)) == ["bath/rgb_00045"]
    assert "names no depth" in next(iter(reasons(test).values()))


# --------------------------------------------------------------------------------------------------------------- kitti

DRIVE = "2011_09_26/2011_09_26_drive_0002_sync"


def kitti(folder: Path, *, frames: tuple[int, ...] = (69, 70), part: str = "val", metres: float = 20.0) -> Path:
    for frame in frames:
        picture(folder / f"{DRIVE}/image_02/data/{frame:010d}.png", 375, 1242)
        units = np.zeros((375, 1242))
        units[::4, ::5] = metres * 256
        units[200, 600] = 90 * 256
        name = f"data_depth_annotated/{part}/{DRIVE.split('/')[1]}/proj_depth/groundtruth/image_02/{frame:010d}.png"
        png16(folder / name, units)
    return folder


def line(frame: int, depth: bool = True) -> str:
    truth = f"{DRIVE.split('/')[1]}/proj_depth/groundtruth/image_02/{frame:010d}.png"
    return f"{DRIVE}/image_02/data/{frame:010d}.png {truth if depth else 'None'} 721.5377"


def test_kitti_eigen_split(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    kitti(tmp_path)
    text(tmp_path / "eigen_test_files_with_gt.txt", line(69), line(70), line(71, depth=False))
    text(tmp_path / "eigen_train_files_with_gt.txt", line(69))
    test, train = (require(open_reader(f"kitti:{tmp_path}", s), {"image", "depth"}, "depth") for s in ("test", "train"))
    assert test.ids == [f"{DRIVE}/image_02/data/{frame:010d}" for frame in (69, 70)]
    assert "1 of 3 frames have no annotated depth" in caplog.text
    whole, visible = train[0].depth, test[0].depth
    assert whole[200, 600] == 90
    assert whole[0, 0] == 20
    assert visible[200, 600] == 0  # beyond 80 m
    rows, columns = np.nonzero(visible)
    assert rows.min() >= 153
    assert rows.max() < 371
    assert columns.min() >= 44
    assert columns.max() < 1197
    assert set(np.unique(visible)) == {0, 20}
    free = open_reader(f"kitti:{tmp_path}?crop=none&cap=none", "test")
    np.testing.assert_array_equal(free[0].depth, whole)
    eigen = open_reader(f"kitti:{tmp_path}?crop=eigen", "test")[0].depth
    assert np.nonzero(eigen)[0].min() < np.nonzero(visible)[0].min()
    cut = open_reader(f"kitti:{tmp_path}?benchmark=yes&crop=none&cap=none@test", "val")[0]
    np.testing.assert_array_equal(cut.depth, whole[23:, 13:1229])
    assert cut.image.shape == (352, 1216, 3)


def test_kitti_lists_that_name_frames(tmp_path):
    kitti(tmp_path, frames=(5,), part="train")
    text(tmp_path / "splits/eigen/test_files.txt", f"{DRIVE} 5 l", f"{DRIVE} 6 l", f"{DRIVE} 5 x")
    reader = open_reader(f"kitti:{tmp_path}", "test")
    assert list(items(reader)) == [f"{DRIVE}/image_02/data/{5:010d}"]
    assert "side 'x'" in next(iter(reasons(reader).values()))


@pytest.mark.slow
def test_kitti_takes_validation_frames_from_the_eigen_training_list(tmp_path):
    """Validating on the test list instead would choose models by their score."""
    kitti(tmp_path, frames=tuple(range(70)), part="train")
    text(tmp_path / "eigen_train_files_with_gt.txt", *(line(frame) for frame in range(60)))
    text(tmp_path / "eigen_test_files_with_gt.txt", *(line(frame) for frame in range(60, 70)))
    ids = {split: open_reader(f"kitti:{tmp_path}", split).ids for split in ("train", "val", "test", "all")}
    assert 1 <= len(ids["val"]) <= 4
    assert sorted([*ids["train"], *ids["val"]]) == sorted(ids["all"][:60])
    assert len(ids["test"]) == 10
    text(tmp_path / "eigen_train_files_with_gt.txt", *(line(frame) for frame in range(50)))
    assert set(open_reader(f"kitti:{tmp_path}", "train").ids) <= set(ids["train"])  # no frame moves
    val = open_reader(f"kitti:{tmp_path}@val", "train")[0].depth
    assert np.nonzero(val)[0].min() >= 153  # scored in the crop of the tables, as the test frames are
    text(tmp_path / "eigen_val_files_with_gt.txt", line(69))
    assert open_reader(f"kitti:{tmp_path}", "val").ids == [f"{DRIVE}/image_02/data/{69:010d}"]
    assert len(open_reader(f"kitti:{tmp_path}", "train")) == 50  # all of it, beside a list of its own


def test_kitti_refuses_an_incomplete_test_set_and_wrong_settings(tmp_path):
    kitti(tmp_path)
    lines = [line(69), line(70), *[line(number, depth=False) for number in range(100, 795)]]
    text(tmp_path / "eigen_test_files_with_gt.txt", *lines)
    with pytest.raises(UserError, match="652 have annotated depth, but the depth of 2 exists"):
        open_reader(f"kitti:{tmp_path}", "test")
    text(tmp_path / "eigen_test_files_with_gt.txt", line(500))
    reader = open_reader(f"kitti:{tmp_path}", "test")
    assert "no such file" in next(iter(reasons(reader).values()))
    for settings, message in (("crob=garg", "Did you mean 'crop'"), ("crop=gard", "'garg'"), ("cap=-1", "above 0")):
        with pytest.raises(UserError, match=message):
            open_reader(f"kitti:{tmp_path}?{settings}", "test")
    with pytest.raises(
        UserError, match=r"has test but nothing for 'val'\. Give other data for validation: data\.val=SPEC"
    ):
        open_reader(f"kitti:{tmp_path}", "val")
    with pytest.raises(UserError, match="no lists of the Eigen split"):
        open_reader(f"kitti:{tmp_path}/{DRIVE}", "test")


def test_a_list_cannot_name_files_outside_the_data(tmp_path):
    picture(tmp_path / "secret.png")
    png16(tmp_path / "depth.png", np.ones((H, W)))
    kitti(tmp_path / "data")
    text(tmp_path / "pairs.txt", "../secret.png ../depth.png", f"{line(69)}")
    reader = open_reader(f"kitti:{tmp_path}/data?list={tmp_path}/pairs.txt", "test")
    assert len(items(reader)) == 1
    assert "leaves the data folder" in reasons(reader)["../secret"]


# ------------------------------------------------------------------------------------------------------------ hypersim


def hypersim(folder: Path, scene: str, camera: str, frame: int, distance: np.ndarray) -> None:
    where = folder / scene / "images"
    picture(where / f"scene_{camera}_final_preview/frame.{frame:04d}.tonemap.jpg", *distance.shape)
    file = where / f"scene_{camera}_geometry_hdf5/frame.{frame:04d}.depth_meters.hdf5"
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as opened:
        opened["dataset"] = distance.astype(np.float16)


def test_a_wall_facing_the_camera_has_constant_depth():
    """A plane z = 3 m: the distances of its points are |(x, y, f)| z / f."""
    x, y = np.arange(1024) - 511.5, np.arange(768)[:, None] - 383.5
    distance = 3 * np.sqrt(x**2 + y**2 + 886.81**2) / 886.81
    np.testing.assert_allclose(planar_depth(distance), 3, rtol=1e-6)
    assert distance.max() > 3.6  # the corners of a picture are farther away than the wall is


def test_hypersim_follows_the_authors_table(tmp_path):
    distance = np.full((H, W), 4.0)
    distance[0, 0] = np.nan
    rows = []
    for number, split in enumerate(("train", "val", "test"), start=1):
        scene = f"ai_00{number}_001"
        hypersim(tmp_path, scene, "cam_00", 7, distance)
        rows += [(scene, "cam_00", 7, True, split), (scene, "cam_00", 8, False, split)]
    rows.append(("ai_055_010", "cam_01", 3, True, "train"))  # not downloaded
    with (tmp_path / "metadata_images_split_scene_v1.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name"])
        writer.writerows(rows)
    readers = {split: open_reader(f"hypersim:{tmp_path}", split) for split in ("train", "val", "test")}
    assert [reader.ids for reader in readers.values()] == [[f"ai_00{n}_001/cam_00/frame.0007"] for n in (1, 2, 3)]
    item = readers["train"][0]
    assert item.depth[0, 0] == 0
    assert item.depth[H // 2, W // 2] == pytest.approx(4, rel=1e-3)
    assert item.depth[H - 1, W - 1] < 3.6
    assert item.image.shape == (H, W, 3)


def test_hypersim_without_the_table_keeps_scenes_together(tmp_path, caplog):
    for number in range(1, 9):
        for frame in range(2):
            hypersim(tmp_path, f"ai_00{number}_001", "cam_00", frame, np.ones((H, W)))
    splits = {split: {id[:10] for id in open_reader(f"hypersim:{tmp_path}", split).ids} for split in ("train", "test")}
    assert not splits["train"] & splits["test"]
    assert "not the official ones" in caplog.text
    file = tmp_path / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    file.write_bytes(b"broken")
    assert len(reasons(open_reader(f"hypersim:{tmp_path}", "all"))) == 1


# ---------------------------------------------------------------------------------------------------------- the others


def test_virtual_kitti(tmp_path):
    units = np.full((H, W), 1234)
    units[:10] = 65535
    for scene in ("Scene01", "Scene02", "Scene06", "Scene18", "Scene20"):
        for variation in ("clone", "fog"):
            where = tmp_path / scene / variation / "frames"
            picture(where / "rgb/Camera_0/rgb_00001.jpg")
            png16(where / "depth/Camera_0/depth_00001.png", units)
    readers = [open_reader(f"vkitti:{tmp_path}", split) for split in ("train", "val", "test")]
    scenes = [{id[:7] for id in reader.ids} for reader in readers]
    assert [len(group) for group in scenes] == [3, 1, 1]
    assert len(set.union(*scenes)) == 5
    depth = readers[0][0].depth
    assert depth[20, 20] == pytest.approx(12.34)
    assert depth[:10].max() == 0  # the sky


def test_eth3d(tmp_path, rng):
    metres = rng.uniform(1, 20, (H, W)).astype("<f4")
    metres[0] = np.inf
    image = picture(tmp_path / "courtyard/images/dslr_images/DSC_0286.JPG")
    turned = Image.new("RGB", (W, H))
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera that was held upright; depth lies as the pixels do
    turned.save(image, format="JPEG", exif=exif)
    truth = tmp_path / "courtyard/ground_truth_depth/dslr_images/DSC_0286.JPG"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(metres.tobytes())
    reader = open_reader(str(tmp_path), "test")
    assert reader.ids == ["courtyard/DSC_0286"]
    np.testing.assert_array_equal(reader[0].depth, np.where(np.isfinite(metres), metres, 0))
    assert reader[0].image.shape == (H, W, 3)
    truth.write_bytes(metres.tobytes()[:-4])
    assert f"{H * W - 1} values" in reasons(reader)["courtyard/DSC_0286"]
    with pytest.raises(UserError, match=r"has test but nothing for 'train'.*never trained on"):
        open_reader(f"eth3d:{tmp_path}", "train")


def test_scannet(tmp_path):
    for scene in ("scene0000_00", "scene0001_00"):
        for frame in range(0, 12):
            picture(tmp_path / f"scans/{scene}/color/{frame}.jpg", 2 * H, 2 * W)
            png16(tmp_path / f"scans/{scene}/depth/{frame}.png", np.full((H, W), 1500))
    text(tmp_path / "scannetv2_train.txt", "scene0000_00")
    text(tmp_path / "scannetv2_val.txt", "scene0001_00", "scene0009_00")
    reader = open_reader(f"scannet:{tmp_path}?every=5", "val")
    assert list(items(reader)) == [f"scene0001_00/{frame}" for frame in (0, 5, 10)]
    assert "has no folder" in reasons(reader)["scene0009_00"]
    assert reader[0].image.shape == (H, W, 3)
    assert np.unique(reader[0].depth).tolist() == [1.5]
    assert len(open_reader(f"scannet:{tmp_path}", "train")) == 12
    with pytest.raises(UserError, match="nothing for 'test'"):
        open_reader(f"scannet:{tmp_path}", "test")
    text(tmp_path / "mine.txt", "scans/scene0000_00/color/3.jpg scans/scene0000_00/depth/3.png")
    assert open_reader(f"scannet:{tmp_path}?list=mine.txt", "test").ids == ["scans/scene0000_00/color/3"]


def test_diode(tmp_path, rng):
    metres = rng.uniform(1, 20, (H, W, 1)).astype(np.float32)
    mask = (rng.random((H, W)) < 0.5).astype(np.float64)
    for part in ("indoors", "outdoor"):
        stem = tmp_path / f"val/{part}/scene_00019/scan_00183/00019_00183_{part}_000_010"
        picture(stem.with_suffix(".png"))
        np.save(f"{stem}_depth.npy", metres)
        np.save(f"{stem}_depth_mask.npy", mask)
    reader = open_reader(str(tmp_path), "val")
    assert len(items(reader)) == 2
    np.testing.assert_array_equal(reader[0].depth, metres[..., 0] * mask.astype(np.float32))
    indoors = open_reader(f"diode:{tmp_path}?part=indoors", "val")
    assert len(indoors) == 1
    np.save(f"{stem}_depth.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "allow_pickle" in next(iter(reasons(reader).values()))
    with pytest.raises(UserError, match=r"nothing for 'test'.*tables score val.*@val"):
        open_reader(f"diode:{tmp_path}", "test")
