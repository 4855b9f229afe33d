"""What in free text could say who a patient is: dates, numbers, addresses and the like.

Each kind is a few regular expressions, some with a check in Python where an expression alone would
also hit clinical words (a dilution is no time, OCT4 no day in October). All run in linear time:
no repeated group can match one text in two ways, and none looks back further than a few letters.
"""

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What was removed."""

    DATE = "date"
    TIME = "time"
    NAME = "name"
    NUMBER = "number"
    PHONE = "phone"
    EMAIL = "e-mail"
    WEB = "web address"
    AGE = "age"
    ADDRESS = "address"
    KNOWN = "known word"
    LISTED = "listed name"


class Span(NamedTuple):
    """A piece of text, from ``start`` up to ``end``."""

    start: int
    end: int
    kind: Kind


Check = Callable[[re.Match[str]], bool]

_MONTH = (
    r"(?:jan(?:uary|uar|uari|vier)?|jänner|enero|gennaio|feb(?:ruary|ruar|ruari|raio|braio)?|feber"
    r"|f[ée]vr(?:ier)?|febrero|mar(?:ch|s|zo|zec)?|m[äa]e?rz|maart|apr(?:il|ile)?|avr(?:il)?|abril"
    r"|may|mai|mayo|maggio|mei|june?|juni|juin|junio|giugno|july?|juli|juil(?:let)?|julio|luglio"
    r"|aug(?:ust|ustus)?|ao[ûu]t|agosto|sept?(?:ember|embre|iembre)?|settembre"
    r"|o[ck]t(?:ober|obre)?|octubre|ottobre|nov(?:ember|embre|iembre)?"
    r"|de[cz](?:ember|embre)?|d[ée]c(?:embre)?|diciembre|dicembre)\b(?:\.(?=[\s,/-]{0,2}\d))?"
)
_WEEKDAY = (
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)(?:s|nes|r|rs|ur)?(?:day)?\.?|montag|dienstag|mittwoch|donnerstag|freitag"
    r"|samstag|sonntag|lundi|mardi|mercredi|jeudi|vendredi|samedi|dimanche),?\s+"
)
_YEAR = r"(?:19|20)\d\d"
_BORN = (
    r"\b(?:DOB|D\.O\.B\.|date\s+of\s+birth|born|geboren|geb\.|geburtsdatum|geburtsjahr|jahrgang"
    r"|n[ée]e?\s+(?:le|en))"
)
_TOP_DOMAINS = r"(?:com|org|net|edu|gov|info|eu|de|fr|uk|ch)"
_NO_DILUTION = re.compile(r"(?:ratio|dilut\w*|tit(?:er|re)|\bt\()\W{0,3}(?:of\W)?$", re.IGNORECASE)
_UNIT = re.compile(r"\s?(?:%|[cmµμu]m\b|m[lg]\b|x\b|×|-?fold)")
_STAINS = frozenset({
    "BCL", "CA", "CAM", "CD", "CEA", "CK", "ER", "GFAP", "HE", "HMB", "HPF", "HPV", "IL", "KI",
    "M", "MIB", "MUC", "PD", "PR", "TTF",
})  # fmt: skip
"""Letters before numbers that mean an antibody or a stain."""
_MORPHOLOGY = re.compile(r"M-?\d{4}/\d\d")
"""ICD-O with a grade."""


def find_identifiers(text: str) -> Iterator[Span]:
    """Every span of text that has the shape of an identifier; they may overlap."""
    for kind, pattern, check in _RULES:
        for match in pattern.finditer(text):
            if check is None or check(match):
                yield Span(_with_lead(text, match.start(), kind), match.end(), kind)


def _with_lead(text: str, start: int, kind: Kind) -> int:
    """Where the words begin that would be left hanging: ``on``, ``Tel.:``, ``Received``."""
    lead = _LEADS.get(kind)
    before = text[max(0, start - 40) : start]
    found = lead.search(before) if lead is not None else None
    return start - len(found.group()) if found is not None else start


def _is_day(match: re.Match[str]) -> bool:
    first, second = int(match["a"]), int(match["b"])
    if not (1 <= min(first, second) <= 12 and 1 <= max(first, second) <= 31):
        return False
    year = match.groupdict().get("year") or "0000"
    return len(year) == 4 or not _UNIT.match(match.string, match.end())


def _is_month_and_year(match: re.Match[str]) -> bool:
    return not _UNIT.match(match.string, match.end())


def _is_named_day(match: re.Match[str]) -> bool:
    """A day and a month in words; without a year, ``may`` is a verb and ``OCT 4`` a protein."""
    if match["year"]:
        return True
    month = match["month"].rstrip(".")
    if month.lower() == "oct" and match["day"] in ("2", "3", "4"):
        return False
    return month not in ("may", "mar", "march", "mai", "mars", "sept", "dec")


def _is_capitalised_month(match: re.Match[str]) -> bool:
    return match["month"][0].isupper() and match["month"].lower() not in ("may", "oct", "mar")


def _is_time(match: re.Match[str]) -> bool:
    if match["suffix"]:
        return True
    before = match.string[max(0, match.start() - 24) : match.start()]
    return len(match["hour"]) == 2 and not _NO_DILUTION.search(before)


def _is_phone(match: re.Match[str]) -> bool:
    return sum(letter.isdigit() for letter in match.group()) >= 7


def _is_accession(match: re.Match[str]) -> bool:
    return match["letters"].upper() not in _STAINS and not _MORPHOLOGY.fullmatch(match.group())


def _is_year_and_number(match: re.Match[str]) -> bool:
    return not re.fullmatch(_YEAR, match["number"])


def _has_digit(match: re.Match[str]) -> bool:
    return any(letter.isdigit() for letter in match["value"])


def _has_many_digits(match: re.Match[str]) -> bool:
    """Five in a row, or six in all with letters between that make no size and no chromosome."""
    token = match.group()
    if re.search(r"\d{5}", token):
        return True
    letters = {letter for letter in token.lower() if letter.isalpha()}
    return sum(letter.isdigit() for letter in token) >= 6 and not letters <= set("xcmµμpq")


def _rule(
    kind: Kind, expression: str, check: Check | None = None
) -> tuple[Kind, re.Pattern[str], Check | None]:
    return kind, re.compile(expression, re.IGNORECASE), check


def _cased(
    kind: Kind, expression: str, check: Check | None = None
) -> tuple[Kind, re.Pattern[str], Check | None]:
    return kind, re.compile(expression), check


_RULES = (
    # An address of a machine first: it may hold what looks like anything else.
    _rule(Kind.EMAIL, r"(?<![\w.+-])[\w.+-]+\s?(?:@|[\[(]\s?at\s?[\])])\s?[\w-]+(?:\.[\w-]+)*"),
    _rule(Kind.WEB, r"(?<!\w)(?:https?://|ftp://|www\.)[^\s)\]>]+"),
    _rule(Kind.WEB, r"(?<![\w.])(?:doi:\s?)?10\.\d{4,9}/[^\s)\]>]+"),
    _cased(Kind.WEB, rf"(?<![\w.-])[a-z0-9-]+(?:\.[a-z0-9-]+)*\.{_TOP_DOMAINS}\b(?:/[^\s)\]>]*)?"),
    _rule(Kind.WEB, r"(?<![\d.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\d.]\d)"),
    # Dates.
    _rule(
        Kind.DATE,
        rf"(?<!\d)(?<!\d[./-]){_YEAR}([./-])\s?(?:0?[1-9]|1[0-2])\1\s?(?:0?[1-9]|[12]\d|3[01])"
        r"(?!\d)(?:(?:T|,?\s)\d\d:\d\d(?::\d\d)?(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:?\d\d)?)?",
    ),
    _rule(
        Kind.DATE,
        rf"(?<!\d)(?<!\d[./-])(?P<a>\d\d?)([./-])\s?(?P<b>\d\d?)\2\s?(?P<year>{_YEAR})(?!\d)",
        _is_day,
    ),
    _rule(
        Kind.DATE,
        r"(?<![\w./-])(?P<a>\d\d?)([./-])\s?(?P<b>\d\d?)\2\s?(?P<year>\d\d)(?![\w/-]|[.,]\d)",
        _is_day,
    ),
    _rule(Kind.DATE, rf"(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"),
    _rule(
        Kind.DATE,
        rf"(?<![\d./,-])(?:(?:0?[1-9]|1[0-2])/|(?:0[1-9]|1[0-2])[.-]){_YEAR}(?!\d)",
        _is_month_and_year,
    ),
    _rule(Kind.DATE, rf"(?<![\w./-]){_YEAR}[-/](?:0[1-9]|1[0-2])(?![\w/-])", _is_month_and_year),
    _rule(
        Kind.DATE,
        rf"(?:\b{_WEEKDAY})?(?<![\w.,])(?P<day>[0-3]?\d)(?:st|nd|rd|th|er|\.)?(?:\sof|\sde)?"
        rf"[\s./-]{{1,2}}(?P<month>{_MONTH})"
        rf"(?P<year>,?[\s./-]{{1,2}}(?:de\s)?(?:\d{{4}}|'?\d\d)(?!\d))?",
        _is_named_day,
    ),
    _rule(
        Kind.DATE,
        rf"(?:\b{_WEEKDAY})?\b(?P<month>{_MONTH})[\s./-]{{1,2}}(?P<day>[0-3]?\d)(?:st|nd|rd|th)?"
        rf"(?P<year>,?[\s./-]{{1,2}}(?:\d{{4}}|'\d\d)(?!\d))?(?![\w%/+]|[.,]\d|-\w)",
        _is_named_day,
    ),
    _rule(Kind.DATE, rf"\b{_MONTH},?[\s./'-]{{0,2}}(?:de\s)?{_YEAR}(?!\d)"),
    _rule(Kind.DATE, rf"(?<!\d){_YEAR}[\s./-]{{1,2}}{_MONTH}(?:[\s./-]{{1,2}}[0-3]?\d(?!\d))?"),
    _rule(
        Kind.DATE,
        r"\b(?:in|since|until|during|last|early|late|mid|im|seit|en|depuis)[\s-]"
        rf"(?P<month>{_MONTH})",
        _is_capitalised_month,
    ),
    _rule(
        Kind.DATE,
        r"\b(?:am|vom|ab|bis|zum|den)\s(?P<a>\d\d?)\.\s?(?P<b>\d\d?)\.(?!\d)",
        _is_day,
    ),
    _rule(Kind.DATE, rf"\b{_WEEKDAY}(?:the\s)?(?P<a>\d\d?)[./](?P<b>\d\d?)(?![\w/])", _is_day),
    _rule(Kind.DATE, r"\bon\s(?P<a>\d\d?)/(?P<b>\d\d?)(?=[.,;)]\s|[.,;)]?$)", _is_day),
    _rule(Kind.DATE, r"\b(?:le|du|au)\s(?P<a>\d\d?)/(?P<b>\d\d?)(?![\w/])", _is_day),
    _rule(Kind.DATE, r"\b(?:on|dated)\s(?=0|\d\d?/0)(?P<a>\d\d?)/(?P<b>\d\d?)(?![\w/])", _is_day),
    _rule(Kind.DATE, rf"{_BORN}[\s:.]{{0,3}}(?:in\s|am\s|on\s)?{_YEAR}(?!\d)"),
    # Times of the day.
    _rule(
        Kind.TIME,
        r"(?<![\d:.,/*])(?P<hour>[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?"
        r"(?P<suffix>\s?(?:[ap]\.?m\b\.?|Uhr\b|hrs?\b))?(?![\d:])",
        _is_time,
    ),
    _rule(Kind.TIME, r"(?<![\d:.,/])(?:[01]?\d|2[0-3])(?:\.[0-5]\d\sUhr\b|\s?h\s?[0-5]\d\b)"),
    _rule(Kind.TIME, r"(?<![\d:.,/])(?:[01]?\d|2[0-3])\s?(?:a\.m\.|p\.m\.|Uhr\b)"),
    _rule(Kind.TIME, r"\b(?:at|around|um|gegen)\s(?:0?\d|1[0-2])\s?[ap]m\b"),
    # Phone numbers.
    _rule(
        Kind.PHONE,
        r"\b(?:tel(?:e(?:ph|f)on)?|t[ée]l|phone|fax|mobile?|handy|pager|ext(?:ension)?|hotline)\b"
        r"[\s.:]{0,3}(?:n(?:o|r|umber)\b[\s.:]{0,2})?\+?\(?\d[\d\s./()-]{1,24}\d",
    ),
    _rule(Kind.PHONE, r"(?<![\w+])\+\d{1,3}(?:[\s./()-]{1,3}\d{1,5}){2,6}(?!\d)", _is_phone),
    _rule(Kind.PHONE, r"(?<![\w.,])(?:\(\d{3}\)|\d{3})[-.\s]{1,2}\d{3}[-.\s]\d{4}(?!\d)"),
    _rule(
        Kind.PHONE,
        r"(?<![\w.,])(?:\(0\d{1,4}\)|0\d{1,4})(?:[\s./-]{1,3}\d{2,4}){2,5}(?!\d)",
        _is_phone,
    ),
    # Where somebody lives or is treated.
    _cased(
        Kind.ADDRESS,
        r"(?<![\w.,])\d{1,5}[a-z]?,?\s(?:[A-Z][\w'’.-]{1,30}\s){1,3}"
        r"(?:Street|St\.|Avenue|Ave\.?|Road|Rd\.?|Lane|Drive|Boulevard|Blvd\.?|Court|Way|Square)"
        r"(?!\w)",
    ),
    _cased(
        Kind.ADDRESS,
        r"(?<![\w-])[A-ZÄÖÜ][\wäöüß-]{1,40}(?:straße|strasse|str\.|gasse|platz|allee|damm|weg)"
        r"\s\d{1,4}[a-z]?\b",
    ),
    _cased(
        Kind.ADDRESS,
        r"(?<![\w.,])\d{1,4}(?:\s?bis|\s?ter)?,?\s(?:rue|avenue|boulevard|chemin|place|allée"
        r"|impasse|quai)\s(?:de\sla\s|du\s|des\s|de\sl['’]|de\s|d['’])?[A-ZÀ-Ý][\w'’-]+"
        r"(?:\s[A-ZÀ-Ý][\w'’-]+)?",
    ),
    _cased(Kind.ADDRESS, r"\bP\.?\s?O\.?\s[Bb]ox\s\d+|\bPostfach\s\d[\d\s]{0,8}"),
    _cased(Kind.ADDRESS, r"(?<![\w-])(?:[A-Z]{1,2}-)?\d{5}\s[A-ZÄÖÜ][a-zäöüß]{2,30}"),
    _cased(Kind.ADDRESS, r"\b[A-Z]{1,2}\d[A-Z\d]?\s\d[ABD-HJLNP-UW-Z]{2}\b"),
    _cased(Kind.ADDRESS, r"\b[A-Z]\d[A-Z]\s\d[A-Z]\d\b"),
    _cased(
        Kind.ADDRESS,
        r"(?<![\w.'’-])(?:(?:St\.|[A-ZÄÖÜ][\w'’-]{1,30})\s){1,4}(?:Hospital|Clinic|Infirmary"
        r"|Medical\sCent(?:er|re)|Klinikum|Krankenhaus|Spital)\b(?:\s[A-ZÄÖÜ][\w'’-]{2,30})?",
    ),
    _cased(
        Kind.ADDRESS,
        r"\b(?:Klinikum|Universitätsklinikum|Krankenhaus|H[ôo]pital|CHU|Ospedale)"
        r"\s(?:de\s|du\s)?[A-ZÄÖÜ][\w'’-]{2,30}(?:\s[A-ZÄÖÜ][\w'’-]{2,30})?",
    ),
    # Numbers of people, cases and specimens.
    _rule(Kind.NUMBER, r"(?<!\w)TCGA[-_][a-z0-9]{2}[-_][a-z0-9]{4}(?:[-_.][a-z0-9]+)*"),
    _rule(Kind.NUMBER, r"(?<!\w)[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"),
    _rule(Kind.NUMBER, r"(?<!\d)(?<!\d-)\d{3}-\d\d-\d{4}(?![\d-])"),
    _rule(
        Kind.NUMBER,
        r"(?<![\w.,-])\d{2,5}([-.])\d{2,5}\1\d{2,5}(?:\1\d{1,5})*(?![\w%])",
        lambda match: sum(letter.isdigit() for letter in match.group()) >= 9,
    ),
    _rule(
        Kind.NUMBER,
        r"\b(?:MRN|medical\s+record(?:\s+number)?|acc(?:ession)?(?:\s+(?:number|no))?|SSN"
        r"|NHS(?:\s+(?:number|no))?|(?:patient|pat|case|specimen|sample|chart|account|visit|lab"
        r"|hospital|encounter|admission|histology|path(?:ology)?|slide|fall|journal|eingangs?"
        r"|hosp|histo|auftrags|dossier|e)[\s.-]{0,2}(?:ID|number|num|no|nr|nummer|#)|fallnummer|IPP|NIR"
        r"|historia\s+clínica|patienten-?(?:ID|nummer)|n°(?:\s+de)?(?:\s+dossier)?|ID)\b\.?"
        r"[\s.:#=]{0,4}(?P<value>[a-z0-9][\w./-]{2,60}(?<=\w))",
        _has_digit,
    ),
    _rule(
        Kind.NUMBER,
        r"\b(?:case|patient|specimen|sample|slide|block)\s?[:#]\s?(?P<value>[a-z0-9][\w./-]{3,60}"
        r"(?<=\w))",
        _has_digit,
    ),
    _rule(
        Kind.NUMBER,
        r"(?<![^\W_])(?P<letters>[a-z]{1,4})[-_/.]?\d\d(?:\d\d)?[-_/:.]\d{3,}(?:[-_/.][a-z0-9]{1,4})*",
        _is_accession,
    ),
    _rule(
        Kind.NUMBER,
        r"(?<![^\W_])(?P<letters>[a-z]{1,4})[\s.:#]{1,2}\d\d(?:\d\d)?[-_/:]\d{3,}(?![\d%]|[.,]\d)",
        _is_accession,
    ),
    _rule(Kind.NUMBER, r"(?<![\w.,/])\d\d(?:\d\d)?[/_-][a-z]{1,3}[/_-]\d{3,}"),
    _rule(
        Kind.NUMBER,
        r"(?<![^\W_])(?P<letters>[a-z]{1,3})[\s.-]?\d{3,6}/(?:\d\d|\d{4})(?![\w/])",
        _is_accession,
    ),
    _rule(Kind.NUMBER, r"(?<![\w.,-])(?:19|20)?\d\d-?[a-z]{1,3}-?\d{4,}(?:-[a-z0-9]{1,4})*"),
    _rule(
        Kind.NUMBER, rf"(?<![\w.,/-]){_YEAR}[-_/](?P<number>\d{{3,}})(?![\w%])", _is_year_and_number
    ),
    _rule(Kind.NUMBER, r"[\w-]+(?:(?<=\d)[.,/:](?=\d)[\w-]+)*", _has_many_digits),
    _rule(
        Kind.NUMBER,
        r"(?<![\w.-])[\w-]+(?:\.[\w-]+)*\.(?:svs|ndpi|mrxs|scn|tiff?|dcm|jpe?g|png|pdf|docx?)\b",
    ),
    # Ages that are rare enough to point at somebody: 90 and more.
    _rule(
        Kind.AGE,
        r"(?<![\d.,])(?:9\d|1[0-2]\d)[\s‐-―-]?(?:(?:years?|yrs?|y)(?:[\s‐-―-]?(?:old|of\s+age)"
        r"|\.o\.|/o|o)?|jährige?[rsnm]?|jahre?n?(?:\s+alte?[rsnm]?)?|ans)\b\.?",
    ),
    _rule(
        Kind.AGE, r"\b(?:aged?|alter|âge|âgée?)\b[\s:]{0,3}(?:de\s|of\s)?(?:9\d|1[0-2]\d)\b(?!%)"
    ),
    _rule(
        Kind.AGE,
        r"\bninety(?:[\s-](?:one|two|three|four|five|six|seven|eight|nine))?[\s-]years?"
        r"(?:[\s-]old)?\b",
    ),
)
_LEADS = {
    Kind.DATE: re.compile(
        r"(?:(?:\b(?:received|collected|reported|signed|taken|seen|date|dated|datum|dob|born|geb"
        r"|date\s+of\s+birth|geburtsdatum|eingang|ausgang|fecha)\b[\s.:]{0,3})?(?:\*\s?)?"
        r"(?:\b(?:on|am|vom|le|du|since|from|until|in|of|at|seit|bis|den|the)\s)?)$",
        re.IGNORECASE,
    ),
    Kind.TIME: re.compile(r"(?:\b(?:at|um|gegen|around|à|vers)\s)?$", re.IGNORECASE),
    Kind.EMAIL: re.compile(r"(?:\be-?mail\s?:?\s)?$", re.IGNORECASE),
    Kind.WEB: re.compile(r"(?:\b(?:see|at|url|from)\s?:?\s)?$", re.IGNORECASE),
}
