"""Pages on a port of this machine, for whoever has the link: read-only, no script, no button.

The link holds a token, which is compared in constant time before anything is looked up, and every
answer says that nothing may be loaded, framed, kept or passed on. Each page is made anew.
"""

import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from crafts_core.errors import CraftsError
from crafts_core.harmless import MOST_OF_A_SENTENCE, harmless
from crafts_core.pages import page_environment

log = logging.getLogger(__name__)

REFRESH_S = 15
CLOSED_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
View = Callable[[Mapping[str, str]], Mapping[str, object]]
"""What a template is filled with, of the parts of an address."""


class PageError(CraftsError):
    """A defect of ours; its text may hold anything, and is for the log alone."""


class ClosedPages:
    """An application of pages below ``/TOKEN/``.

    Args:
        package: Whose templates they are.
        token: Of the link.
        absent: Errors that say that there is no such page; other errors are ours to mend.
    """

    def __init__(
        self, package: str, token: str, *, absent: tuple[type[CraftsError], ...] = ()
    ) -> None:
        self.app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self.environment = page_environment(package)

        def has_token(token_given: str) -> None:
            if not hmac.compare_digest(token_given.encode(), token.encode()):
                raise HTTPException(404)

        @self.app.middleware("http")
        async def _close(
            request: Request, call_next: Callable[[Request], Awaitable[Response]]
        ) -> Response:
            request.state.nonce = secrets.token_urlsafe(16)
            response = await call_next(request)
            response.headers.update(CLOSED_HEADERS)
            response.headers["Content-Security-Policy"] = _POLICY.format(nonce=request.state.nonce)
            return response

        @self.app.exception_handler(CraftsError)
        def _cannot(_request: Request, error: Exception) -> Response:
            status = 404 if isinstance(error, absent) else 503
            said = harmless(str(error), most=MOST_OF_A_SENTENCE)
            return PlainTextResponse(said, status_code=status)

        self._guarded = [Depends(has_token)]

    def add(self, path: str, template: str, view: View) -> None:
        """A page at ``path`` below the token."""

        def shown(request: Request) -> HTMLResponse:
            try:
                facts = view(request.path_params)
            except CraftsError:
                raise
            except Exception as error:
                log.exception("a page cannot be shown")
                raise PageError(f"{type(error).__name__}: the program's log has more") from error
            values = {**facts, "nonce": request.state.nonce}
            page = self.environment.get_template(template)
            return HTMLResponse(page.render(values, refresh_s=REFRESH_S))

        self.app.get(f"/{{token_given}}{path}", dependencies=self._guarded)(shown)


def serve(app: FastAPI, token: str, *, listen: str, port: int, say: Callable[[str], None]) -> None:
    """Show pages until Ctrl-C.

    Args:
        app: Of ``ClosedPages``.
        token: Of its links.
        listen: Address; loopback needs no TLS, everything else a proxy that adds it.
        port: Of the address.
        say: Told the link.
    """
    import uvicorn

    host = f"[{listen}]" if ":" in listen else listen
    say(f"http://{host}:{port}/{token}/")
    # No access log: the token would be in it.
    uvicorn.run(
        app,
        host=listen,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        ws="none",
    )
