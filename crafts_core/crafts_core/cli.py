"""``crafts``: use a generator. Draw images and data sets, measure them, let readers judge."""

import typer

from crafts_core import dataset_cli, evaluate_cli, sample_cli, study_cli
from crafts_core.command_line import Version

app = typer.Typer(
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
app.add_typer(study_cli.app, name="study")
