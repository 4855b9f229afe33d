"""Pages that show a study to whoever has the link; each reads the home anew."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from crafts_core.page_token import token_of
from crafts_core.served_pages import ClosedPages, serve
from crafts_server.errors import UnknownRunError
from crafts_server.home import CoordinatorHome
from crafts_server.study_view import UP_WITHIN, run_view, study_view


def make_app(path: Path, token: str) -> FastAPI:
    """The pages of the home at ``path``, below ``/TOKEN/``."""
    pages = ClosedPages("crafts_server", token, absent=(UnknownRunError,))
    minutes = int(UP_WITHIN.total_seconds() // 60)
    pages.add(
        "/",
        "study.html.j2",
        lambda _: {"study": study_view(CoordinatorHome.open(path)), "up_within_min": minutes},
    )
    pages.add(
        "/runs/{run_id}",
        "run.html.j2",
        lambda parts: {"run": run_view(CoordinatorHome.open(path), parts["run_id"])},
    )
    pages.add(
        "/runs/{run_id}/all",
        "run.html.j2",
        lambda parts: {"run": run_view(CoordinatorHome.open(path), parts["run_id"], whole=True)},
    )
    return pages.app


def serve_pages(
    home: CoordinatorHome, *, listen: str, port: int, say: Callable[[str], None]
) -> None:
    """Show the pages until Ctrl-C."""
    token = token_of(home.path)
    serve(make_app(home.path, token), token, listen=listen, port=port, say=say)
