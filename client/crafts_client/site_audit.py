"""``crafts-client audit``: the audits of one site. What is kept of them: ``audit_record``."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from crafts_client.audit_record import audited_settings, library_versions
from crafts_client.code_hash import code_sha256
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.sum_audit import SumCheck, audit_sums
from crafts_client.training_audit import TrainingAudit, audit_training
from crafts_client.training_task import Randomness
from crafts_core import __version__
from crafts_core.devices import open_device
from crafts_core.foundation import load
from crafts_core.progress import Progress
from crafts_privacy.audit import AuditResult, audit
from crafts_privacy.audit_statistics import OneRun


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
                "libraries": library_versions(),
                "settings": audited_settings(config),
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
        CraftsError: the foundation, the device or a library that ``site.toml`` asks for is missing.
    """
    config = site.config
    open_device(config.device)
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


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _one_run_line(name: str, found: OneRun) -> str:
    return (
        f"{_verdict(found.passed)}  {name}: epsilon at least {found.bound:.2f} of "
        f"{found.claimed_epsilon:g} claimed, from {found.num_right} right guesses of "
        f"{found.num_canaries}; without noise it would show {found.control:.2f}, and at most "
        f"{found.ceiling:.2f}"
    )
