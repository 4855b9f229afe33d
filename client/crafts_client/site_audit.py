"""``crafts-client audit``: the audits of one site, what is kept of them, and when they are stale.

An audit says something of exactly what ran: the code, the libraries that privacy rests on, the
settings of ``site.toml`` that change how a gradient comes about, and the stages that the policy
allows. Where one of these is another by now, the audit carries nothing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from crafts_client.code_hash import code_sha256
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.sum_audit import SumCheck, audit_sums
from crafts_client.trainer import Randomness
from crafts_client.training_audit import Progress, TrainingAudit, audit_training
from crafts_core import __version__
from crafts_core.foundation import load
from crafts_privacy.audit import AuditResult, audit
from crafts_privacy.audit_statistics import OneRun

LIBRARIES = ("torch", "cryptography", "opacus", "dp-accounting")
"""What draws, adds, clips and accounts: an upgrade of one wants a new audit."""
_SETTINGS = (
    *("device", "more_devices", "exact_noise", "precision", "checkpointing", "compile"),
    *("microbatch_tiles", "views"),
)
"""Of ``site.toml``: how a gradient comes about."""
_AGAIN = "run crafts-client audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteAudit:
    """The engine where every gradient is known, the trainer as this site runs it, and sums."""

    engine: AuditResult
    training: TrainingAudit
    sums: tuple[SumCheck, ...]
    """Empty where the policy allows no distributed trust."""

    @property
    def passed(self) -> bool:
        sums_passed = all(check.passed for check in self.sums)
        return self.engine.passed and self.training.passed and sums_passed

    def record(self, config: SiteConfig) -> dict[str, Any]:
        """``audit.json``."""
        sums = {"sums": [asdict(check) for check in self.sums]} if self.sums else {}
        return (
            asdict(self.engine)
            | sums
            | {
                "training": asdict(self.training),
                "passed": self.passed,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "version": __version__,
                "code_sha256": code_sha256(),
                "libraries": _versions(),
                "settings": _settings(config),
            }
        )

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield "the engine, by canary patients whose gradients are known:"
        for each in self.engine.checks:
            yield f"{_verdict(each.passed)}  {each.name}: {each.question} (p = {each.p_value:.2g})"
        yield _one_run_line("one-run bound", self.engine.one_run)
        subject = self.engine.subject
        yield (
            f"audited: {subject.noise}, {' and '.join(subject.clippings)} clipping, "
            f"{subject.optimizer}, {subject.precision} on {subject.device}"
        )
        yield "the trainer, on public patients, as site.toml says:"
        for check in self.training.checks:
            yield (
                f"{_verdict(check.passed)}  {check.stage}, {check.name}: {check.question} "
                f"({check.found})"
            )
        for run in self.training.one_runs:
            yield _one_run_line(f"{run.stage}, one-run bound from releases", run.one_run)
        yield f"audited: stages {', '.join(self.training.stages) or 'none'}"
        if self.sums:
            yield "sums over sites, by hospitals that nobody is:"
        for found in self.sums:
            yield f"{_verdict(found.passed)}  {found.name}: {found.question} ({found.found})"


def audit_site(site: SiteHome, progress: Progress | None = None) -> SiteAudit:
    """Run all. Takes a minute or two, reads no patient and spends nothing.

    Raises:
        CraftsError: the foundation or a library that ``site.toml`` asks for is missing.
    """
    config = site.config
    return SiteAudit(
        engine=audit(
            make_noise=lambda: Randomness.from_os(exact_noise=config.exact_noise).noise,
            device=config.device,
        ),
        training=audit_training(
            load(site.foundation_path, device=config.device),
            config,
            site.policy.allowed_stages,
            Randomness.from_os(exact_noise=config.exact_noise),
            progress=progress,
        ),
        sums=_audited_sums(site),
    )


def _audited_sums(site: SiteHome) -> tuple[SumCheck, ...]:
    if "distributed" not in site.policy.allowed_trust:
        return ()
    noise = Randomness.from_os(exact_noise=site.config.exact_noise).noise
    return audit_sums(site.policy, noise)


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
        *_differences(record.get("libraries"), _versions(), "installed is"),
        *_differences(record.get("settings"), _settings(site.config), "site.toml says"),
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


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def _settings(config: SiteConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(_SETTINGS))


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _one_run_line(name: str, found: OneRun) -> str:
    return (
        f"{_verdict(found.passed)}  {name}: epsilon at least {found.bound:.2f} of "
        f"{found.claimed_epsilon:g} claimed, from {found.num_right} right guesses of "
        f"{found.num_canaries}; without noise it would show {found.control:.2f}, and at most "
        f"{found.ceiling:.2f}"
    )
