"""``crossflow statistics``: feature statistics of real pictures, for FID and its relatives."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import progress_bar, say
from crossflow.core.output import check_output


@click.command("statistics", short_help="Statistics of real pictures for distances such as FID.")
@click.option("--protocol", "protocol_name", required=True, help="A protocol with a distance, such as coco-fid30k.")
@click.option("--data", required=True, help="The real pictures (crossflow list datasets).")
@click.option("--output", required=True, type=options.PATH, help="The .safetensors file to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--network", "networks", multiple=True, metavar="features=SOURCE", help="Another feature network.")
@options.device
def command(
    protocol_name: str, data: str, output: Path, overwrite: bool, networks: Sequence[str], device: str | None
) -> None:
    """Statistics of real pictures for the distances of a protocol, for use on another machine.

    They are cached for the user, keyed by the data's fingerprint, the protocol's preparation and the network's
    checksum, and computed once; `crossflow evaluate --statistics FILE` uses them without the pictures.

    \b
      crossflow statistics --protocol coco-fid30k --data coco:~/coco --output coco_val_256.safetensors
    """
    from crossflow.benchmarks.evaluation.protocol import load_protocol, roles
    from crossflow.benchmarks.evaluation.real_pictures import statistics_of
    from crossflow.engine.sample import find_device

    check_output(output, overwrite=overwrite)
    protocol = load_protocol(protocol_name).using(roles(networks))
    say(f"Using the pictures of {data} by the rules of {protocol.name}. The statistics go to {output}.")
    with progress_bar("real pictures") as on_step:
        result = statistics_of(protocol, data, find_device(device), on_step)
    result.save(output)
    say(f"{result.count} pictures, {result.about['network']}. Wrote {output}.")
