"""Every key of a plan, explained from the schema itself: as a table, and in a new plan.toml."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from crafts_core.plan import Plan
from crafts_core.plan_sections import (
    AdapterConfig,
    AggregationConfig,
    PrivacyConfig,
    StageConfig,
    StudyConfig,
    TransportConfig,
)

SECTIONS: Mapping[str, type[BaseModel]] = {
    "study": StudyConfig,
    "adapter": AdapterConfig,
    "stage": StageConfig,
    "privacy": PrivacyConfig,
    "aggregation": AggregationConfig,
    "transport": TransportConfig,
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def explained(section: str) -> Iterator[tuple[str, str, str]]:
    """Key, what it must be, and what it is for."""
    properties = SECTIONS[section].model_json_schema()["properties"]
    required = SECTIONS[section].model_json_schema().get("required", [])
    for key, schema in properties.items():
        value = _allowed(schema)
        if key not in required and schema.get("default") is not None:
            value += f"; {json.dumps(schema['default'])} if absent"
        yield key, value, " ".join(schema.get("description", "").split()).replace("``", "")


def keys_table() -> str:
    """Markdown: docs/plan-keys.md below its first lines."""
    lines: list[str] = []
    for section, model in SECTIONS.items():
        title = f"[[{section}]]" if section == "stage" else f"[{section}]"
        what = " ".join((model.__doc__ or "").split())
        lines += [f"## `{title}`", "", what, "", "| key | value | meaning |", "|---|---|---|"]
        lines += [
            f"| `{key}` | {value} | {meaning} |" for key, value, meaning in explained(section)
        ]
        lines.append("")
    return "\n".join(lines)


def commented_toml(plan: Plan) -> str:
    """The plan as a plan.toml that says of each key what it is for; what is absent stays absent."""
    parts: list[str] = []
    for section in SECTIONS:
        values = getattr(plan, section)
        for each in values if isinstance(values, tuple) else (values,):
            parts.append(f"[[{section}]]" if isinstance(values, tuple) else f"[{section}]")
            parts += _commented(section, each)
            parts.append("")
    return "\n".join(parts)


def _commented(section: str, values: BaseModel) -> Iterator[str]:
    written = values.model_dump(mode="json", exclude_none=True)
    for key, value, meaning in explained(section):
        if key in written:
            yield from textwrap.wrap(
                f"{meaning} ({value})", 96, initial_indent="# ", subsequent_indent="# "
            )
            yield f"{key} = {json.dumps(written[key])}"


def _allowed(schema: Mapping[str, Any]) -> str:
    """What a value must be, in words."""
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            return _allowed(choice)
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema.get("type") == "array":
        return "list of texts"
    kind = {"integer": "whole number", "number": "number", "string": "text"}
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return ", ".join([kind.get(schema.get("type", ""), "true or false"), *bounds])
