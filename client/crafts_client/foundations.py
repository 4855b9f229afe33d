"""The foundations that lie at this site: the embedded one, the one in use, and what was fetched."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_core.foundation_manifest import (
    MANIFEST_NAME,
    FoundationManifest,
    embedded_path,
    read_manifest,
    verify,
)

_PREFIX, _WHOLE = re.compile(r"[0-9a-f]{16,64}"), 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundationHere:
    """One of them, as a person should see it before approving it."""

    path: Path
    manifest: FoundationManifest
    num_bytes: int
    is_approved: bool
    is_used: bool
    """Whether site.toml names it."""


def foundations_here(home: SiteHome) -> Iterator[FoundationHere]:
    """Every foundation once; files that are still missing count no bytes.

    Raises:
        FoundationError: a manifest is not one.
    """
    fetched = sorted(path.parent for path in home.foundations_path.glob(f"*/{MANIFEST_NAME}"))
    used, seen = read_manifest(home.foundation_path).hash, set[str]()
    for path in (home.foundation_path, embedded_path(), *fetched):
        manifest = read_manifest(path)
        if manifest.hash in seen:
            continue
        seen.add(manifest.hash)
        files = [path / name for name in manifest.files]
        yield FoundationHere(
            path=path,
            manifest=manifest,
            num_bytes=sum(file.stat().st_size for file in files if file.is_file()),
            is_approved=home.foundation_approvals.has(manifest.hash),
            is_used=manifest.hash == used,
        )


def foundation_here(
    home: SiteHome, foundation_hash: str, *, to_approve: bool = False
) -> FoundationHere:
    """The one whose hash begins so, every byte checked.

    Args:
        home: Where to look.
        foundation_hash: At least 16 digits.
        to_approve: All 64 are needed: whoever makes foundations makes two that begin alike.

    Raises:
        HomeError: too few digits, or none begins so.
        FoundationError: a file of it is not what its manifest says.
    """
    if not _PREFIX.fullmatch(foundation_hash):
        raise HomeError(
            "expected at least 16 hexadecimal digits of a foundation's hash, got "
            f"{foundation_hash!r}; see crafts-client foundation list"
        )
    if to_approve and len(foundation_hash) < _WHOLE:
        raise HomeError(
            f"expected all {_WHOLE} digits of the foundation's hash, as crafts-client foundation "
            "list has them: two foundations can be made to begin alike"
        )
    for found in foundations_here(home):
        if found.manifest.hash.startswith(foundation_hash):
            verify(found.path)
            return found
    raise HomeError(
        f"no foundation here begins with {foundation_hash!r}; see crafts-client foundation list, "
        "or get the coordinator's with crafts-client foundation fetch"
    )
