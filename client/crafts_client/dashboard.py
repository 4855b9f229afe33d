"""Pages that show a site to its owner; each reads the home anew and changes nothing."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from crafts_client.home import SiteHome
from crafts_client.offered_now import OfferedNow
from crafts_client.site_view import left_view, site_view
from crafts_core.delta_text import delta_text
from crafts_core.page_token import token_of
from crafts_core.served_pages import ClosedPages, serve


def make_app(path: Path, token: str, offered: OfferedNow) -> FastAPI:
    """The pages of the home at ``path``, below ``/TOKEN/``."""
    pages = ClosedPages("crafts_client", token)
    pages.environment.filters["delta"] = delta_text
    pages.add(
        "/", "site.html.j2", lambda _: {"site": site_view(SiteHome.open(path), offered.look())}
    )
    pages.add("/left", "left.html.j2", lambda _: {"left": left_view(SiteHome.open(path))})
    return pages.app


def serve_pages(home: SiteHome, *, listen: str, port: int, say: Callable[[str], None]) -> None:
    """Show the pages until Ctrl-C."""
    token = token_of(home.path)
    offered = OfferedNow(lambda: SiteHome.open(home.path))
    serve(make_app(home.path, token, offered), token, listen=listen, port=port, say=say)
