"""Run directories by place: a folder, or a hub repository that holds one."""

from pathlib import Path

from crossflow.core.errors import UserError

CONFIG = "config.yaml"
HUB_FILES = ["*.json", "*.yaml", "*.safetensors", "*.txt"]
"""Files of a hub repository that are downloaded; none that unpickling would have to read."""


def run_folder(source: str | Path, revision: str | None = None) -> Path:
    """The run directory `source`, or the local copy of the hub repository of that name."""
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
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist. Give a run directory, or a hub id such as owner/name.")
    return _download(str(source), revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["checkpoints/*", "evaluation/*"]
        )
    except HFValidationError as error:
        raise UserError(f"{repository} is neither a folder nor a valid hub id: {error}") from error
    except (HTTPError, OSError) as error:  # refused or interrupted; offline or no space
        version = f" (revision {revision})" if revision is not None else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{repository}{version} is not a folder here, and the hub repository is unavailable: {reason}. "
            "Give a run directory, or download the repository and give its folder."
        ) from error
    if not (Path(path) / CONFIG).is_file():
        raise UserError(f"The hub repository {repository} holds no run: it has no {CONFIG}.")
    return Path(path)
