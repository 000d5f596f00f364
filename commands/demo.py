"""``crossflow demo``: the models in a web page."""

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import count, open_file, say
from crossflow.core.errors import UserError

EXTRA = 'pip install "crossflow-toolkit[demo]"'
LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command("demo", short_help="Open the models in a web page.")
@click.option("--checkpoint", "checkpoints", multiple=True, help="Run directory, zoo:NAME or hub id (owner/name); "
              "repeatable. Default without --runs: the models in the box.")  # fmt: skip
@click.option("--runs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of runs: their "
              "training curves, and the items of their evaluations.")  # fmt: skip
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: the whole network."
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the first free one from 7860.")
@click.option("--auth", metavar="USER:PASSWORD", help="Ask visitors for a name and a password.")
@options.device
@click.option("--precision", type=options.Choice(list(options.PRECISIONS)), help="Of matrix products.")
@click.option("--open", "open_result", is_flag=True, help="Open the page in the browser.")
def command(
    checkpoints: Sequence[str], runs: Path | None, host: str, port: int | None, auth: str | None,
    device: str | None, precision: str | None, open_result: bool,
) -> None:  # fmt: skip
    """Open models in a web page: each task with examples and own pictures, the latent space, the flow step by step,
    models side by side, training curves, and the worst and best items of evaluations.

    \b
      crossflow demo
      crossflow demo --checkpoint runs/t2i_small --checkpoint runs/depth_small --runs runs
      crossflow demo --checkpoint runs/t2i_small --host 0.0.0.0 --port 8000 --auth me:secret

    The page works without a connection to the internet. Ctrl-C ends it.
    """
    name_and_password = _pair(auth)
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"The page needs gradio, which is not installed: {EXTRA}.")
    from crossflow.demo.models import open_models
    from crossflow.demo.page import Server
    from crossflow.engine.sample import load
    from crossflow.networks.hub import SHIPPED, shipped_models

    if not checkpoints and runs is None:
        checkpoints = [SHIPPED + name for name in shipped_models()]
    say(f"Loading {count(len(checkpoints), 'model')}.")
    models = open_models(checkpoints, lambda checkpoint: load(checkpoint, device=device, precision=precision))
    for model in models.all:
        say(f"{model.title}: {model.facts}")
    try:
        server = Server(models, runs, host=host, port=port, auth=name_and_password)
    except OSError as error:
        place = f"{host}, port {port}" if port is not None else f"{host}, ports from 7860"
        raise UserError(f"The page cannot listen at {place}: taken, or not allowed. Choose another --port.") from error
    with server:
        if host not in LOCAL and auth is None:
            say(f"Everyone who reaches {host} can use this page; --auth USER:PASSWORD asks for a password.")
        say(f"The page is at {server.url} (Ctrl-C ends it).")
        if open_result:
            open_file(server.url)
        while True:
            time.sleep(3600)


def _pair(auth: str | None) -> tuple[str, str] | None:
    """USER:PASSWORD taken apart. Raises UserError unless both are there."""
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise UserError("--auth takes a name and a password with a colon between them, such as --auth me:secret.")
    return user, password
