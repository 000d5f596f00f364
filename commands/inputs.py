"""Prompts and pictures as they are typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossflow.commands.console import warn
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.engine.sample import Pipeline


def read_inputs(
    pipe: "Pipeline", prompts: Sequence[str], prompt_file: Path | None, inputs: Sequence[Path]
) -> list[tuple[str, Any]]:
    """(name, input) of everything asked for; raises UserError when it does not fit the task."""
    from crossflow.data.files import IMAGE_SUFFIXES
    from crossflow.data.images import load_image

    if pipe.task.input_kind == "text":
        if inputs:
            raise UserError(
                "This is a text-to-image run: give --prompt or --prompts, not --input. To turn a "
                "picture into its latent use `crossflow invert`."
            )
        texts = list(prompts)
        if prompt_file is not None:
            try:
                lines = prompt_file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise UserError(f"{prompt_file} is not a text file in UTF-8: {error}.") from error
            texts += [line.strip() for line in lines if line.strip()]
        if not texts:
            raise UserError(
                'Say what to draw: --prompt "a red cube" (several times if you like), '
                "or --prompts FILE with one per line."
            )
        return [(f"{number:04d}", pipe.task.read_input(text)) for number, text in enumerate(texts)]
    if prompts or prompt_file is not None:
        raise UserError(
            f"This is a {pipe.task.name} run, which takes pictures: give --input FILE or FOLDER, not a prompt."
        )
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES or file in inputs]
    if not files:
        raise UserError("No pictures came. Give --input with a picture or a folder of pictures (png, jpg, webp, ...).")
    found: list[tuple[str, Any]] = []
    bad: list[str] = []
    for file in files:
        try:
            picture, taken = load_image(file), {name for name, _ in found}
            others = (f"{file.stem}_{number}" for number in range(1, len(files) + 1))
            found.append((next(name for name in (file.stem, *others) if name not in taken), picture))
        except (ValueError, OSError) as error:
            bad.append(f"{file}: {error}")
    if not found:
        raise UserError(f"None of the {len(files)} files could be read as a picture. {bad[0]}")
    for line in bad:
        warn(f"skipped {line}")
    return found


def read_typed(pipe: "Pipeline", text: str | None) -> Any:
    """An input as typed: a prompt for text-to-image, else the path of a picture."""
    if text is None or pipe.task.input_kind == "text":
        return None if text is None else pipe.task.read_input(text)
    path = Path(text)
    if not path.is_file():
        raise UserError(f"This is a {pipe.task.name} run, which takes pictures, and there is no file {text}.")
    try:
        return pipe.task.read_input(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
