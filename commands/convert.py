"""``crossflow convert``: released files to run directories, and back."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import progress_bar, say
from crossflow.core.errors import UserError


@click.command("convert", short_help="Turn a released file into a run directory, or back.")
@click.argument("source", type=options.PATH)
@click.argument("target", type=options.PATH)
@click.option("--kind", help="dimr, dit, flowtok, flowtitok or autoencoder_kl; needed for files that are not released.")
@click.option(
    "--config",
    "reference",
    type=options.EXISTING_FILE,
    help="JSON or YAML file with the reference's own settings; needed for files that are not released.",
)
@options.settings
def command(source: Path, target: Path, kind: str | None, reference: Path | None, overrides: Sequence[str]) -> None:
    """Turn a released CrossFlow or FlowTok file into a run directory, or a run directory back into such a file.

    SOURCE is a file (.pth, .bin, .pt, .safetensors) and TARGET a new folder, or the other way round. Released files are
    recognised by their tensors: CrossFlow on DiMR (256 and 512 px, CLIP and T5) and on DiT, FlowTok-XL and -H, the
    FlowTiTok tokenizer, and the autoencoder of Stable Diffusion under its original names.

    \b
      crossflow convert t2i_256px_clip_dimr.pth runs/released
      crossflow sample --checkpoint runs/released --prompt "a corgi in a spacesuit"
      crossflow convert t2i_512px_t5_dit.pth runs/t5 text.encoder=~/t5-v1_1-xxl text.precision=bfloat16
      crossflow convert FlowTiTok_512.bin codecs/flowtitok
      crossflow convert FlowTok-XL.pth runs/flowtok codec.source=codecs/flowtitok
      crossflow convert runs/released original.pth            back to the original keys, bit for bit
      crossflow convert small.pth runs/small --kind dimr --config settings.json

    KEY=VALUE overrides settings of the run. Its text encoder (CLIP ViT-L/14, T5-XXL) and autoencoder are referenced,
    not copied: by hub id unless text.encoder and codec.source give another id or a folder, and --set can replace them
    later. Files are read tensor by tensor, and no code in them is run.
    """
    from crossflow.released.convert import from_file
    from crossflow.released.restore import to_file

    back = source.is_dir()
    if back and (reference is not None or overrides):
        raise UserError("A run directory is converted back as it is: leave out --config and KEY=VALUE.")
    say(f"Converting {source} to {target}.")
    with progress_bar("converting") as on_bytes:
        if back:
            result = to_file(source, target, kind=kind, progress=on_bytes)
        else:
            result = from_file(source, target, kind=kind, config=reference, overrides=overrides, progress=on_bytes)
    say(f"{result.name}, kind {result.kind}: {result.num_tensors} tensors. Wrote {result.path}.")
    for reason, keys in result.dropped.items():
        say(f"{'Left out when converted' if back else 'Left out'}: {len(keys)} tensors ({keys[0]}, ...), {reason}.")
    for note in result.notes:
        say(note)
    if not back and (result.path / "config.yaml").is_file():
        say(f'Use it: crossflow sample --checkpoint {result.path} --prompt "..."')
