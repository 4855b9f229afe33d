"""Fields that files and messages share, and how what is wrong in one is told."""

from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from crafts_core.harmless import harmless

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256 = r"^[0-9a-f]{64}$"

Name = Annotated[str, Field(pattern=NAME)]
"""Of a site, a study or a cohort: part of paths, and read aloud."""
Sha256 = Annotated[str, Field(pattern=SHA256)]

_IN_WORDS = {
    NAME: "small letters, digits and dashes, 63 at most, and no dash in front",
    SHA256: "64 digits, each of 0 to 9 or a to f",
}
"""What a pattern asks for, in the words that its error is told with."""
_MOST_SHOWN = 300
"""Letters of a key or a complaint."""
_NO_DEFAULT = "default_factory_not_called"
"""What pydantic says besides of a key whose default rests on one that is wrong."""


def describe_first_error(error: ValidationError) -> str:
    """One line for the first thing that is wrong: where, what, and how many more."""
    first, *rest = [each for each in error.errors() if each["type"] != _NO_DEFAULT]
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{describe(first)}{more}"


def describe(error: ErrorDetails) -> str:
    """Where and what. Keys, and values in a message, may be somebody else's."""
    where = ".".join(str(part) for part in error["loc"]) or "whole file"
    what = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        what = "unknown key; remove it"
    elif words := _IN_WORDS.get(error.get("ctx", {}).get("pattern", "")):
        what = f"expected {words}"
    return f"{harmless(where, most=_MOST_SHOWN)}: {harmless(what, most=_MOST_SHOWN)}"
