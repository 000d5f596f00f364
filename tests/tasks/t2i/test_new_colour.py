"""The pictures and the judge of the worked example of fine-tuning."""

from pathlib import Path

import pytest

from crossflow.data.readers import open_reader
from crossflow.tasks.t2i import metric, new_colour
from crossflow.tasks.t2i.recogniser import Detection


def test_pictures_have_captions_that_name_the_colour(tmp_path: Path) -> None:
    reader = open_reader(f"folder:{new_colour.write_pictures(tmp_path, 3, size=16)}@all", "train")
    assert len(reader) == 3
    for index in range(3):
        assert len(reader.captions(index)) == 5
        assert any("cyan" in caption for caption in reader.captions(index))
        assert not any("white" in caption for caption in reader.captions(index))
        assert reader[index].image.shape == (16, 16, 3)


@pytest.mark.slow
def test_the_judge_tells_the_colour_from_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real pictures with the solids' true places: what was painted is cyan, and no other solid is."""
    right = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for scene in new_colour.white_scenes(20, first=2**39 + 30_000):
        image = new_colour.paint(scene, 32)
        for solid in scene.objects:
            truth = solid.colour == "white"
            blue = Detection(solid.shape, "blue", solid.size, solid.material, *solid.centre, solid.y, 1.0)
            monkeypatch.setattr(metric, "load_recogniser", lambda blue=blue: lambda images: [(blue,)])
            ((judged,),) = new_colour.judge(image[None])
            right[truth] += (judged.colour == "cyan") == truth
            total[truth] += 1
    assert right[True] >= 0.95 * total[True]
    assert right[False] >= 0.97 * total[False]
