"""The card of a built foundation: whose tissue it learned from, under which licence."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.tiles_table import TableRow
from crafts_core.vocabulary import CANCER_TYPES


def write_card(path: Path, rows: Sequence[TableRow], config: BuildConfig, *, name: str) -> None:
    """Sources with licences, the 30 types and what each was built from, organs, the recipe."""
    built = [row for row in rows if row.split == "build"]
    held_out = {row.case for row in rows if row.split == "held-out"}
    lines = [
        f"# Public foundation {name}",
        "",
        f"Tiles of {config.tile_px} px at {config.mpp:g} microns per pixel. Built by "
        "`crafts-server foundation build` from "
        f"{len({row.case for row in built})} open cases ({len(built)} images) and drawn tissue; "
        f"{len(held_out)} cases were held out. No patient of any study is in it.",
        "",
        *_sources(rows),
        "## Cancer types",
        "",
        "| type | built from |",
        "|---|---|",
        *(
            f"| {cancer.code} {cancer.name} | {_origin(cancer.code, built)} |"
            for cancer in CANCER_TYPES
        ),
        "",
        "A type of one case teaches that case, its stain included, and not the type. Labels are "
        "those of the slide: a tile of a carcinoma may show its stroma.",
        "",
        *_organs(built),
        "## Recipe",
        "",
        "```json",
        config.model_dump_json(indent=1),
        "```",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _sources(rows: Sequence[TableRow]) -> list[str]:
    if not rows:
        return []
    cases: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        cases[row.source or "not stated", row.licence].add(row.case)
    lines = ["## Sources", "", "| source | licence | cases |", "|---|---|---|"]
    lines += [f"| {of} | {under} | {len(found)} |" for (of, under), found in sorted(cases.items())]
    return [*lines, ""]


def _origin(code: str, rows: Sequence[TableRow]) -> str:
    count = len({row.case for row in rows if row.type == code})
    return f"{count} open {'case' if count == 1 else 'cases'}" if count else "drawings"


def _organs(rows: Sequence[TableRow]) -> list[str]:
    cases: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.organ:
            cases[row.organ].add(row.case)
    if not cases:
        return []
    told = ", ".join(f"{organ} ({len(found)})" for organ, found in sorted(cases.items()))
    return ["## Organs", "", f"Open cases by organ: {told}.", ""]
