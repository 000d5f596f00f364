"""Prompts and pictures as they are given on the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossflow.commands.console import count, warn
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.engine.sample import Pipeline


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file with one per line. Raises UserError unless it is UTF-8."""
    if file is None:
        return list(prompts)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file in UTF-8: {error}.") from error
    return [*prompts, *(line.strip() for line in lines if line.strip())]


def named_inputs(pipe: "Pipeline", prompts: Sequence[str], paths: Sequence[Path]) -> list[tuple[str, Any]]:
    """(name of the output, input) of every prompt, or of every picture in the paths.

    Pictures that cannot be read are skipped with a warning. Raises UserError when none can be read, or when the run
    takes the other kind of input.
    """
    from crossflow.engine.inputs import read_prompt

    if pipe.task.input_kind == "text":
        if paths:
            raise UserError(
                f"This {pipe.task.name} run takes prompts: give --prompt or --prompts instead of --input. To turn a "
                "picture into its latent, use `crossflow invert`."
            )
        values = [read_prompt(text) for text in prompts]
        warn_of_unknown_words(pipe, values)
        return [(f"{number:04d}", value) for number, value in enumerate(values)]
    if prompts:
        raise UserError(f"This {pipe.task.name} run takes pictures: give --input FILE or FOLDER instead of a prompt.")
    return _pictures(paths)


def _pictures(paths: Sequence[Path]) -> list[tuple[str, Any]]:
    """(name, picture) of the picture files in the paths; files of one name in several folders are numbered."""
    from crossflow.data.files import IMAGE_SUFFIXES
    from crossflow.data.images import load_image

    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES or file in paths]
    if not files:
        raise UserError(f"Found no pictures (png, jpg, webp, ...) in {', '.join(map(str, paths))}.")
    pictures: dict[str, Any] = {}
    problems: list[str] = []
    for file in files:
        try:
            picture = load_image(file)
        except (UserError, ValueError, OSError) as error:
            problems.append(f"{file}: {error}")
            continue
        names = (file.stem, *(f"{file.stem}_{number}" for number in range(1, len(files) + 1)))
        pictures[next(name for name in names if name not in pictures)] = picture
    if not pictures:
        raise UserError(f"None of {count(len(files), 'file')} could be read as a picture. {problems[0]}")
    for problem in problems:
        warn(f"skipped {problem}")
    return list(pictures.items())


def warn_of_unknown_words(pipe: "Pipeline", values: Sequence[Any]) -> None:
    """Warns once of the words in read inputs that the model never saw in training."""
    if pipe.adapters or pipe.task.config.train.parts_from is not None:
        return  # fine-tuning may have taught them
    words = dict.fromkeys(word for value in values for word in pipe.task.unknown_words(value))
    if words:
        warn(f"note: the model was trained without these words and cannot follow them: {', '.join(words)}.")


def typed_inputs(pipe: "Pipeline", *texts: str | None) -> list[Any]:
    """Prompts, or the pictures at paths, whichever the run takes; None stays None. Warns of unknown words."""
    values = [typed_input(pipe, text) for text in texts]
    warn_of_unknown_words(pipe, [value for value in values if value is not None])
    return values


def typed_input(pipe: "Pipeline", text: str | None) -> Any:
    """A prompt, or the picture at a path, whichever the run takes; None stays None."""
    from crossflow.engine.inputs import read_picture, read_prompt

    if text is None or pipe.task.input_kind == "text":
        return None if text is None else read_prompt(text)
    path = Path(text)
    if not path.is_file():
        raise UserError(f"This {pipe.task.name} run takes pictures, but the file {text} does not exist.")
    return read_picture(path)
