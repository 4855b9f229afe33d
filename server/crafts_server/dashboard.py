"""Pages that show a study to whoever has the link: read-only, no script, nothing to press.

The link holds a token, which is compared in constant time before anything is looked up, and every
answer says that nothing may be loaded, framed, kept or passed on. Each page reads the home anew.
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from crafts_core.durable import create_secret
from crafts_core.errors import CraftsError
from crafts_core.harmless import MOST_OF_A_SENTENCE, harmless
from crafts_core.pages import page_environment
from crafts_server.errors import HomeError
from crafts_server.home import CoordinatorHome
from crafts_server.study_view import run_view, study_view

REFRESH_S = 15
_TOKEN_FILE = "dashboard.token"  # noqa: S105  # its name
_TOKEN_BYTES = 32
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def token_of(home: CoordinatorHome) -> str:
    """The token of this home's links; made at first, the owner's alone, another if it is removed.

    Raises:
        HomeError: the file holds none.
    """
    path = home.path / _TOKEN_FILE
    if not path.exists():
        create_secret(path, secrets.token_urlsafe(_TOKEN_BYTES).encode())
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < _TOKEN_BYTES or not token.isascii():
        raise HomeError(f"{path} holds no token; remove it, and the next start makes one")
    return token


def make_app(path: Path, token: str) -> FastAPI:
    """The pages of the home at ``path``, below ``/TOKEN/``."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    environment = page_environment("crafts_server")

    def has_token(token_given: str) -> None:
        if not hmac.compare_digest(token_given.encode(), token.encode()):
            raise HTTPException(404)

    @app.middleware("http")
    async def _close(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        request.state.nonce = secrets.token_urlsafe(16)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        response.headers["Content-Security-Policy"] = _POLICY.format(nonce=request.state.nonce)
        return response

    @app.exception_handler(CraftsError)
    def _cannot(_request: Request, error: Exception) -> Response:
        return PlainTextResponse(harmless(str(error), most=MOST_OF_A_SENTENCE), status_code=503)

    def page(request: Request, template: str, **values: object) -> HTMLResponse:
        values |= {"nonce": request.state.nonce, "refresh_s": REFRESH_S}
        return HTMLResponse(environment.get_template(template).render(values))

    guarded = [Depends(has_token)]

    @app.get("/{token_given}/", dependencies=guarded)
    def _study(request: Request) -> HTMLResponse:
        return page(request, "study.html.j2", study=study_view(CoordinatorHome.open(path)))

    @app.get("/{token_given}/runs/{run_id}", dependencies=guarded)
    def _run(request: Request, run_id: str) -> HTMLResponse:
        return page(request, "run.html.j2", run=run_view(CoordinatorHome.open(path), run_id))

    return app


def serve_pages(
    home: CoordinatorHome, *, listen: str, port: int, say: Callable[[str], None]
) -> None:
    """Show the pages until Ctrl-C.

    Args:
        home: What they are about.
        listen: Address; loopback needs no TLS, everything else a proxy that adds it.
        port: Of the address.
        say: Told the link.
    """
    import uvicorn

    token = token_of(home)
    host = f"[{listen}]" if ":" in listen else listen
    say(f"http://{host}:{port}/{token}/")
    # No access log: the token would be in it.
    uvicorn.run(
        make_app(home.path, token),
        host=listen,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        ws="none",
    )
