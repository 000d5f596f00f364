"""Folders of converted networks: their files beside those of any run or codec, and how they come to be, whole or not
at all.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crossflow.core.errors import UserError
from crossflow.core.files import replacing_folder
from crossflow.released.files import Piece, size_of

ORIGIN_FILE = "released.json"
"""What the file was: its kind, the reference's settings, the keys it lacked and those that were dropped."""
OBJECTIVE_FILE = "objective.safetensors"
"""The learned parts of a flow model's losses."""
CODEC_WEIGHTS = {"flowtitok": "model.safetensors", "autoencoder_kl": "diffusion_pytorch_model.safetensors"}
CODEC_PREFIX = "network."
"""Of a codec's tensors: in its weights file they are called as in its network."""
SPARE_BYTES = 2**24
"""Room left on the disk beside the weights."""
Progress = Callable[[int, int], None]
"""Told how many of how many bytes are written."""


@dataclass(frozen=True)
class Converted:
    """What came of a conversion: where it lies, what the file was (name and kind), how many tensors were used, which
    were dropped {reason: keys}, and what is still to be said to its user.
    """

    path: Path
    name: str
    kind: str
    num_tensors: int
    dropped: Mapping[str, Sequence[str]]
    notes: Sequence[str] = ()


def counter(progress: Progress, pieces: Sequence[Piece]) -> Callable[[int], None]:
    """Adds up the bytes that the writing of `pieces` tells of."""
    done, total = 0, size_of(pieces)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return on_bytes


def check_free(folder: Path) -> None:
    """Raises UserError unless `folder` is empty or not there."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Give a new folder, so that nothing is mixed with what lies there.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the converted model becomes a folder. Give another name.")


def check_disk(path: Path, size: int) -> None:
    """Raises UserError unless `size` bytes fit where `path` will lie."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE_BYTES:
        raise UserError(
            f"The converted weights take {size / 2**30:.2f} GiB, and the disk of {there} has {free / 2**30:.2f} GiB "
            "left. Make room, or write to another disk."
        )


@contextmanager
def whole(folder: Path, size: int) -> Iterator[Path]:
    """A folder that is filled beside `folder` and takes its name at the end; UserError unless `size` bytes fit."""
    check_disk(folder, size)
    with replacing_folder(folder) as temporary:
        yield temporary
