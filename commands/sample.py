"""``crossflow sample``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands.checkpoint import Use, uses_checkpoint
from crossflow.commands.console import progress_bar, say
from crossflow.commands.inputs import read_inputs
from crossflow.commands.outputs import write_grid


@click.command("sample")
@uses_checkpoint(shared=True)
@click.option("--prompt", "prompts", multiple=True, help="A prompt, for text-to-image; may be given several times.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with one prompt per line.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A picture or a folder of pictures, for the other tasks.",
)
@click.option("--num", default=1, show_default=True, type=click.IntRange(1), help="Outputs per input.")
def command(
    use: Use,
    prompts: Sequence[str],
    prompt_file: Path | None,
    inputs: Sequence[Path],
    num: int,
) -> None:
    """Make pictures from prompts, or captions, depth maps, sharper pictures from pictures.

    \b
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a red cube left of a blue sphere" --num 4
      crossflow sample --checkpoint runs/depth_tiny --input photo.jpg
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a cube" --guidance 3 guidance_interval=[0.1,0.8] zero_init=1

    KEY=VALUE sets any field of the recipe's `sample` section.
    """
    from crossflow.core import distributed
    from crossflow.engine.inputs import item_ids

    pipe = use.pipe
    asked = read_inputs(pipe, prompts, prompt_file, inputs)
    folder = use.output or Path("outputs") / pipe.task.name
    ids = item_ids([value for _, value in asked], num)
    # Several processes take an equal share each; the first writes what all have made.
    size = -(-len(asked) // distributed.world_size())
    shares = [range(start, min(start + size, len(asked))) for start in range(0, len(asked), size)]
    with progress_bar("sampling") as on_step:

        def make(share: range) -> list[Any]:
            values, names = [asked[i][1] for i in share], [ids[i * num + k] for i in share for k in range(num)]
            made = pipe(values, ids=names, num=num, seed=use.seed, output_type="np", on_step=on_step, **use.settings)
            return list(made)

        results = [result for _, made in distributed.shared(shares, make) for result in made]
    if not distributed.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    names = []
    for index, result in enumerate(results):
        name, value = asked[index // num]
        stem = folder / (f"{name}_{index % num}" if num > 1 else name)
        about: dict[str, Any] = {"item": ids[index]}
        about |= {"prompt": value} if isinstance(value, str) else {}
        written += pipe.task.write_output(result, stem, use.metadata(**about))
        if isinstance(result, str):
            say(f"{name}: {result}")
        names.append(value if isinstance(value, str) else name)
    if len(results) > 1 and (shown := pipe.task.pictures(results)):
        written.append(write_grid(shown, names, folder / "grid.png"))
    say(f"Wrote {len(written)} files to {folder}" + (f" ({written[-1].name})" if written else "") + ".")
