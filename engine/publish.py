"""Runs for others: a run directory with config.json and README.md, in a folder or on the hub.

The conventions are those of huggingface_hub's ModelHubMixin (`save_pretrained`, `push_to_hub`, `from_pretrained`). What
is published stays a run directory: `crossflow.load` reads it like any other.
"""

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import read_metadata, read_tensors, write_atomically, write_json, write_tensors
from crossflow.core.lock import LOCK
from crossflow.core.output import RECORD
from crossflow.core.settings import build, dump, flat
from crossflow.core.storage import packed, read_weights
from crossflow.core.weights import WEIGHTS, kind_of_weights
from crossflow.engine.describe import EVALUATIONS, describe
from crossflow.engine.folder import CHECKPOINTS, MANIFEST, METRICS, OBJECTIVE, SAMPLES, SCORES
from crossflow.engine.model_card import LIBRARY, About, model_card
from crossflow.engine.places import without_folders
from crossflow.engine.provenance import versions
from crossflow.networks.hub import CONFIG, PICKLED
from crossflow.tasks import load_config

CARD = "README.md"
HUB_CONFIG = "config.json"
NUM_PICTURES = 2
"""Pictures of the training that are published: the last ones."""
MESSAGE = "A run of crossflow"
_NOT_COPIED = {CHECKPOINTS, EVALUATIONS, SAMPLES, CARD, HUB_CONFIG, LOCK, RECORD, *WEIGHTS.values()}


class Push(TypedDict, total=False):
    """How a folder is put on the hub."""

    private: bool | None
    """Whether others cannot see a repository that is created; None: as the account has it."""
    token: str | None
    """By default that of `hf auth login`, or HF_TOKEN."""
    branch: str | None
    """By default main."""
    create_pr: bool
    """As a pull request."""
    commit_message: str


class HubMethods(ABC):
    """`save_pretrained` and `push_to_hub` of a loaded run."""

    folder: Path | None
    weights: str

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Writes a complete run directory; returns it."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        about: About | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push: Unpack[Push],
    ) -> str | None:
        """Writes a run directory with config.json and a model card; with `push_to_hub` also to the hub.

        about: licence, base model and text of the card. repo_id: of the hub; the folder's name by default. Returns the
        address of the commit, or None.
        """
        folder = Path(save_directory)
        self.save(folder)
        source = WEIGHTS[self.weights]
        _write_weights(folder / source, folder / WEIGHTS["model"], self.weights)
        if source != WEIGHTS["model"]:
            (folder / source).unlink()
        complete(folder, about or About(), origin=self.folder)
        return self.push_to_hub(repo_id or folder.name, about=about, **push) if push_to_hub else None

    def push_to_hub(self, repo_id: str, *, about: About | None = None, **push: Unpack[Push]) -> str:
        """Publishes the run under the hub id `repo_id`, which is created if needed; returns the address of the commit.

        Raises UserError when the hub refuses or is unavailable.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            self.save_pretrained(folder, about=_titled(about, repo_id))
            return upload(folder, repo_id, **push)


def push_run(
    run: Path,
    repo_id: str,
    *,
    about: About | None = None,
    weights: str | None = None,
    storage: str = "float32",
    overrides: Sequence[str] = (),
    **push: Unpack[Push],
) -> str:
    """As `HubMethods.push_to_hub`, for a run directory whose networks need not be loaded.

    weights: ema | model; the averaged ones by default. storage: float32 | half | int8, see `copy_run`. overrides:
    settings of the run to replace, as key=value.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_run(run, Path(temporary) / "run", weights=weights, storage=storage, overrides=overrides)
        complete(folder, _titled(about, repo_id), origin=run)
        return upload(folder, repo_id, **push)


def _titled(about: About | None, repo_id: str) -> About:
    about = about or About()
    return about if about.title else replace(about, title=repo_id)


def copy_run(
    run: Path,
    target: Path,
    *,
    weights: str | None = None,
    storage: str = "float32",
    overrides: Sequence[str] = (),
) -> Path:
    """Copies what sampling needs of a run directory, with one kind of weights, into a new folder; returns that.

    storage: float32, or smaller: half or int8 (see `core.weights.packed`), without the learned parts of the losses, and
    with decoders in half precision. Raises UserError for a folder that is no run, or has no weights.
    """
    config = load_config(run, overrides)
    kind = kind_of_weights(run, weights)
    if not (run / WEIGHTS[kind]).is_file():
        raise UserError(f"{run} has no {WEIGHTS[kind]}: the run has not saved weights yet, or the file was removed.")

    def left_out(folder: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".") or name.endswith(PICKLED)}
        unused = _NOT_COPIED if storage == "float32" else _NOT_COPIED | {OBJECTIVE}
        return hidden | (set(names) & unused if Path(folder) == run else set())

    shutil.copytree(run, target, ignore=left_out, dirs_exist_ok=True)
    write_atomically(target / CONFIG, dump(config))
    if storage != "float32":
        for path in target.rglob("*.safetensors"):
            write_tensors(path, packed(read_tensors(path), "half"), read_metadata(path))
    _write_weights(run / WEIGHTS[kind], target / WEIGHTS["model"], kind, storage)
    return target


def _write_weights(source: Path, target: Path, kind: str, storage: str = "float32") -> None:
    """The weights as model.safetensors, with metadata that say which they are."""
    about = {"format": "pt", "library": LIBRARY, "version": _version(), "weights": kind, "storage": storage}
    write_tensors(target, packed(read_weights(source), storage), {**read_metadata(source), **about})


def _version() -> str:
    return versions((LIBRARY,))[LIBRARY]


def complete(folder: Path, about: About, *, origin: Path | None = None) -> None:
    """Adds to a run directory what the hub shows: config.json, README.md, scores and pictures of the `origin`.

    Data and runs that it was made from are named without the folders of the `origin`'s machine. Raises UserError for
    networks that are folders of this machine, where others find nothing.
    """
    _expect_public(load_config(folder))
    if origin is not None and origin.resolve() != folder.resolve():
        _copy_records(origin, folder)
        hide_folders(folder)
    run = describe(folder)
    write_atomically(
        folder / CARD, model_card(run, about, [path.relative_to(folder).as_posix() for path in run.samples])
    )
    content = {
        "library_name": LIBRARY,
        "library_version": _version(),
        "task": run.config.task,
        "pipeline": "crossflow.load",
        "settings": run.config.model_dump(mode="json"),
    }
    write_json(folder / HUB_CONFIG, content)


def hide_folders(folder: Path) -> None:
    """Takes the paths of the author's machine out of the settings and records of a copied run."""
    config = load_config(folder)
    write_atomically(folder / CONFIG, dump(build(type(config), without_folders(config.model_dump(mode="json")))))
    for path in (folder / MANIFEST, folder / SCORES, *folder.glob(f"{EVALUATIONS}/*/metrics.json")):
        if path.is_file():
            record = without_folders(json.loads(path.read_text(encoding="utf-8")))
            record.pop("directory", None)  # where the training was started
            write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False))


def _copy_records(origin: Path, folder: Path) -> None:
    records = [path for name in (SCORES, METRICS, MANIFEST) if (path := origin / name).is_file()]
    records += sorted(origin.glob(f"{EVALUATIONS}/*/metrics.json"))
    records += sorted((origin / SAMPLES).glob("*.png"))[-NUM_PICTURES:]
    for path in records:
        target = folder / path.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _expect_public(config: Config) -> None:
    for name, value in flat(config.model_dump(mode="json")).items():
        if isinstance(value, str) and not name.startswith(("data.", "train.")) and _is_folder(value):
            raise UserError(
                f"The run names {name}={value}, a folder of this machine, which others do not have. Publish it with "
                f"the network's hub id: `crossflow push RUN OWNER/NAME --set {name}=OWNER/NETWORK`, or in Python "
                f'`crossflow.load(RUN, overrides=["{name}=OWNER/NETWORK"])`.'
            )


def _is_folder(value: str) -> bool:
    path = Path(value).expanduser()
    return ("/" in value or value.startswith("~")) and (path.is_absolute() or path.is_dir())


def upload(folder: Path, repo_id: str, **push: Unpack[Push]) -> str:
    """Uploads a folder to the hub in one commit; returns its address. Raises UserError when the hub refuses it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = HfApi(token=push.get("token"), library_name=LIBRARY, library_version=_version())
    branch = push.get("branch")
    try:
        name = api.create_repo(repo_id, private=push.get("private"), exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=push.get("commit_message", MESSAGE),
            revision=branch,
            create_pr=push.get("create_pr", False),
        )
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is not a hub id, which is OWNER/NAME: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"The hub did not take {repo_id}: {reason}. Check the name, log in with `hf auth login` (or give a token "
            "with write access), and whether there is a connection (HF_HUB_OFFLINE turns it off)."
        ) from error
    return str(commit.pr_url or commit.commit_url)
