"""A TCP connection to a port of this machine that can be cut and slowed."""

import socket
import threading
import time
from contextlib import suppress

LOOPBACK = "127.0.0.1"
_PIECE_BYTES = 16 * 1024
_LARGE_BYTES = 2048
"""Larger than any handshake: a part of an update."""


class Link:
    """Listens while the block runs and passes everything on, both ways."""

    def __init__(self, target_port: int) -> None:
        self._target = (LOOPBACK, target_port)
        self._listener = socket.create_server((LOOPBACK, 0))
        self._open: set[socket.socket] = set()
        self._is_cut = threading.Event()
        self._over = threading.Event()
        self.port = int(self._listener.getsockname()[1])
        self.bytes_per_s: int | None = None
        """Of each direction of each connection; ``None`` is as fast as it goes."""
        self.flips = 0
        """So many of the next large pieces to the target have one bit changed."""
        self.bytes_in = 0
        """To the target, with TLS and all."""
        self.bytes_out = 0

    def __enter__(self) -> "Link":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.close()
        self._reset()

    def cut(self) -> None:
        """Reset what is open and refuse what is new."""
        self._is_cut.set()
        self._reset()

    def mend(self) -> None:
        """Let connections through again."""
        self._is_cut.clear()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open |= {near, far}
            for source, sink, inward in ((near, far, True), (far, near, False)):
                passing = threading.Thread(target=self._pass_on, args=(source, sink, inward))
                passing.daemon = True
                passing.start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, inward: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                if self.bytes_per_s is not None:
                    time.sleep(len(piece) / self.bytes_per_s)
                if inward and self.flips and len(piece) > _LARGE_BYTES:
                    self.flips -= 1
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                sink.sendall(piece)
                if inward:
                    self.bytes_in += len(piece)
                else:
                    self.bytes_out += len(piece)
        for end in (source, sink):
            self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _reset(self) -> None:
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
