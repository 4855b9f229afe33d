"""Names of people in free text: after a title, a role or a label, beside initials or a degree.

A name alone, ``Smith``, cannot be told from any other capitalised word; those inside sentences that
pathology does not know are shown to the operator instead (``scrub.Scrubbed.look_at``).
"""

import re
from collections.abc import Callable, Iterator

from crafts_client.ingest.identifiers import Kind, Span
from crafts_client.ingest.plain_words import is_acronym, is_eponym, is_plain

_MOST_WORDS = 6
PARTICLES = frozenset({
    "al", "auf", "bin", "da", "dal", "de", "del", "della", "den", "der", "des", "di", "dos", "du",
    "el", "ibn", "la", "le", "les", "lo", "van", "vom", "von", "y", "zu", "zum", "zur",
})  # fmt: skip
TITLES = frozenset({"dr", "herr", "herrn", "frau", "mme", "mr", "mrs", "ms", "prof"})
_NO_INITIALS = frozenset({
    "AP", "CK", "CT", "DC", "DD", "DNA", "EG", "ER", "EU", "GI", "GU", "HE", "HPF", "IE", "IHC",
    "IM", "IV", "KI", "LN", "MD", "MR", "NB", "NK", "NOS", "NR", "OD", "OS", "OW", "PAS", "PO",
    "PR", "PT", "PV", "RNA", "SC", "TB", "TV", "UA", "UK", "US", "USA", "VA", "WHO", "ZB", "ZN",
    "ZT",
})  # fmt: skip
"""What letters with stops stand for when they are nobody's."""

_TOKEN = re.compile(r"[^\W\d_]+(?:['’‘-][^\W\d_]+)*")
_GAP = re.compile(r"[^\S\n]{0,3}")
_DIGIT_AFTER = re.compile(r"[-/+]?\d")
_TITLE = re.compile(
    r"(?<![\w-])(?:(?:Dr|Prof|Mrs?|Messrs|Mme|Mlle|Herrn?|Hrn?|Frau|Fräulein|Monsieur|Madame"
    r"|Mademoiselle|Docteur|Professeur|Señora?|Dra|Sig(?:\.ra)?|Dott(?:\.ssa)?)(?!\w)\.?"
    r"|herrn?(?!\w)|frau(?!\w)|HERRN?(?!\w)|FRAU(?!\w)"
    r"|(?P<weak>(?:Ms|Miss|Fr|Pr|Sra?|PD|Doctor|Professor|Nurse|dr|prof|mrs?|ms|DR|PROF|MRS?|MS)"
    r"(?!\w)\.?))"
    r"(?:[\s,]{0,2}(?:Dr|Prof|med|h\.\s?c|rer|nat|univ|habil|PD|phil|dent|Priv\.?-?Doz)(?!\w)\.?)*"
)
_METHODS_TOO = frozenset({"MR", "MS", "PD", "PR", "Pr"})
"""Titles that without a stop are also a method, a disease or a receptor."""
_BY = re.compile(
    r"\b(?:(?:(?:electronically|digitally)\s)?(?:signed|reported|dictated|reviewed|examined|verified|validated|approved"
    r"|submitted|requested|referred|performed|interpreted|transcribed|authored|written|typed"
    r"|collected|seen|prepared|grossed|authori[sz]ed|released|checked|read)(?:\s(?:out|off))?\sby"
    r"|courtesy\sof|(?:discussed|consulted)\swith|gez\.|(?:unterzeichnet|befundet|diktiert|validiert"
    r"|überwiesen|freigegeben)\svon|(?:dictated|verified|signed|approved|typed|validated|reviewed"
    r"|attending|diktat|vidiert)(?=\s?:)|(?:signé|validé|dicté|lu)\spar)\s?:?\s*",
    re.IGNORECASE,
)
_ROLE = re.compile(
    r"\b(?:pathologist|consultant|surgeon|physician|clinician|resident|registrar|fellow|technician"
    r"|oncologist|author|requester|sender|typist|secretary|einsender(?:in)?|befunder(?:in)?|m[ée]dico"
    r"|pathologe|pathologin|arzt|ärztin|hausarzt|überweiser|médecin|pathologiste|chirurgien"
    r"|prescripteur)s?\b(?:\s?[:.]\s*|\s)",
    re.IGNORECASE,
)
_FIELD = re.compile(
    r"\b(?:patient(?:['’]s|en|in|e)?(?:\s?name)?|pt\.?(?:\sname)?|name(?:\sof\spatient)?|surname"
    r"|(?:first|last|given|family|fore|maiden)[\s-]?name|vorname|nachname|nom|prénom|née?|geb\."
    r"|paciente|paziente|nombre|apellidos?|cognome|nome"
    r"|cc|c\.c\.|attn|copy\sto|mother|father|next\sof\skin)(?:\s?:|(?<=name)\s[(\"'“])\s*",
    re.IGNORECASE,
)
_PATIENT = re.compile(r"\b(?:patient(?:in|e)?|pt\.?)\s", re.IGNORECASE)
_TYPIST = re.compile(r"(?:/[^\W\d_]{2,4}(?!\w))?")
"""Whoever typed what another dictated: JKS/mlp."""
_CLOSING = re.compile(r"[)\"'”]?")
_INITIALS = re.compile(r"(?<![\w.])[^\W\d_]\.(?:[ -]?[^\W\d_]\.)*")
_AFTER = re.compile(
    r"(?<![\w'’-])(?P<name>[^\W\d_]{2,}(?:['’-][^\W\d_]+)*),?\s[A-Z]\.(?:\s?[A-Z]\.)*(?!\w)"
)
_DEGREE = re.compile(
    r",?\s(?:M\.?D\b\.?|Ph\.?\s?D\b\.?|FRCPath|MRCPath|MBBS|MBChB|FCAP|FASCP|D\.O\.)(?!\w)"
)
_WORD_BEFORE = re.compile(r"(?:[^\W\d_]+(?:['’-][^\W\d_]+)*|[A-Z]\.)$")

Accepts = Callable[[str, bool], bool]
"""Whether a word, the first or a later one, can belong to the name."""


def find_names(text: str) -> Iterator[Span]:
    """Every span that holds a person's name, with the words that announce it."""
    yield from _after_titles(text)
    for lead, accepts, with_comma in (
        (_BY, _signature, True),
        (_ROLE, _unknown, False),
        (_FIELD, _in_field, True),
        (_PATIENT, _unknown, False),
    ):
        for match in lead.finditer(text):
            end = _name_end(text, match.end(), accepts, with_comma=with_comma)
            if end is not None:
                closing = _CLOSING if match.group().endswith(("(", '"', "'", "“")) else _TYPIST
                end = closing.match(text, end).end()  # type: ignore[union-attr]
                yield Span(match.start(), end, Kind.NAME)
    yield from _with_initials(text)
    yield from _before_degrees(text)


def _after_titles(text: str) -> Iterator[Span]:
    for match in _TITLE.finditer(text):
        is_sure = match["weak"] not in _METHODS_TOO
        accepts: Accepts = _unknown_or_eponym if match["weak"] else _titled
        end = _name_end(text, match.end(), accepts if is_sure else _unknown, with_comma=False)
        if end is None and is_sure:
            end = _name_end(text, match.end(), _small_or_eponym, with_comma=False)
        if end is not None:
            yield Span(match.start(), end, Kind.NAME)


def _with_initials(text: str) -> Iterator[Span]:
    """``J. Smith``, ``J.S.``, ``Smith J.``; not a panel's letter, nor ``H.E.``."""
    for match in _INITIALS.finditer(text):
        letters = [letter for letter in match.group() if letter.isalpha()]
        if not all(letter.isupper() for letter in letters) or "".join(letters) in _NO_INITIALS:
            continue
        accepts = _unknown if _is_panel(match, letters) else _unknown_or_eponym
        end = _name_end(text, match.end(), accepts, with_comma=False)
        if end is None and len(letters) > 1:
            end = match.end()
        if end is not None:
            yield Span(match.start(), end, Kind.NAME)
    for match in _AFTER.finditer(text):
        if _unknown(match["name"], True) and not is_acronym(match["name"]):
            yield Span(match.start(), match.end(), Kind.NAME)


def _is_panel(match: re.Match[str], letters: list[str]) -> bool:
    """One of the first letters where a sentence may begin."""
    before = match.string[max(0, match.start() - 3) : match.start()].rstrip()
    return len(letters) == 1 and letters[0] <= "H" and (not before or before[-1] in ".:;([,")


def _before_degrees(text: str) -> Iterator[Span]:
    """``John Smith, MD``: back over at most a few words."""
    for match in _DEGREE.finditer(text):
        start = match.start()
        for _ in range(_MOST_WORDS):
            before = text[max(0, start - 40) : start].rstrip(" ")
            word = _WORD_BEFORE.search(before)
            if word is None or not (word.group()[1:] == "." or _unknown(word.group(), True)):
                break
            start = start - len(text[max(0, start - 40) : start]) + word.start()
        if start < match.start():
            yield Span(start, match.end(), Kind.NAME)


def name_after(text: str, start: int) -> int | None:
    """Where a name ends that begins there, eponyms included; None if none does."""
    return _name_end(text, start, _unknown_or_eponym, with_comma=False)


def _name_end(text: str, start: int, accepts: Accepts, *, with_comma: bool) -> int | None:
    """Where the name ends that begins at ``start``; None if none does."""
    end: int | None = None
    position = start
    for _ in range(_MOST_WORDS):
        token = _TOKEN.match(text, _GAP.match(text, position).end())  # type: ignore[union-attr]
        if token is None or _DIGIT_AFTER.match(text, token.end()):
            break
        word = token.group()
        stop = token.end()
        if len(word) == 1 and word.isupper() and text[stop : stop + 1] == ".":
            stop += 1
            end = stop if end is not None else None
        elif word.lower() in TITLES:
            stop += text[stop : stop + 1] == "."
        elif word.lower() in PARTICLES:
            if word.islower() and end is not None and text[stop : stop + 1] not in (" ", "'"):
                break
        elif accepts(word, end is None):
            end = stop
        else:
            break
        position = stop
        if with_comma and end is not None and text[position : position + 1] == ",":
            position, with_comma = position + 1, False
    return end


def _unknown(word: str, _first: bool) -> bool:
    """Capitalised, and no word of pathology."""
    return len(word) > 1 and word[0].isupper() and not is_plain(word) and not is_eponym(word)


def _unknown_or_eponym(word: str, first: bool) -> bool:
    return _unknown(word, first) or (word[:1].isupper() and is_eponym(word))


def _titled(word: str, first: bool) -> bool:
    """After a title any capitalised word is a name: Dr. Brown."""
    return _unknown_or_eponym(word, first) or (first and len(word) > 1 and word[0].isupper())


def _small_or_eponym(word: str, first: bool) -> bool:
    """``dr smith``, ``herr müller``: one word, as long as it is none of our plain ones."""
    return first and len(word) > 2 and (is_eponym(word) or not is_plain(word))


def _in_field(word: str, first: bool) -> bool:
    """After ``Name:`` people also write in small letters."""
    return len(word) > 1 and not is_plain(word) and (first or not is_eponym(word))


def _signature(word: str, first: bool) -> bool:
    """A name, or the two or three capitals somebody signs with."""
    return _unknown(word, first) or (first and 1 < len(word) < 4 and word.isupper())
