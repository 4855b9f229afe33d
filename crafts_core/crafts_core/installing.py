"""How to install what is missing. This package is on no index: it is a file that one was given."""

from crafts_core import __version__

WHEEL = f"crafts_federated-{__version__}-py3-none-any.whl"


def how_to_install(extra: str = "") -> str:
    """A command for a person, with an extra of pyproject.toml."""
    named = f"[{extra}]" if extra else ""
    return f"pip install './{WHEEL}{named}' (the wheel that you have), or '.{named}' in a clone"
