"""``crossflow sample``: outputs for prompts or pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands import options
from crossflow.commands.checkpoint import Model, uses_model
from crossflow.commands.console import join_processes, print_json, progress_bar, wants_json
from crossflow.commands.inputs import named_inputs, read_prompts
from crossflow.commands.outputs import Result, write_results
from crossflow.core.errors import UserError
from crossflow.core.output import check_output, output_folder


@click.command("sample")
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
    "--negative", "--away-from", "negative", metavar="TEXT", help="Says what to use instead of a negative prompt."
)
@options.as_json
def command(
    model: Model, prompts: Sequence[str], prompt_file: Path | None, paths: Sequence[Path], num: int,
    negative: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Make pictures from prompts, or captions, depth maps and sharper pictures from pictures.

    \b
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a red cube left of a blue sphere" --num 4
      crossflow sample --checkpoint runs/depth_tiny --input photo.jpg
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a cube" --guidance 3 guidance_interval=[0.1,0.8] zero_init=1

    KEY=VALUE sets any field of the recipe's `sample` section. Noise depends on the seed and the prompt (or the picture)
    alone, so each output can be reproduced without the others. Under torchrun or accelerate launch the processes share
    the inputs.
    """
    from crossflow.core import distributed
    from crossflow.engine.inputs import item_ids, no_negative_prompt

    if negative is not None:
        raise no_negative_prompt(prompts[0] if prompts else "PROMPT", negative)
    texts = read_prompts(prompts, prompt_file)
    if not texts and not paths:
        raise UserError(
            'No prompt or picture is given. Give --prompt "a red cube" (repeatable) or --prompts FILE to a run that '
            "takes text, --input FILE or FOLDER to one that takes pictures."
        )
    check_output(model.output, overwrite=model.overwrite)
    join_processes()
    model.announce(model.planned(Path("outputs") / model.pipe.task.name))
    inputs = named_inputs(model.pipe, texts, paths)
    ids = item_ids([value for _, value in inputs], num)
    results = _sample(model, [value for _, value in inputs], ids)
    if distributed.is_main():
        _write(model, inputs, ids, results)


def _sample(model: Model, values: Sequence[Any], ids: Sequence[str]) -> list[Any]:
    """The results of all ids, equally many of each value; in the first of several processes, none in the others."""
    from crossflow.core import distributed

    num = len(ids) // len(values)
    size = -(-len(values) // distributed.world_size())  # several processes take equal shares
    shares = [range(start, min(start + size, len(values))) for start in range(0, len(values), size)]
    with progress_bar("sampling") as on_step:

        def run(share: range) -> list[Any]:
            outputs = model.pipe(
                [values[i] for i in share],
                ids=ids[share.start * num : share.stop * num],
                num=num,
                seed=model.seed,
                output_type="np",
                on_step=on_step,
                **model.settings,
            )
            return list(outputs)

        return [result for _, part in distributed.shared(shares, run) for result in part]


def _write(model: Model, inputs: Sequence[tuple[str, Any]], ids: Sequence[str], values: Sequence[Any]) -> None:
    num = len(ids) // len(inputs)
    results = []
    for index, (id, output) in enumerate(zip(ids, values, strict=True)):
        name, value = inputs[index // num]
        stem = f"{name}_{index % num}" if num > 1 else name
        prompt = {"prompt": value} if isinstance(value, str) else {}
        results.append(Result(output, stem, prompt.get("prompt", name), {"item": id, **prompt}))
    with output_folder(Path("outputs") / model.pipe.task.name, model.output, overwrite=model.overwrite) as folder:
        listing = write_results(model, results, folder)
    if wants_json():
        print_json({"folder": str(folder), "checkpoint": model.checkpoint, "seed": model.seed, "results": listing})
