"""Folders of converted networks: the files that conversion adds to a run's or codec's, and the checks beforehand."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crossflow.core.errors import UserError
from crossflow.core.files import replacing_folder
from crossflow.core.progress import Progress
from crossflow.released.files import Piece, size_of

ORIGIN_FILE = "released.json"
"""The origin of the weights: kind, the reference's settings, absent keys and dropped keys."""
OBJECTIVE_FILE = "objective.safetensors"
"""The learned parts of a flow model's losses."""
CODEC_WEIGHTS = {"flowtitok": "model.safetensors", "autoencoder_kl": "diffusion_pytorch_model.safetensors"}
CODEC_PREFIX = "network."
"""Prefix of a codec's tensors, without which they are written to its weights file."""
SPARE_BYTES = 2**24
"""Free space that the disk must have beside the weights."""


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    path: Path
    name: str
    """Of the released file."""
    kind: str
    num_tensors: int
    """Number of reference tensors that were used."""
    dropped: Mapping[str, Sequence[str]]
    """{reason: unused reference keys}."""
    notes: Sequence[str] = ()
    """What the user has to know or set before using the result."""


def counter(progress: Progress, pieces: Sequence[Piece]) -> Callable[[int], None]:
    """A callback for the writers of `pieces` that reports the sum of the bytes to `progress`."""
    done, total = 0, size_of(pieces)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return on_bytes


def check_free(folder: Path) -> None:
    """Raises UserError unless `folder` is empty or missing."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Give a new folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but the converted model is a folder. Give another name.")


def check_disk(path: Path, size: int) -> None:
    """Raises UserError unless the disk of `path` has room for `size` bytes."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise UserError(
            f"The converted weights take {size / 2**30:.2f} GiB, but the disk of {folder} has only "
            f"{free / 2**30:.2f} GiB left. Free some space, or write to another disk."
        )


@contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end. Raises UserError unless `size` bytes fit on the disk."""
    check_disk(folder, size)
    with replacing_folder(folder) as temporary:
        yield temporary
