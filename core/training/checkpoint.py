"""Checkpoints: everything a run needs to continue. A crash while writing leaves the previous checkpoint usable.

`checkpoints/step_00001000/` holds `*.safetensors` (model, ema, objective, optimizer; sharded ones: see shards.py),
`state.json` (the rest) and
`checkpoint.json` (size and SHA-256 of each file, written last). It is written under a temporary name, flushed to disk
and renamed. Nothing in it is a pickle.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import (
    TEMPORARY,
    is_full,
    link_or_copy,
    remove_folder,
    remove_temporaries,
    size_in_words,
    sync_folder,
    write_atomically,
    write_tensors,
)

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "checkpoint.json"
STATE = "state.json"
# Space for the JSON files, the folder and the file system's bookkeeping, beside the tensors.
_MARGIN = 2**20


class CorruptCheckpoint(UserError):
    """A checkpoint whose files are missing, short or altered."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"The checkpoint {path} cannot be used: {reason}. Resume from another one (--resume auto takes the "
            "newest intact one), or delete this folder."
        )
        self.path = path
        self.reason = reason


class NoSpace(UserError):
    """The disk is too full for a checkpoint; earlier ones are untouched."""

    def __init__(self, root: Path, step: int, needed: int, free: int) -> None:
        super().__init__(
            f"The disk is too full for the checkpoint of step {step} in {root}: it needs {size_in_words(needed)}, "
            f"{size_in_words(free)} are free. Earlier checkpoints are untouched. Free some space or choose another "
            "--output (lower train.keep to hold fewer checkpoints), then continue with --resume auto."
        )
        self.needed = needed
        self.free = free


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint of `step` under `root` (= RUN/checkpoints)."""
    return root / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, newest first."""
    by_step = {int(path.name[5:]): path for path in root.glob("step_*") if path.is_dir() and path.name[5:].isdigit()}
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Total size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes the checkpoint of `step` and removes all but the newest `keep`; returns its folder.

    tensors: by file name without ending (a file without tensors is not written); state: JSON. Raises NoSpace.
    """
    draft = Draft.begin(root, step, sum(map(num_bytes, tensors.values())))
    with draft.removed_on_error():
        for name, values in tensors.items():
            if values:
                write_tensors(draft.folder / f"{name}.safetensors", values)
        return draft.complete(state, keep)


@dataclass(frozen=True)
class Draft:
    """The checkpoint of `step` while it is written: `folder` takes the files of its tensors."""

    root: Path
    step: int
    needed: int
    """Bytes."""

    @classmethod
    def begin(cls, root: Path, step: int, num_bytes: int) -> "Draft":
        """An empty folder for tensors of `num_bytes`. Raises NoSpace."""
        root.mkdir(parents=True, exist_ok=True)
        draft = cls(root, step, num_bytes + _MARGIN)
        if (free := shutil.disk_usage(root).free) < draft.needed:
            raise NoSpace(root, step, draft.needed, free)
        shutil.rmtree(draft.folder, ignore_errors=True)
        with draft.removed_on_error():
            draft.folder.mkdir()
        return draft

    @property
    def folder(self) -> Path:
        """The temporary folder."""
        return self.root / f"{TEMPORARY}{step_folder(self.root, self.step).name}"

    @contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """Context that removes the folder on an error; a full disk becomes a NoSpace."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if is_full(error):
                raise NoSpace(self.root, self.step, self.needed, shutil.disk_usage(self.root).free) from error
            raise

    def complete(self, state: Mapping[str, Any], keep: int) -> Path:
        """Adds `state` and the checksums, gives the folder its name, and removes all but the newest `keep` checkpoints.

        Checkpoints of later steps belong to an abandoned continuation and are removed as well.
        """
        root, temporary, final = self.root, self.folder, step_folder(self.root, self.step)
        write_atomically(temporary / STATE, _json(state))
        files: dict[str, dict[str, Any]] = {
            path.name: {"bytes": path.stat().st_size} for path in sorted(temporary.iterdir())
        }
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda name: _sha256(temporary / name), files)
            for name, digest in zip(files, digests, strict=True):
                files[name]["sha256"] = digest
        write_atomically(temporary / MANIFEST, _json({"format": FORMAT, "step": self.step, "files": files}))
        sync_folder(temporary)
        remove_folder(final)  # written by a continuation that was abandoned
        temporary.rename(final)
        sync_folder(root)
        remove_temporaries(root)
        for path in checkpoints(root):
            if path.name > final.name:
                remove_folder(path)
        for path in checkpoints(root)[keep:]:
            remove_folder(path)
        return final


def publish(checkpoint: Path, names: tuple[str, ...], folder: Path) -> None:
    """Links the files `names` (without ending) of a checkpoint into `folder`, or copies them without support for links.

    Each file appears atomically. Names that the checkpoint lacks are skipped.
    """
    for name in names:
        source, target = checkpoint / f"{name}.safetensors", folder / f"{name}.safetensors"
        if not source.exists() or (target.exists() and target.samefile(source)):
            continue
        try:
            link_or_copy(source, target)
        except OSError as error:
            if is_full(error):
                needed, free = source.stat().st_size, shutil.disk_usage(folder).free
                raise NoSpace(folder, int(checkpoint.name[5:]), needed, free) from error
            raise


def verify(path: Path) -> None:
    """Raises CorruptCheckpoint unless every file of the checkpoint exists with the recorded size and checksum."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, dict] = manifest["files"]
        written = manifest["format"]
        assert isinstance(manifest["step"], int)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(path, f"it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise CorruptCheckpoint(path, f"its {MANIFEST} is not readable") from error
    if written != FORMAT:
        raise CorruptCheckpoint(path, f"it has format {written}, and this version reads format {FORMAT}")
    for name, facts in files.items():
        if not (path / name).is_file():
            raise CorruptCheckpoint(path, f"its file {name} is missing")
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            raise CorruptCheckpoint(path, f"its file {name} has {size} bytes instead of {facts['bytes']}")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _sha256(path / name), files)
        for (name, facts), digest in zip(files.items(), digests, strict=True):
            if digest != facts["sha256"]:
                raise CorruptCheckpoint(path, f"its file {name} does not match its checksum")


def find_checkpoint(root: Path, resume: str | Path | None) -> Path | None:
    """The verified checkpoint to resume from; None: start from the beginning. root = RUN/checkpoints.

    resume: None refuses a folder that holds checkpoints, so that no run is overwritten; "auto" takes the newest intact
    one of `root`, if any; a folder is that checkpoint, or the run whose newest one is taken. Raises UserError.
    """
    if resume is None:
        if existing := checkpoints(root):
            raise UserError(
                f"{root.parent} already holds a run with checkpoints up to {existing[0].name}. Continue it with "
                f"`crossflow train --output {root.parent} --resume auto`, or choose another --output."
            )
        return None
    if resume == "auto":
        return newest_good(root)
    folder = Path(resume)
    if not (folder / MANIFEST).is_file() and (of_run := checkpoints(folder / "checkpoints") or checkpoints(folder)):
        folder = of_run[0]
    if not folder.is_dir():
        raise UserError(
            f"The folder {folder} to resume from does not exist. Give a checkpoint, a run directory, or auto."
        )
    verify(folder)
    return folder


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint under `root` that passes `verify`, or None without checkpoints; logs those that fail.

    Raises UserError when all of them fail.
    """
    candidates = checkpoints(root)
    for path in candidates:
        try:
            verify(path)
            return path
        except CorruptCheckpoint as error:
            logger.warning("%s cannot be used (%s); trying the previous one.", path, error.reason)
    if candidates:
        raise UserError(
            f"None of the {len(candidates)} checkpoints in {root} can be used (the log says why). Choose another "
            "--output to start again, or delete them."
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as `slot/parameter name` -> tensor (AdamW's slots: step, exp_avg, exp_avg_sq).

    Counts that an optimizer keeps as Python numbers become int64 scalars.
    """
    return {
        f"{slot}/{names[parameter]}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, (Tensor, int))
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; hyperparameters stay. Raises UserError for an unknown parameter."""
    present = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: index for index, name in enumerate(order)}
    slots: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        slot, name = key.split("/", 1)
        if name not in number:
            raise UserError(f"The checkpoint's optimizer has a state for {name}, which this model does not train.")
        is_count = value.ndim == 0 and value.dtype == torch.int64
        slots.setdefault(number[name], {})[slot] = int(value) if is_count else value
    optimizer.load_state_dict({"state": slots, "param_groups": present["param_groups"]})


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
