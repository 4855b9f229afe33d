"""The study's foundation from the registrar: public files, resumable, every one checked."""

from pathlib import Path

from crafts_client.enrolment import Registrar
from crafts_client.errors import EnrolmentError
from crafts_client.home import SiteHome
from crafts_core.durable import write_file
from crafts_core.foundation_manifest import (
    MANIFEST_NAME,
    FoundationManifest,
    embedded_path,
    parse_manifest,
    read_manifest,
    refuse_unsafe,
    sha256_of,
    verify,
)
from crafts_core.progress import Progress

_MOST_BYTES = 32 << 30


def fetch_foundation(home: SiteHome, progress: Progress) -> tuple[Path, FoundationManifest]:
    """Fetch what is missing; the embedded foundation is never fetched.

    Returns:
        Where it lies, and its manifest.

    Raises:
        EnrolmentError: the coordinator cannot be reached, or sent other bytes than its manifest
            says.
        FoundationError: the manifest is malformed.
    """
    with Registrar(home) as registrar:
        text = registrar.call("GetFoundation").manifest
        manifest = parse_manifest(text)
        embedded = embedded_path()
        if read_manifest(embedded).hash == manifest.hash:
            return embedded, manifest
        folder, left = home.foundations_path / manifest.hash, _MOST_BYTES
        for done, (name, digest) in enumerate(manifest.files.items()):
            progress("foundation", done, len(manifest.files))
            target = folder / name
            refuse_unsafe(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_file(registrar, name, target, left)
            left -= target.stat().st_size
            if sha256_of(target) != digest:
                target.unlink()
                raise EnrolmentError(
                    f"{name} is not what the manifest says; run the same command again, and tell "
                    "the coordinator if it stays so"
                )
        progress("foundation", len(manifest.files), len(manifest.files))
    write_file(folder / MANIFEST_NAME, text)
    verify(folder)
    return folder, manifest


def _fetch_file(registrar: Registrar, name: str, target: Path, most_bytes: int) -> None:
    """Append what is missing of one file, which no coordinator fills a disk with."""
    with target.open("ab") as file:
        while piece := registrar.call("ReadFoundation", path=name, offset=file.tell()).data:
            file.write(piece)
            if file.tell() > most_bytes:
                raise EnrolmentError(
                    f"with {name} the foundation is larger than any is; tell the coordinator"
                )
