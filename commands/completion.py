"""``crossflow completion``: the names of commands and options in a shell, at the press of Tab."""

import click

from crossflow.commands import options

INSTALL = {
    "bash": "echo 'eval \"$(crossflow completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(crossflow completion zsh)\"' >> ~/.zshrc",
    "fish": "crossflow completion fish > ~/.config/fish/completions/crossflow.fish",
}


@click.command("completion", short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=options.Choice(list(INSTALL)))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that makes a SHELL (bash, zsh, fish) complete commands, options and their values.

    \b
      eval "$(crossflow completion bash)"                    in this shell
      crossflow completion fish > ~/.config/fish/completions/crossflow.fish
      echo 'eval "$(crossflow completion bash)"' >> ~/.bashrc         in every new one; for zsh in ~/.zshrc
    """
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    script = complete(context.find_root().command, {}, "crossflow", "_CROSSFLOW_COMPLETE")
    click.echo(script.source())
