"""Names and hashes as fields of files and messages have them, and how to say what they may be."""

from typing import Annotated

from pydantic import Field

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256 = r"^[0-9a-f]{64}$"

Name = Annotated[str, Field(pattern=NAME)]
"""Of a site, a study or a cohort: part of paths, and read aloud."""
Sha256 = Annotated[str, Field(pattern=SHA256)]

IN_WORDS = {
    NAME: "small letters, digits and dashes, 63 at most, and no dash in front",
    SHA256: "64 digits, each of 0 to 9 or a to f",
}
"""What a pattern asks for, in the words that its error is told with."""
