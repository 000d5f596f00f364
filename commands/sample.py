"""``crossflow sample``: outputs for prompts or pictures."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from crossflow.commands import options
from crossflow.commands.checkpoint import Model, uses_model
from crossflow.commands.console import join_processes, print_json, progress_bar, wants_json
from crossflow.commands.inputs import named_inputs, read_prompts
from crossflow.commands.outputs import Result, show_results, write_result
from crossflow.core.errors import UserError
from crossflow.core.output import check_output, output_folder


@click.command("sample", short_help="Make pictures, captions, depth maps, sharper pictures.")
@uses_model("outputs/TASK", shared=True)
@click.option("--prompt", "prompts", multiple=True, help="A prompt, for runs that take text; repeatable.")
@click.option("--prompts", "prompt_file", type=options.EXISTING_FILE, help="Text file with one prompt per line.")
@click.option(
    "--input",
    "paths",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A picture or a folder of pictures, for runs that take pictures; repeatable.",
)
@click.option("--num", default=1, show_default=True, type=click.IntRange(1), help="Outputs per input.")
@click.option(
    "--ensemble",
    "members",
    default=1,
    type=click.IntRange(1),
    metavar="N",
    help="Combine N samples of each input into one output, with its uncertainty (depth: the median). Default: none.",
)
@click.option(
    "--negative", "--away-from", "negative", metavar="TEXT", help="Says what to use instead of a negative prompt."
)
@options.as_json
def command(
    model: Model, prompts: Sequence[str], prompt_file: Path | None, paths: Sequence[Path], num: int, members: int,
    **more: str | bool | None,
) -> None:  # fmt: skip
    """Make pictures from prompts, or captions, depth maps and sharper pictures from pictures.

    \b
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a red cube left of a blue sphere" --num 4
      crossflow sample --checkpoint runs/depth_tiny --input photo.jpg --ensemble 8
      crossflow sample --checkpoint runs/joint_tiny --task depth --input photo.jpg
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a cube" --guidance 3 guidance_interval=[0.1,0.8] zero_init=1

    KEY=VALUE sets any field of the recipe's `sample` section. Noise depends on the seed and the prompt (or the picture)
    alone, so each output can be reproduced without the others. Under torchrun or accelerate launch the processes share
    the inputs.
    """
    from crossflow.core import distributed
    from crossflow.engine.ensemble import check_ensemble
    from crossflow.engine.inputs import item_ids, no_negative_prompt

    if isinstance(negative := more["negative"], str):
        raise no_negative_prompt(prompts[0] if prompts else "PROMPT", negative)
    texts = read_prompts(prompts, prompt_file)
    if not texts and not paths:
        raise UserError(
            'No prompt or picture is given. Give --prompt "a red cube" (repeatable) or --prompts FILE to a run that '
            "takes text, --input FILE or FOLDER to one that takes pictures."
        )
    if members > 1:
        if num > 1:
            raise UserError("--ensemble makes one output of several for each input, and --num several: give one.")
        model = replace(model, overrides=[*model.overrides, "mode=false"])
    check_output(model.output, overwrite=model.overwrite)
    join_processes()
    model = model.taking("text" if texts else "image")
    if members > 1:
        check_ensemble(model.pipe, members)
    model.announce(model.planned(Path("outputs") / model.pipe.task.name))
    inputs = named_inputs(model.pipe, texts, paths)
    results = _planned(inputs, item_ids([value for _, value in inputs], num), num)
    results = (
        [replace(each, details={**each.details, "ensemble": members}) for each in results] if members > 1 else results
    )
    with contextlib.ExitStack() as stack:

        def claim() -> Path:
            default = Path("outputs") / model.pipe.task.name
            return stack.enter_context(output_folder(default, model.output, overwrite=model.overwrite))

        folder = distributed.on_main(claim)
        values = [value for _, value in inputs for _ in range(num)]
        finished = list(_sampled(model, values, results, folder, members))
        if distributed.is_main():
            listing = show_results(model, finished, folder)
    if distributed.is_main() and wants_json():
        print_json({"folder": str(folder), "checkpoint": model.checkpoint, "seed": model.seed, "results": listing})


def _planned(inputs: Sequence[tuple[str, Any]], ids: Sequence[str], num: int) -> list[Result]:
    """The results of all ids, `num` of each input, whose values are still missing."""
    planned = []
    for index, id in enumerate(ids):
        name, value = inputs[index // num]
        prompt = {"prompt": value} if isinstance(value, str) else {}
        stem = f"{name}_{index % num}" if num > 1 else name
        planned.append(Result(None, stem, prompt.get("prompt", name), {"item": id, **prompt}))
    return planned


def _sampled(
    model: Model, values: Sequence[Any], planned: Sequence[Result], folder: Path, members: int
) -> Iterator[tuple[Result, list[Path]]]:
    """Each result with its files, written beside the next batch; in the first of several processes, none in the others.

    values: the input of each result; members: samples that are combined into each.
    """
    from crossflow.core import distributed
    from crossflow.engine.ensemble import combine

    settings = model.pipe.sample_settings(**model.settings)
    # Several processes take equal shares, also of fewer outputs than their batches would hold.
    size = 1 if members > 1 else min(settings.batch_size, -(-len(planned) // distributed.world_size()))
    batches = [range(start, min(start + size, len(planned))) for start in range(0, len(planned), size)]

    def write(results: list[Result]) -> list[tuple[Result, list[Path]]]:
        return [write_result(model, result, folder) for result in results]

    with progress_bar("sampling") as on_step:

        def sample(batch: range) -> list[Result]:
            if members > 1:
                (i,) = batch
                return [
                    replace(planned[i], value=combine(model.pipe, values[i], members, model.seed, settings, on_step))
                ]
            ids = [str(planned[i].details["item"]) for i in batch]
            outputs = model.pipe.outputs([values[i] for i in batch], ids, model.seed, settings, on_step)
            return [replace(planned[i], value=output) for i, output in zip(batch, outputs, strict=True)]

        for _, written in distributed.shared_in_stages(batches, sample, write, finish_on_first=True):
            yield from written
