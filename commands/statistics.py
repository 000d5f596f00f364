"""``crossflow statistics``."""

from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands.console import progress_bar, say


@click.command("statistics")
@click.option("--protocol", "protocol_name", required=True, help="One with a distance, such as coco-fid30k.")
@click.option("--data", required=True, help="The real pictures.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option("--network", "networks", multiple=True, metavar="features=SOURCE", help="Another feature network.")
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
def command(protocol_name: str, data: str, output: Path, networks: Sequence[str], device: str | None) -> None:
    """Statistics of real pictures for the distances of a protocol, to be carried to another machine.

    They are kept in the user's cache by the data's fingerprint, the protocol's preparation and the network's checksum,
    and are computed once; `crossflow evaluate --statistics FILE` takes them without the pictures of the split.

    \b
      crossflow statistics --protocol coco-fid30k --data coco:~/coco --output coco_val_256.safetensors
    """
    from crossflow.benchmarks.evaluation.distances import statistics_of
    from crossflow.benchmarks.evaluation.protocol import load_protocol, roles
    from crossflow.engine.sample import find_device

    protocol = load_protocol(protocol_name).using(roles(networks))
    with progress_bar("real pictures") as on_step:
        found = statistics_of(protocol, data, find_device(device), lambda what, done, total: on_step(done, total))
    found.save(output)
    say(f"{found.count} pictures, {found.about['network']}. Wrote {output}.")
