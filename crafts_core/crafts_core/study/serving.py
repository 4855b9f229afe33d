"""The study on a port of this machine that no other machine reaches."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from crafts_core.study.questions import StudyError
from crafts_core.study.reading_app import reading_app
from crafts_core.study.records import Reader
from crafts_core.study.study_file import StudyFile

LOOPBACK = "127.0.0.1"


def link(study: StudyFile, port: int, reader: Reader | None = None) -> str:
    """Where a reader reads, or where anybody with a code enters."""
    door = f"http://{LOOPBACK}:{port}/{study.info.token}/"
    return door if reader is None else f"{door}{reader.code}/"


@contextmanager
def loopback_socket(port: int) -> Iterator[socket.socket]:
    """A socket that listens on loopback; port 0 takes a free one.

    Raises:
        StudyError: the port is taken.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port))
            listening.listen()  # a link that was told answers, if only after a moment
        except OSError as error:
            raise StudyError(
                f"cannot listen on {LOOPBACK}:{port} ({error.strerror}); is the study served "
                "already? Otherwise give another --port"
            ) from error
        yield listening


def server(study: StudyFile) -> uvicorn.Server:
    """What answers on such a socket; ``run(sockets=[...])`` returns when a person ends it."""
    return uvicorn.Server(
        uvicorn.Config(
            reading_app(study),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # it would hold token and codes
            server_header=False,
            timeout_graceful_shutdown=5,
        )
    )
