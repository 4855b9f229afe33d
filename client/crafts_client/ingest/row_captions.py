"""What a row of the site's table shows: its own words, scrubbed, or words of the public grammar."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from crafts_client.ingest.listed_names import NOBODY, ListedNames
from crafts_client.ingest.scrub import Scrubbed, scrub
from crafts_core.attribute_words import read_attributes
from crafts_core.vocabulary import PartialAttributes, VocabularyError, label_caption

MAX_CAPTION_CHARACTERS = 1000

_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_Clean = Callable[[str], Scrubbed]


@dataclass(slots=True)
class RowCaption:
    """The caption and label of one row, as far as they can be read, and what is wrong with them."""

    caption: str = ""
    scrubbed: Scrubbed | None = None
    label: str = ""
    scrubbed_label: Scrubbed | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_caption(
    cells: Mapping[str, str], known: Collection[str], listed: ListedNames = NOBODY
) -> RowCaption:
    """The row's caption, else its report, else what its label and attributes stand for.

    Args:
        cells: By column: caption, report, label and the four attributes. Others are ignored. That
            all of the first three columns are missing is wrong with the table, not with the row.
        known: The row's own names, which must not be left in free text.
        listed: Names that the site wants out of all texts.
    """
    clean = partial(scrub, known=known, listed=listed)
    row = RowCaption()
    attributes = read_attributes(cells, row.problems)
    label, text, report = (cells.get(key, "") for key in ("label", "caption", "report"))
    _read_label(label, row, clean)
    if text or report:
        _read_text(text, report, row, clean)
        if attributes != PartialAttributes():
            row.notes.append("its attributes are not used: it has a text of its own")
    elif label:
        try:
            row.caption = label_caption(label, attributes)
        except VocabularyError as error:
            row.problems.append(f"{error} (or give a caption)")
    elif cells.keys() & {"caption", "report", "label"}:
        row.problems.append("neither a caption nor a label")
    return row


def _read_text(text: str, report: str, row: RowCaption, clean: _Clean) -> None:
    if len(text) > MAX_CAPTION_CHARACTERS:
        row.problems.append(f"caption is longer than {MAX_CAPTION_CHARACTERS} characters")
        return
    if text and report:
        row.notes.append("its report is not used: it has a caption")
    row.scrubbed = clean(text or report)
    row.caption = row.scrubbed.text
    if len(row.caption) > MAX_CAPTION_CHARACTERS:
        # Cut text is scrubbed once more: what follows a number can decide what it is.
        row.caption = clean(_cut(row.caption)).text
        row.notes.append(
            f"its report has {len(row.scrubbed.text)} characters; the first {len(row.caption)} are "
            "its caption"
        )
    if not row.caption:
        row.problems.append(
            "nothing is left of its text once names, dates and numbers are removed; say what the "
            "tissue shows"
        )


def _read_label(label: str, row: RowCaption, clean: _Clean) -> None:
    """A label of the vocabulary stays as it is; any other is free text."""
    row.label = label
    try:
        if label:
            label_caption(label)
    except VocabularyError:
        row.scrubbed_label = clean(label)
        row.label = row.scrubbed_label.text


def _cut(text: str) -> str:
    """As many whole sentences as a caption may hold; whole words where that is less than half."""
    head = text[: MAX_CAPTION_CHARACTERS + 1]
    ends = [match.end() for match in _SENTENCE_END.finditer(head)]
    if ends and 2 * ends[-1] > MAX_CAPTION_CHARACTERS:
        return head[: ends[-1]]
    return head.rsplit(" ", 1)[0][:MAX_CAPTION_CHARACTERS]
