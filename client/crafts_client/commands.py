"""What the commands of ``crafts-client`` have in common."""

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path, typer.Option("--home", envvar="CRAFTS_SITE_HOME", help="Folder of the site home.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
PlanHash = Annotated[
    str,
    typer.Argument(help="16 digits or more of its hash, as plan list has them; all 64 to approve."),
]
