"""Panics of libraries written in Rust, as the errors that they are.

PyO3 raises a panic as an exception that is no ``Exception``, so it passes everybody who takes what
a library raises over one text for the fault of that text, and ends the program.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_MODULE = "pyo3_runtime"
"""Where PyO3 says that its ``PanicException`` comes from; nobody can import it from there."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise RuntimeError in place of a panic."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != _MODULE:
            raise
        raise RuntimeError("a library panicked") from error
