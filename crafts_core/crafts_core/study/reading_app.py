"""The pages that readers see: a door, an image with its questions, and the end.

The link is the key: its first part is the study's token, its second the reader's code, and every
request without the token gets the same empty answer. A page holds the id of a trial, drawn at
random, and how far the reader is; what an image is stays in the file.
"""

import hmac
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from crafts_core.pages import page_environment
from crafts_core.served_pages import CLOSED_HEADERS
from crafts_core.study.questions import (
    ATTRIBUTES,
    MAX_RATING,
    SCORES,
    TYPE_CHOICES,
    Answer,
    StudyError,
)
from crafts_core.study.records import Reader
from crafts_core.study.study_file import FileBusyError, NotCurrentError, StudyFile

log = logging.getLogger(__name__)

HOSTS = ("127.0.0.1", "localhost")
HEADERS = CLOSED_HEADERS | {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
_ASSETS = {"reading.css": "text/css", "reading.js": "text/javascript"}
_Next = Callable[[Request], Awaitable[Response]]


def reading_app(study: StudyFile) -> FastAPI:
    """The application of one study; the caller closes the file."""
    info = study.info
    pages = page_environment("crafts_core.study")
    app = FastAPI(title="Reader study", docs_url=None, redoc_url=None, openapi_url=None)

    def page(name: str, **values: object) -> HTMLResponse:
        return HTMLResponse(pages.get_template(name).render(study=info.name, **values))

    def reader(code: str) -> Reader:
        found = study.reader_with(code)
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return found

    ThisReader = Annotated[Reader, Depends(reader)]

    @app.middleware("http")
    async def guard(request: Request, call_next: _Next) -> Response:
        given = request.url.path.split("/")[1]
        if hmac.compare_digest(given.encode(), info.token.encode()):
            response = await call_next(request)
        else:
            response = Response(status_code=HTTPStatus.NOT_FOUND)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))

    @app.exception_handler(StudyError)
    async def refuse(_request: Request, error: StudyError) -> JSONResponse:
        if isinstance(error, FileBusyError):
            log.error("%s", error)  # for the coordinator: a reader need not know where the file is
            return JSONResponse({"detail": "not saved"}, HTTPStatus.SERVICE_UNAVAILABLE)
        is_late = isinstance(error, NotCurrentError)
        status = HTTPStatus.CONFLICT if is_late else HTTPStatus.UNPROCESSABLE_ENTITY
        return JSONResponse({"detail": str(error)}, status)

    @app.get("/{token}/")
    def door() -> Response:
        return page("door.html.j2", is_wrong=False)

    @app.get("/{token}/enter")
    def enter(code: str = "") -> Response:
        found = study.reader_with(code)
        if found is None:
            return page("door.html.j2", is_wrong=True)
        return RedirectResponse(f"{found.code}/", HTTPStatus.SEE_OTHER)

    @app.get("/{token}/assets/{name}")
    def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(pages.get_template(name).render(), media_type=_ASSETS[name])

    @app.get("/{token}/{code}/")
    def read(this: ThisReader) -> Response:
        position = study.position(this)
        if position.trial is None:
            return page("done.html.j2", position=position)
        return page(
            "reading.html.j2",
            position=position,
            questions=info.questions,
            scores=SCORES,
            attributes=ATTRIBUTES,
            ratings=range(1, MAX_RATING + 1),
            types=TYPE_CHOICES,
        )

    @app.get("/{token}/{code}/image/{trial}")
    def image(this: ThisReader, trial: str) -> Response:
        return Response(study.picture(this, trial), media_type="image/png")

    @app.post("/{token}/{code}/answer")
    def answer(this: ThisReader, given: Answer) -> dict[str, str]:
        truth = study.record(this, given)
        if truth is None:
            return {}
        kind = "synthetic" if truth.is_synthetic else "real"
        named = "" if truth.type is None else TYPE_CHOICES[truth.type]
        return {"truth": kind, "type": named if info.questions.types else ""}

    @app.post("/{token}/{code}/undo")
    def undo(this: ThisReader) -> dict[str, str]:
        study.undo(this)
        return {}

    return app
