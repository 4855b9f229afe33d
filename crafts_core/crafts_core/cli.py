"""``crafts``: use a generator. Draw images and data sets, measure them, let readers judge."""

import click
import typer
from typer.core import TyperGroup

from crafts_core import dataset_cli, downstream_cli, evaluate_cli, sample_cli, study_cli
from crafts_core.command_line import Version


class _WithTwoWords(TyperGroup):
    """Finds ``evaluate downstream`` beside ``evaluate``, whose argument may be any folder."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but two words that are a command are taken as one."""
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


app = typer.Typer(
    cls=_WithTwoWords,
    no_args_is_help=True,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)


@app.callback()
def main(_version: Version = False) -> None:
    """Use a generator of synthetic histology: draw, measure, compare."""


for _command in (
    sample_cli.sample,
    dataset_cli.dataset,
    sample_cli.prompts,
    sample_cli.provenance,
    evaluate_cli.evaluate,
    evaluate_cli.compare,
):
    app.command()(_command)
app.command("evaluate downstream")(downstream_cli.downstream)
app.add_typer(study_cli.app, name="study")
