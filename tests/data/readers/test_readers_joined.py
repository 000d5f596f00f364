"""Several data sets as one: order, ids, limits, what is bad, and the fingerprint."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem
from crossflow.data.readers import open_reader, require, resolve_spec


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Three pictures in a/, two (one damaged) in b/; the grey level counts them."""
    for folder, levels in (("a", (0, 1, 2)), ("b", (3, 4))):
        (tmp_path / folder).mkdir()
        for level in levels:
            Image.fromarray(np.full((4, 6, 3), level, np.uint8)).save(tmp_path / folder / f"{level}.png")
    (tmp_path / "b" / "4.png").write_bytes(b"no picture")
    return f"folder:{tmp_path}/a@all", f"folder:{tmp_path}/b@all"


def test_items_follow_each_other_in_the_order_of_the_specs(folders: tuple[str, str]):
    reader = open_reader(" + ".join(folders), "train")
    assert list(reader.ids) == [
        "folder-1/0.png",
        "folder-1/1.png",
        "folder-1/2.png",
        "folder-2/3.png",
        "folder-2/4.png",
    ]
    good = [item for item in reader.load([3, 0, 2]) if not isinstance(item, BadItem)]
    assert [(item.id, int(item.image[0, 0, 0])) for item in good] == [
        ("folder-2/3.png", 3),
        ("folder-1/0.png", 0),
        ("folder-1/2.png", 2),
    ]
    with pytest.raises(BadItem, match=r"folder-2/4\.png"):
        reader[4]
    swapped = open_reader(" + ".join(reversed(folders)), "train")
    assert swapped.fingerprint() != reader.fingerprint() == open_reader(" + ".join(folders), "train").fingerprint()


def test_a_limit_spreads_over_all_data_sets(folders: tuple[str, str]):
    whole = open_reader(" + ".join(folders), "train")
    limited = open_reader(" + ".join(folders), "train", limit=3)
    assert len(limited) == 3
    assert set(limited.ids) < set(whole.ids)
    assert limited.fingerprint() != whole.fingerprint()
    assert [item.id for item in limited.load(range(3))] == list(limited.ids)


def test_joined_data_have_the_fields_that_all_parts_have(folders: tuple[str, str]):
    reader = open_reader(f"{folders[0]} + scenes", "train", image_size=8, limit=4)
    assert reader.fields == {"image"}
    assert require(reader, {"image"}, "sr").required == {"image"}
    with pytest.raises(UserError, match="no depth"):
        require(reader, {"image", "depth"}, "depth")


def test_every_part_of_joined_data_is_resolved_from_the_folder_of_a_run(tmp_path: Path, folders: tuple[str, str]):
    assert resolve_spec("folder:a@all + scenes + folder:b", tmp_path) == (
        f"folder:{tmp_path}/a@all + scenes + folder:{tmp_path}/b"
    )


def test_a_data_set_can_be_read_several_times(folders: tuple[str, str]):
    spec = f"2 * {folders[0]} + {folders[1]}"
    reader = open_reader(spec, "train")
    assert reader.spec == spec.replace("@all", "")
    assert list(reader.ids) == [f"folder-{part}/{number}.png" for part in (1, 2) for number in range(3)] + [
        "folder-3/3.png",
        "folder-3/4.png",
    ]
    assert [int(item.image[0, 0, 0]) for item in reader.load([1, 4])] == [1, 1]
    assert reader.fingerprint() != open_reader(" + ".join(folders), "train").fingerprint()
    assert len(open_reader(f"3 * {folders[0]}", "train")) == 9
    assert resolve_spec("2 * folder:a@all + scenes", Path(folders[0][7:-6])) == f"2 * {folders[0]} + scenes"
    with pytest.raises(UserError, match="Unknown data format"):
        open_reader(f"0 * {folders[0]}", "train")
