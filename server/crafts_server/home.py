"""The coordinator's home: one directory with everything that must survive a restart.

Only its owner may enter it or read a file in it: the configuration may hold a password.

::

    coordinator.toml   where the foundation and the registry are
    signing.key        Ed25519, signs plans and checkpoints (mode 0600)
    pki/               certificate authority and the coordinator's certificates
    registry.db        unless coordinator.toml names another database
    audit.jsonl        what the coordinator did, each line chained to the one before
    superlink.db       nodes and messages under way (Flower's)
    queue/             plans that wait or are trained
    checkpoints/RUN/   signed checkpoints
    spool/RUN/         updates of the open round
    pools/HASH/        open tiles that plans with stage retrieval pick from
    contacts/SITE      empty; its time is when the site was last seen
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from crafts_core.durable import exclusive_lock, write_file
from crafts_core.exchange import SignedPlan
from crafts_core.fields import describe_first_error
from crafts_core.foundation_manifest import EMBEDDED, named_path
from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_privacy.signing import create_signing_key, load_signing_key, public_key_of, sign
from crafts_server.audit_log import AuditLog
from crafts_server.checkpoints import CheckpointStore
from crafts_server.contacts import Contacts
from crafts_server.errors import HomeError
from crafts_server.pki import Pki
from crafts_server.registry import PlanRecord, Registry
from crafts_server.rosters import Rosters

SQLITE = "sqlite"
LOOPBACK = "127.0.0.1"
CONFIG_NAME, _KEY, _LOCK = "coordinator.toml", "signing.key", ".lock"
_NAME = re.compile(r"[A-Za-z0-9.-]{1,253}")


def _listened(hosts: Sequence[str]) -> str:
    """All interfaces where a host is not this machine alone: enrolment, registrar and fleet."""
    return LOOPBACK if all(map(_is_loopback, hosts)) else "0.0.0.0"  # noqa: S104


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _checked_host(host: str) -> str:
    """A name or an IPv4 address: one of IPv6 could not be told from its port in what sites type."""
    try:
        is_ipv6 = ip_address(host.strip("[]")).version == 6
    except ValueError:
        is_ipv6 = False
    if is_ipv6:
        raise ValueError(f"{host} is an IPv6 address; give a name that leads to it, or IPv4")
    if not _NAME.fullmatch(host):
        raise ValueError(
            f"{host} is no name in ASCII letters and no address; ports are keys of their own"
        )
    return host


class HomeConfig(BaseModel):
    """``coordinator.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    foundation: Annotated[str, Field(min_length=1)] = EMBEDDED
    """``embedded``, or a foundation directory (absolute, or relative to the home)."""
    registry: Annotated[str, Field(min_length=1, repr=False)] = SQLITE
    """``sqlite`` for registry.db in the home, or a SQLAlchemy URL, which may hold a password."""
    hosts: tuple[Annotated[str, AfterValidator(_checked_host)], ...] = ("localhost",)
    """Names and addresses under which sites reach the coordinator; the first is told to them."""
    listen: Annotated[str, AfterValidator(_checked_host)] = Field(
        default_factory=lambda fields: _listened(fields.get("hosts", ()))
    )
    """Address that the three public ports are bound to; loopback if all hosts are."""
    fleet_port: Annotated[int, Field(ge=0, le=65535)] = 8443
    enrolment_port: Annotated[int, Field(ge=0, le=65535)] = 8444
    registrar_port: Annotated[int, Field(ge=0, le=65535)] = 8445
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """For Prometheus, on loopback; 0 takes a free one."""


class CoordinatorHome:
    """Paths, keys and stores of one coordinator."""

    def __init__(self, path: Path, config: HomeConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: HomeConfig) -> Self:
        """Make a home; what is there already stays as it is, so creating twice is harmless.

        Raises:
            HomeError: the place cannot be written.
            RegistryError: the registry of a new home cannot be opened; no configuration is kept.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (path / CONFIG_NAME).exists():
                cls(path, config).registry().close()  # what cannot be opened is not kept
                values = config.model_dump(mode="json")
                lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]
                write_file(path / CONFIG_NAME, "".join(lines), mode=0o600)
            if not (path / _KEY).exists():
                create_signing_key(path / _KEY)
            home = cls.open(path)
            home.close_to_others()
            Pki.create(home.pki.folder, home.config.hosts)
            # Made here, it belongs to whoever serves, also where another user queues the plans.
            (path / "queue").mkdir(exist_ok=True)
        except OSError as error:
            raise HomeError(f"cannot create {path}: {error.strerror or error}") from error
        return home

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a home.

        Raises:
            HomeError: there is none, or its configuration is wrong.
        """
        try:
            text = (path / CONFIG_NAME).read_text(encoding="utf-8")
            return cls(path, HomeConfig.model_validate(tomllib.loads(text)))
        except FileNotFoundError as error:
            raise HomeError(
                f"no coordinator home at {path}; make one with `crafts-server init`"
            ) from error
        except ValidationError as error:
            raise HomeError(f"{path / CONFIG_NAME}: {describe_first_error(error)}") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise HomeError(f"cannot read {path / CONFIG_NAME}: {error}") from error

    def close_to_others(self) -> None:
        """Take back what a copy, or an older version, let others on this machine read.

        Raises:
            OSError: it belongs to somebody else.
        """
        files = [path for path in self.path.iterdir() if path.is_file() and not path.is_symlink()]
        for path in (self.path, *files):
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                path.chmod(mode & 0o700)

    @property
    def foundation_path(self) -> Path:
        return named_path(self.config.foundation, base=self.path)

    @property
    def pools(self) -> Path:
        """Public pools, each in a folder of its hash."""
        return self.path / "pools"

    @property
    def pki(self) -> Pki:
        """The certificate authority."""
        return Pki(self.path / "pki")

    @property
    def public_key(self) -> str:
        """What sites put into ``allowed_signers``."""
        return public_key_of(self._key())

    @property
    def contacts(self) -> Contacts:
        """When sites were seen; who notes it keeps the object, which notes no more than it must."""
        return Contacts(self.path / "contacts")

    @property
    def audit_log(self) -> AuditLog:
        """What was done here, for auditors."""
        return AuditLog(self.path / "audit.jsonl")

    def registry(self, *, may_upgrade: bool = False) -> Registry:
        """Open the registry; the caller closes it. A coordinator that starts may upgrade it."""
        url = self.config.registry
        if url == SQLITE:
            path = self.path / "registry.db"
            if not path.exists():
                path.touch(mode=0o600)
            url = f"sqlite:///{path}"
        return Registry(url, may_upgrade=may_upgrade)

    def checkpoints(self, run_id: str) -> CheckpointStore:
        """The checkpoints of one run."""
        return CheckpointStore(self.path / "checkpoints" / run_id, self._key())

    def spool_path(self, run_id: str) -> Path:
        """Where the open round of one run puts updates aside."""
        return self.path / "spool" / run_id

    def sign_plan(self, plan: Plan) -> SignedPlan:
        """Sign the plan's canonical JSON and remember it in the registry.

        Raises:
            RosterError: the plan is one of sums, and a site has published no key for its roster.
            HomeError: it is one of sums that the enrolled sites cannot make.
        """
        key, text = self._key(), plan.to_json()
        signed = SignedPlan(
            json=text, signature=sign(key, text.encode()), public_key=public_key_of(key)
        )
        record = PlanRecord(
            hash=plan.hash,
            study=plan.study.name,
            json=signed.json,
            signature=signed.signature,
            public_key=signed.public_key,
        )
        with self.registry() as registry:
            if plan.aggregation.secure_aggregation:
                Rosters(registry).fix(plan, record)
            else:
                registry.add_plan(record)
        return signed

    def sign_roster(self, roster: Roster) -> str:
        """The signature of a roster's canonical JSON, by the key that signs plans."""
        return sign(self._key(), roster.to_json().encode())

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the home: one coordinator runs at a time. The kernel lets go if the process dies.

        Raises:
            HomeError: another process holds it.
        """
        held = HomeError(f"another coordinator runs in {self.path}; wait for it or stop it")
        with exclusive_lock(self.path / _LOCK, held=held):
            yield

    def _key(self) -> Ed25519PrivateKey:
        return load_signing_key(self.path / _KEY)
