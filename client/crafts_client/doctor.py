"""Is this site ready? Every check says what it found and, where that is not enough, what to do.

Nothing is changed and nothing private is read: counts of patients are compared, not shown.
"""

import importlib.util
import os
import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib.metadata import version

import httpx

from crafts_client.agreed_patients import check_agreed
from crafts_client.answer_times import COHORT_SLACK
from crafts_client.audit_record import read_record, weakness
from crafts_client.code_hash import code_sha256
from crafts_client.coordinator_record import CoordinatorRecord
from crafts_client.enrolment import Registrar, coordinator_record
from crafts_client.home import SiteHome
from crafts_client.memory_limit import memory_limit
from crafts_client.peer_heads import PeerHeads
from crafts_client.policy import PolicyError
from crafts_client.proxies import Proxy, proxy_for, way
from crafts_client.roster_rules import check_roster
from crafts_client.site_certificate import EXPIRES_SOON_DAYS, RENEW, days_left
from crafts_client.site_ledger import existing_ledger
from crafts_client.witness_folders import check_folders
from crafts_core.delta_text import delta_text, delta_times_patients
from crafts_core.errors import CraftsError
from crafts_core.foundation_manifest import read_manifest, verify
from crafts_core.tiles import TileStore
from crafts_core.tiles.cache_files import finished_cache
from crafts_privacy import accounting, signing
from crafts_privacy.lifetime import Lifetime, PlanCharges

_TIMEOUT_S = 15.0
_LEAST_DISK_BYTES = 2 << 30
_LEAST_MEMORY_BYTES = 4 << 30
_MOST_SKEW_S = 120.0


class Verdict(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    """Works, and somebody should look."""
    PROBLEM = "problem"
    """Training cannot work like this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer of one check."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


Check = Callable[[SiteHome], Iterator[Finding]]


def examine(home: SiteHome) -> Iterator[Finding]:
    """All checks, one after the other; a check that fails itself is a problem, not a crash."""
    for check in CHECKS:
        subject = check.__name__.strip("_").replace("_", " ")
        try:
            yield from check(home)
        except CraftsError as error:
            yield _problem(subject, str(error))
        except Exception as error:  # the rest is still worth knowing
            yield _problem(subject, f"the check failed: {type(error).__name__}", "report this")


def enrolment(home: SiteHome) -> Iterator[Finding]:
    """Certificate and keys."""
    record = coordinator_record(home)
    yield _ok("enrolment", f"enrolled as {record.site}, authority {record.ca_fingerprint[:16]}")
    days = days_left(home)
    if days is None:
        yield _problem("certificate", "it is not there", RENEW)
    elif days < 0:
        yield _problem("certificate", "it has expired", RENEW)
    elif days < EXPIRES_SOON_DAYS:
        yield _warning("certificate", f"{days} days left", RENEW)
    else:
        yield _ok("certificate", f"{days} days left")
    if record.signer not in home.policy.allowed_signers:
        yield _problem(
            "signer",
            "the policy does not know the coordinator's signing key",
            "compare its fingerprint by telephone, then run: crafts-client policy trust "
            f"{record.signer}",
        )
    exposed = [path.name for path in (home.path / "keys").glob("*.key") if path.stat().st_mode & 63]
    if exposed:
        yield _problem("keys", f"others may read {', '.join(exposed)}", "chmod 600 them")


def fleet(home: SiteHome) -> Iterator[Finding]:
    """The way that the rounds go: TLS to the coordinator, through the proxy if there is one."""
    record = coordinator_record(home)
    proxy = proxy_for(record.fleet_address, os.environ)
    context = ssl.create_default_context(cafile=str(home.path / "keys" / "ca.crt"))
    started = time.time()
    try:
        response = _ask(record, proxy, context)
    except httpx.HTTPError as error:
        yield _unreachable(record, error, proxy)
        if _refused_certificate(error) is not None:
            with suppress(httpx.HTTPError):
                # Nothing is sent, and an answer's date is only a hint.
                yield from _clock(_ask(record, proxy, False))
        return
    seconds = time.time() - started
    yield _ok("fleet", f"{record.fleet_address} answers {way(proxy)} in {seconds * 1000:.0f} ms")
    yield from _clock(response)


def _ask(
    record: CoordinatorRecord, proxy: Proxy | None, verify: ssl.SSLContext | bool
) -> httpx.Response:
    return httpx.get(
        f"https://{record.fleet_address}/",
        proxy=proxy.url if proxy else None,
        verify=verify,
        timeout=_TIMEOUT_S,
        trust_env=False,
    )


def _clock(answer: httpx.Response) -> Iterator[Finding]:
    """Ours beside that of whoever has answered just now."""
    middle = time.time() - answer.elapsed.total_seconds() / 2
    with suppress(KeyError, ValueError):
        skew = abs(middle - parsedate_to_datetime(answer.headers["date"]).timestamp())
        if skew > _MOST_SKEW_S:
            yield _problem(
                "clock",
                f"{skew:.0f} s away from the coordinator's",
                "set it by NTP: certificates and messages carry times",
            )
        else:
            yield _ok("clock", f"within {max(skew, 1):.0f} s of the coordinator's")


_UNTRUSTED = {
    9: (
        "a certificate that is not valid yet by this machine's clock",
        "set the clock by NTP",
    ),
    10: (
        "a certificate that has expired by this machine's clock",
        "if the clock is right, ask the coordinator to restart crafts-server serve: it renews it",
    ),
    62: (
        "a certificate for another name",
        "ask the coordinator to add this name to hosts in coordinator.toml and to restart",
    ),
}
_UNTRUSTED[64] = _UNTRUSTED[62]
"""What OpenSSL's codes mean here (not yet valid, expired, name, address), and what helps."""
_FOREIGN = (
    "a certificate of another authority",
    "TLS inspection on the way, or another host: ask your network people to let this address "
    "through untouched",
)


def _refused_certificate(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """What of an error's causes says that the certificate was refused."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _unreachable(record: CoordinatorRecord, error: httpx.HTTPError, proxy: Proxy | None) -> Finding:
    refused = _refused_certificate(error)
    if refused is not None:
        shown, advice = _UNTRUSTED.get(refused.verify_code, _FOREIGN)
        return _problem("fleet", f"{record.fleet_address} shows {shown} ({way(proxy)})", advice)
    if proxy is not None and isinstance(error, httpx.ProxyError):
        status = str(error)[:3]  # the rest is the proxy's own text
        advice = "ask that CONNECT to this address be allowed"
        if status == "407":
            advice = f"write http://USER:PASSWORD@HOST:PORT into {proxy.variable}"
        found = f"{record.fleet_address} is refused with {status} {way(proxy)}"
        return _problem("fleet", found, advice)
    advice = "allow outbound HTTPS to this address, or set HTTPS_PROXY"
    if proxy is not None:
        advice = f"see whether {proxy.variable} names the right proxy"
    return _problem(
        "fleet",
        f"{record.fleet_address} cannot be reached {way(proxy)} ({type(error).__name__})",
        advice,
    )


def registrar(home: SiteHome) -> Iterator[Finding]:
    """The way of plans, foundation and witness; it knows whether we were revoked."""
    with Registrar(home) as channel:
        plans = channel.call("ListPlans").plans
    yield _ok("registrar", f"{channel.record.registrar_address} answers; {len(plans)} plans")
    check_agreed(home)
    yield _ok("patients", f"{home.config.declared_patients} are agreed with the coordinator")


def home_folder(home: SiteHome) -> Iterator[Finding]:
    """Salt, register, ledger and tiles are the owner's alone."""
    if home.path.stat().st_mode & 0o077:
        yield _problem("home", "others may enter it", f"chmod 700 {home.path}")
    else:
        yield _ok("home", "nobody else may enter it")
    if not home.salt_path.is_file():
        yield _problem(
            "salt",
            "it is not there: no patient's pseudonym can be found, so nobody can be withdrawn",
            f"put {home.salt_path} back from a backup of this home",
        )
    elif home.salt_path.stat().st_mode & 0o077:
        yield _problem("salt", "others may read it", f"chmod 600 {home.salt_path}")


def delta(home: SiteHome) -> Iterator[Finding]:
    """Small beside one patient's share of the cohort."""
    allowed, patients = home.policy.max_delta, home.config.declared_patients
    found = (
        f"{delta_text(allowed)}, times {patients} declared patients is "
        f"{delta_times_patients(allowed, patients):g}"
    )
    if allowed > 1 / patients:
        yield _warning(
            "delta",
            found,
            f"set max_delta in policy.toml to {delta_text(1 / (10 * patients))} or less: above one "
            "in all patients the promise may say nothing about one of them",
        )
    else:
        yield _ok("delta", found)


def answers(home: SiteHome) -> Iterator[Finding]:
    """What their times tell."""
    if home.config.answer_every_s == 0:
        yield _warning(
            "answers",
            "they leave as soon as they are ready, which tells how many patients were drawn",
            'set answer_every_s = "auto" in site.toml',
        )
    else:
        yield _ok("answers", "they leave at times that no patient decides")


def disk(home: SiteHome) -> Iterator[Finding]:
    """Room for the ledger, sealed releases and a new foundation."""
    free = shutil.disk_usage(home.path).free
    if free < _LEAST_DISK_BYTES:
        yield _problem("disk", f"{free / 2**30:.1f} GiB free", "2 GiB are needed at least")
    else:
        yield _ok("disk", f"{free / 2**30:.0f} GiB free")


def memory(home: SiteHome) -> Iterator[Finding]:
    """Of the machine and of the device that trains."""
    with suppress(ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        allowed = min(total, memory_limit() or total)
        limited = f" of {total / 2**30:.0f}, limited by container or service"
        found = f"{allowed / 2**30:.1f} GiB{limited if allowed < total else ''}"
        if allowed < _LEAST_MEMORY_BYTES:
            yield _problem("memory", found, "4 GiB are needed at least")
        else:
            yield _ok("memory", found)
    device = home.config.device
    if not device.startswith("cuda"):
        yield _ok("device", f"{device}, {os.cpu_count()} cores")
        return
    import torch  # seconds, which only a site with a GPU needs to wait

    if not torch.cuda.is_available():
        yield _problem(
            "device",
            f"site.toml says {device}, and torch {torch.__version__} finds no CUDA device",
            "install the driver, or a torch build with CUDA, or set device to cpu",
        )
        return
    properties = torch.cuda.get_device_properties(torch.device(device))
    yield _ok("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def slide_libraries(home: SiteHome) -> Iterator[Finding]:  # noqa: ARG001  # all checks are alike
    """What ingest reads slides with."""
    if importlib.util.find_spec("openslide") is None:
        yield _problem(
            "slides", "openslide is missing", "pip install openslide-python openslide-bin"
        )
        return
    import openslide

    yield _ok(
        "slides", f"openslide {openslide.__library_version__} ({version('openslide-python')})"
    )


def foundation(home: SiteHome) -> Iterator[Finding]:
    """The public starting point, byte by byte, and whether a person here approved it."""
    manifest = verify(home.foundation_path)
    home.foundation_approvals.check(manifest)
    yield _ok("foundation", f"{manifest.name} {manifest.hash[:16]}")


def data(home: SiteHome) -> Iterator[Finding]:
    """Tiles, latents, and whether the cohort is what site.toml declares."""
    store = TileStore.open(home.tile_store_path)
    unusable = finished_cache(store, read_manifest(home.foundation_path).hash).unusable
    if unusable:
        are_all = len(unusable) == store.num_tiles
        yield Finding(
            subject="tiles",
            verdict=Verdict.PROBLEM if are_all else Verdict.WARNING,
            found=f"{'all' if are_all else 'some'} count as zero: they cannot be read or encoded",
            advice="crafts-client tiles check says how many and what to do",
        )
    num_patients, declared = len(store.patients), home.config.declared_patients
    if declared < home.policy.min_patients:
        yield _problem(
            "data",
            f"site.toml declares {declared} patients, the policy wants {home.policy.min_patients}",
            "add patients, or change the policy",
        )
    elif num_patients > COHORT_SLACK * declared:
        yield _warning(
            "data",
            f"declared_patients {declared} is below what the tile store holds",
            "raise it: answers wait for as long as a cohort of that size takes, and what comes "
            "later tells how many patients were drawn",
        )
    elif num_patients < 0.8 * declared:
        yield _warning(
            "data",
            f"declared_patients {declared} is far from what the tile store holds",
            "round the true number to it: it is the divisor of training",
        )
    else:
        yield _ok("data", "tile store and latents are complete; declared_patients fits")


def ledger(home: SiteHome) -> Iterator[Finding]:
    """In order, within the limit for life, and not used up."""
    kept = existing_ledger(home)
    if kept is None:
        yield _ok("ledger", "nothing was trained here yet")
        return
    kept.check_place()
    cohort, lifetime = home.config.cohort, home.policy.lifetime
    kept.check_filters(cohort, lifetime.filters)
    plans = kept.plans(cohort)
    yield home.figures.of(Finding, ("doctor", lifetime, plans), lambda: _counted(lifetime, plans))


def _counted(lifetime: Lifetime, plans: Sequence[PlanCharges]) -> Finding:
    """What the filters say to what was charged."""
    state = lifetime.state(plans)
    found = f"plans charged: {len(plans)}; {state}"
    if not state.holds:
        return _problem("ledger", found, "no round is answered until policy.toml allows as much")
    if not lifetime.is_full(plans):
        return _ok("ledger", found)
    if any(lifetime.steps_left(plans, plan, plan.events[-1]) for plan in plans):
        return _ok("ledger", f"{found}; these plans go on to their targets, no further one fits")
    return _problem("ledger", found, "no study can use these patients any more")


def witnesses(home: SiteHome) -> Iterator[Finding]:
    """Who else sees how far the ledger is, and what this site sees of others."""
    kept = existing_ledger(home)
    if kept is not None and home.witness_folders:
        check_folders(home, kept)
        yield _ok("witnesses", f"{len(home.witness_folders)} folders have seen this ledger")
    elif not home.witness_folders:
        yield Finding(
            subject="witnesses",
            verdict=Verdict.OK,
            found="no folder of this hospital keeps the ledger's head",
            advice="a coordinator can keep back what it and other sites saw: crafts-client ledger "
            "witness FOLDER, on a share that is not backed up with this home, closes that",
        )
    for peer in PeerHeads(home.peer_heads_path).read():
        if peer.against is not None:
            yield _warning(
                "witnesses",
                f"{peer.newest.site} showed two ledgers: {peer.newest}, and {peer.against}",
                "ask that hospital, by telephone, whether its home was copied, made anew, or had a "
                f"wrong clock; if all is explained, remove {home.peer_heads_path}",
            )


def sums(home: SiteHome) -> Iterator[Finding]:
    """Of the plans that are approved: are the other hospitals, too?"""
    for plan_hash, approval in home.roster_approvals.all().items():
        roster, of_plan = approval.roster, f"plan {plan_hash[:16]}:"
        try:
            check_roster(
                roster,
                home.policy,
                site=home.config.name,
                declared_patients=home.config.declared_patients,
                identity=signing.public_key_of(signing.load_signing_key(home.site_key_path)),
            )
        except PolicyError as error:  # of a plan that is over, too: cohorts grow, keys change
            yield _problem(
                "sums",
                f"{of_plan} {error}",
                f"if it is over: crafts-client roster approve {plan_hash[:16]} --take-back; else "
                "ask the coordinator for: crafts-server plan roster --renew",
            )
        else:
            yield _ok("sums", f"{of_plan} {len(roster.sites)} hospitals are approved")
    if "distributed" not in home.policy.allowed_trust:
        return
    kept, most = existing_ledger(home), home.policy.max_epsilon_alone
    events = () if kept is None else kept.events_alone(home.config.cohort)
    delta = home.policy.max_delta
    alone = home.figures.of(
        float, ("alone", events, delta), lambda: accounting.epsilon(events, delta)
    )
    found = f"epsilon {alone:.3f} of {most:g} if all others worked together against this hospital"
    if most is not None and alone <= most:
        yield _ok("sums", found)
    else:
        yield _problem("sums", found, "max_epsilon_alone in policy.toml lets no further sum pass")


def audit(home: SiteHome) -> Iterator[Finding]:
    """Of the code, the libraries and the settings that train here now."""
    reason = weakness(read_record(home.audit_path), home, code_sha256())
    if reason is None:
        yield _ok("audit", "the newest one passed, and is of what is installed and set here")
    else:
        found, _, advice = reason.partition("; ")
        yield _warning("audit", found, advice)


CHECKS: tuple[Check, ...] = (
    enrolment,
    fleet,
    registrar,
    home_folder,
    delta,
    answers,
    disk,
    memory,
    slide_libraries,
    foundation,
    data,
    ledger,
    witnesses,
    sums,
    audit,
)


def _ok(subject: str, found: str) -> Finding:
    return Finding(subject=subject, verdict=Verdict.OK, found=found)


def _warning(subject: str, found: str, advice: str) -> Finding:
    return Finding(subject=subject, verdict=Verdict.WARNING, found=found, advice=advice)


def _problem(subject: str, found: str, advice: str = "") -> Finding:
    return Finding(subject=subject, verdict=Verdict.PROBLEM, found=found, advice=advice)
