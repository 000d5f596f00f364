"""Animations hold every frame in order at the requested speed; small frames are enlarged by whole pixels."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.engine import animation

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
FRAMES = [np.full((5, 7, 3), colour, np.uint8) for colour in COLOURS]


def test_a_gif_holds_the_frames_in_order_and_loops(tmp_path: Path) -> None:
    path = animation.save_gif(FRAMES, tmp_path / "new" / "a.gif", fps=4)
    with Image.open(path) as gif:
        assert gif.n_frames == 3
        assert gif.info["loop"] == 0
        assert gif.size == (7 * 36, 5 * 36)
        for number, colour in enumerate(COLOURS):
            gif.seek(number)
            assert gif.info["duration"] == 250
            assert np.abs(np.array(gif.convert("RGB")).astype(int) - colour).max() <= 8
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.gif"]


def test_large_frames_are_reduced_in_a_gif(tmp_path: Path) -> None:
    path = animation.save_gif([np.zeros((100, 1000, 3), np.uint8)] * 2, tmp_path / "a.gif")
    assert Image.open(path).size == (640, 64)


def test_frames_of_two_sizes_or_none_are_refused(tmp_path: Path) -> None:
    for frames in ([], [FRAMES[0], FRAMES[0][:3]]):
        with pytest.raises(ValueError, match="of one size"):
            animation.save_gif(frames, tmp_path / "a.gif")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(animation, "can_write_mp4", lambda: False)
    with pytest.raises(UserError, match=r"crossflow-toolkit\[video\]"):
        animation.save_mp4(FRAMES, tmp_path / "a.mp4")


class Writer:
    """Stands in for imageio-ffmpeg: keeps the frames it receives."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.frames, self.size, self.options = fails, [], (0, 0), {}

    def write_frames(self, path: str, size: tuple[int, int], **options: object):
        self.size, self.options = size, options
        Path(path).write_bytes(b"half")
        frame = yield
        while True:
            self.frames.append(np.array(frame))
            if self.fails:
                raise OSError("broken pipe")
            frame = yield


@pytest.mark.parametrize("fails", [False, True])
def test_an_mp4_has_even_sides_and_is_written_atomically(tmp_path: Path, monkeypatch, fails: bool) -> None:
    writer = Writer(fails)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.SimpleNamespace(write_frames=writer.write_frames))
    monkeypatch.setattr(animation, "can_write_mp4", lambda: True)
    monkeypatch.setattr(animation, "SMALL", 1)
    if fails:
        with pytest.raises(UserError, match="broken pipe"):
            animation.save_mp4(FRAMES, tmp_path / "a.mp4")
        assert list(tmp_path.iterdir()) == []
        return
    animation.save_mp4(FRAMES, tmp_path / "a.mp4", fps=5)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert writer.size == (8, 6)
    assert writer.options["fps"] == 5
    for frame, colour in zip(writer.frames, COLOURS, strict=True):
        assert frame.shape == (6, 8, 3)
        assert (frame == colour).all()


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="imageio-ffmpeg is not installed")
def test_an_mp4_reads_back(tmp_path: Path) -> None:
    import imageio_ffmpeg

    path = animation.save_mp4(FRAMES, tmp_path / "a.mp4", fps=5)
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == (7 * 36, 5 * 36)
    frames = [np.frombuffer(frame, np.uint8).reshape(5 * 36, 7 * 36, 3) for frame in reader]
    assert len(frames) == 3
    for frame, colour in zip(frames, COLOURS, strict=True):
        assert np.abs(frame.astype(int) - colour).mean() < 12
