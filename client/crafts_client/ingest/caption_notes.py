"""What scrubbing did to a table's texts, for the operator who must read it before training.

A note quotes the site's own words around what was removed. It belongs beside the ingest report, at
the site and readable by its owner only: never in a log, never to a peer.
"""

from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from crafts_client.ingest.table import TableRow


class CaptionNote(BaseModel):
    """One row whose text was changed, or holds words that a person should look at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: int
    table: str = ""
    """Path of the table that has the line; empty while only one is told of."""
    found: dict[str, int]
    """How often each kind of identifier was removed, from caption and label."""
    marked: str | None
    """The text with ``[date]`` and the like in place of what was removed; None: composed."""
    marked_label: str | None = None
    """The same of a label that is none of the vocabulary."""
    look_at: tuple[str, ...]
    """Words that stayed and may be names."""
    unread: str = ""
    """The end of the caption that the foundation's text tower does not read."""
    notes: tuple[str, ...] = ()


def caption_report(rows: Iterable[TableRow]) -> tuple[CaptionNote, ...]:
    """A note for each row that needs one, in the order of the rows."""
    return tuple(_note(row) for row in rows if _needs_note(row))


def _needs_note(row: TableRow) -> bool:
    texts = (row.scrubbed, row.scrubbed_label)
    return bool(row.notes or row.unread) or any(
        text and (text.found or text.look_at) for text in texts
    )


def _note(row: TableRow) -> CaptionNote:
    texts = [text for text in (row.scrubbed, row.scrubbed_label) if text is not None]
    found: Counter[str] = Counter()
    for text in texts:
        found.update({kind.value: number for kind, number in text.found.items()})
    return CaptionNote(
        line=row.line,
        found=dict(sorted(found.items())),
        marked=None if row.scrubbed is None else row.scrubbed.marked,
        marked_label=None if row.scrubbed_label is None else row.scrubbed_label.marked,
        look_at=tuple(dict.fromkeys(word for text in texts for word in text.look_at)),
        unread=row.unread,
        notes=row.notes + ((_told(row.unread),) if row.unread else ()),
    )


def _told(unread: str) -> str:
    return f"longer than the text tower reads, which leaves out: {unread}"
