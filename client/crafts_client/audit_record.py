"""What is kept of an audit, and when it is stale. Reads records; to look at one takes no torch.

An audit says something of exactly what ran: the code, the libraries that privacy rests on, the
settings of ``site.toml`` that change how a gradient comes about, and the stages that the policy
allows. Where one of these is another by now, the audit carries nothing.
"""

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from crafts_client.home import SiteConfig, SiteHome

LIBRARIES = ("torch", "cryptography", "opacus", "dp-accounting")
"""What draws, adds, clips and accounts: an upgrade of one wants a new audit."""
_SETTINGS = (
    *("device", "more_devices", "exact_noise", "precision", "checkpointing", "compile"),
    *("microbatch_tiles", "views"),
)
"""Of ``site.toml``: how a gradient comes about."""
_AGAIN = "run crafts-client audit"


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object that a command left in the home, if there is a readable one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return values if isinstance(values, dict) else None


def weakness(record: Mapping[str, Any] | None, site: SiteHome, code: str) -> str | None:
    """Why the newest audit says nothing of what trains here, if it does not: the first reason.

    Args:
        record: Of the newest audit, if there is one.
        site: As it is set up now.
        code: SHA-256 of what is installed now.
    """
    if record is None:
        return f"it was never audited here; {_AGAIN}"
    if not record.get("passed"):
        return f"the newest audit failed; {_AGAIN} and look"
    if record.get("code_sha256") != code:
        return f"the newest audit is of other code; {_AGAIN}"
    differences = (
        *_differences(record.get("libraries"), library_versions(), "installed is"),
        *_differences(record.get("settings"), audited_settings(site.config), "site.toml says"),
        *_stages_left(record, site),
        *_sums_left(record, site),
    )
    return f"the newest audit is of {differences[0]}; {_AGAIN}" if differences else None


def _differences(then: object, now: Mapping[str, Any], says: str) -> Iterator[str]:
    known = then if isinstance(then, Mapping) else {}
    for name, value in now.items():
        if known.get(name) != value:
            yield f"{name} {_shown(known.get(name))}, {says} {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def _stages_left(record: Mapping[str, Any], site: SiteHome) -> Iterator[str]:
    training = record.get("training")
    audited = training.get("stages", ()) if isinstance(training, Mapping) else ()
    left = sorted(set(site.policy.allowed_stages) - set(audited))
    if left:
        yield f"stages {', '.join(audited) or 'none'}, the policy allows {', '.join(left)} too"


def _sums_left(record: Mapping[str, Any], site: SiteHome) -> Iterator[str]:
    if "distributed" in site.policy.allowed_trust and not record.get("sums"):
        yield "no sums over sites, which the policy allows"


def library_versions() -> dict[str, str]:
    """Of what is installed."""
    return {name: metadata.version(name) for name in LIBRARIES}


def audited_settings(config: SiteConfig) -> dict[str, Any]:
    """Of a site, as a record keeps them."""
    return config.model_dump(mode="json", include=set(_SETTINGS))
