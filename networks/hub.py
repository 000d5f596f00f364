"""Run directories by place: a folder, a model that ships with the package (zoo:NAME), or a hub repository."""

from pathlib import Path
from typing import TypedDict, Unpack

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.recipes import ZOO
from crossflow.core.weights import WEIGHTS

CONFIG = "config.yaml"
SHIPPED = "zoo:"
"""Begins the names of the models that ship with the package."""
HUB_FILES = ["*.json", "*.yaml", "*.safetensors", "*.txt"]
"""Files of a hub repository that are downloaded; none that unpickling would have to read."""
NOT_DOWNLOADED = ["checkpoints/*", "evaluation/*", "samples/*", "[!a-zA-Z0-9]*", "*..*"]
"""What loading does not need, and names that would lie outside the folder of the download."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Access(TypedDict, total=False):
    """How the hub is reached."""

    token: str | bool | None
    """Of a private repository; by default that of `hf auth login`, or HF_TOKEN."""
    cache_dir: str | Path | None
    """Where downloads are kept; by default the hub's own cache (HF_HOME)."""
    local_files_only: bool
    """Use what is in the cache, without a connection."""


def run_folder(source: str | Path, revision: str | None = None, **access: Unpack[Access]) -> Path:
    """The run directory `source`, or the local copy of the hub repository of that name.

    source: a folder; zoo:NAME, a model that ships with the package; or a hub id: owner/name, or owner/name@revision.
    revision: branch, tag or commit of a repository; its main branch by default. Raises UserError for what is neither a
    run directory nor a repository that holds one, and for a repository that is unavailable.
    """
    if str(source).startswith(SHIPPED):
        return _shipped(str(source).removeprefix(SHIPPED))
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"{folder} is not a run directory: it has no {CONFIG}. Give the folder that `crossflow train` wrote to."
            )
        return folder
    if folder.exists():
        raise UserError(
            f"{folder} is a file, but a checkpoint is a run directory. Convert released files with `crossflow convert`."
        )
    repository, _, tag = str(source).partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist. Give a run directory, or a hub id such as owner/name.")
    return _download(repository, revision or tag or None, **access)


def short_name(source: str | Path) -> str:
    """The last part of what `run_folder` takes, for names of what is made from it: zoo:t2i -> t2i, me/t2i@v1 -> t2i.

    >>> short_name("zoo:t2i"), short_name("me/t2i@v1"), short_name("runs/mine/")
    ('t2i', 't2i', 'mine')
    """
    name = str(source).removeprefix(SHIPPED)
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else path.name.partition("@")[0]


def shipped_models() -> dict[str, Path]:
    """The models that ship with the package: name -> run directory."""
    return {path.parent.name: path.parent for path in sorted(ZOO.glob(f"*/{CONFIG}"))}


def _shipped(name: str) -> Path:
    models = shipped_models()
    if name not in models:
        raise unknown_name("model", SHIPPED + name, [SHIPPED + known for known in models])
    return models[name]


def _download(repository: str, revision: str | None, **access: Unpack[Access]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=NOT_DOWNLOADED, **access
        )
    except HFValidationError as error:
        raise UserError(f"{repository} is neither a folder nor a valid hub id: {error}") from error
    except (HTTPError, OSError) as error:  # refused or interrupted; offline or no space
        version = f" (revision {revision})" if revision is not None else ""
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"{repository}{version} is not a folder here, and the hub repository is unavailable: {reason}. "
            "Give a run directory, or download the repository and give its folder."
        ) from error
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"The hub repository {repository} holds no run: it has no {CONFIG}.")
    if not any((folder / name).is_file() for name in WEIGHTS.values()):
        raise UserError(_no_weights(repository, revision, access.get("token")))
    return folder


def _no_weights(repository: str, revision: str | None, token: str | bool | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    expected = " nor ".join(WEIGHTS.values())
    try:
        names = HfApi(token=token).list_repo_files(repository, revision=revision)
    except (HTTPError, OSError):  # offline: the message does without
        names = []
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return (
            f"The hub repository {repository} has neither {expected}, but {', '.join(pickled[:3])}. Such files are "
            "never read, since unpickling can run code in them: ask its author for safetensors."
        )
    return f"The hub repository {repository} has no weights: neither {expected}."
