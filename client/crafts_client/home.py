"""A site's home: one folder with everything the hospital owns.

::

    site.toml           who this is, where its tiles and foundation are, which device trains
    policy.toml         what it allows
    salt                the key of its pseudonyms (0600)
    tiles/              the tile store, with the latent cache below it
    ingest.json         what ingest did, with names: for the operator only (0600)
    names.txt           names to take out of every caption, if you list some (0600)
    ingest.html         the same to look at, with pictures/ (0600)
    keys/               certificate, its key, the node's key (0600), the coordinator's authority;
                        site.key (0600), which signs the ledger's head and stands for the site
                        in sums
    coordinator.json    where the coordinator is
    approved.json       the plans that a person here approved
    approved_foundations.json   the foundations, too
    approved_rosters.json   who the hospitals of a plan's sums are
    foundations/        what was fetched of the coordinator's
    patients.jsonl      who is in which cohort, and who withdrew (pseudonyms, 0600), with its .head
    ledger.db           what was spent, with its .head
    peer_heads.json     how far other sites' ledgers were when last heard of (0600)
    audit.json          the newest audit of the engine
    figures.json        what accountants answered before, for commands that show it (0600)
    leakage.json        the newest attack on a finished generator: private, it stays here (0600)
    unusable/           how often tiles and gradients counted as zero: private, stays here (0600)
    outbox/             sealed releases
    seen/               updates that left and what they answered: private, for attack (0600)
    stage_start.safetensors   the public adapter that the current stage began with
"""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from crafts_client.approvals import Approvals, FoundationApprovals, RosterApprovals
from crafts_client.errors import HomeError
from crafts_client.figures import Figures
from crafts_client.ingest.deidentify import Salt
from crafts_client.policy import Policy
from crafts_core.durable import write_file
from crafts_core.fields import Name, describe_first_error
from crafts_core.foundation_manifest import named_path
from crafts_core.roster import MAX_PATIENTS

SITE_NAME, POLICY_NAME, LEDGER_NAME = "site.toml", "policy.toml", "ledger.db"


class SiteConfig(BaseModel):
    """``site.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Name
    cohort: Name
    """Under which name the ledger accounts for these patients. Public."""
    declared_patients: Annotated[int, Field(ge=1, le=MAX_PATIENTS)]
    """The cohort's size as the site tells it: rounded, public, and the fixed divisor of training.
    The exact number is private. Another one counts once the coordinator agrees (``declare``)."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
    """Sums of clipped gradients are float64, which Apple's GPUs do not have."""
    foundation: Annotated[str, Field(min_length=1)]
    """``embedded``, or a folder, relative to the home."""
    tile_store: Annotated[str, Field(min_length=1)]
    """A folder, relative to the home."""
    microbatch_tiles: Annotated[int, Field(ge=1)]
    """Tiles times draws in all backward passes that run at a time. Memory and speed only."""
    exact_noise: bool = False
    """Draw the noise of privacy by OpenDP's exact discrete Gaussian instead of the grid's."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the denoiser's passes; gradients are clipped and added in float32 and float64."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Let torch compile the denoiser. Not used where its gradients turn out wrong."""
    views: Annotated[int, Field(ge=1, le=64)] = 1
    """Variants of each tile in the latent cache, mirrored and stained otherwise; 1 is the tile as
    it is. Takes effect with the next ingest."""
    answer_every_s: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """An answer leaves so many seconds after training began, or at a multiple: its time tells
    nothing of who was drawn. ``auto`` computes a bound for each round (``answer_times``); a number
    must be above the longest round; with 0 answers leave at once."""
    more_devices: tuple[Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")], ...] = ()
    """Share each step's patients with these as well, a process for each."""
    witness_folders: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Folders, on other disks or shares, that keep the ledger's signed head. Nothing leaves while
    one of them is away. Relative to the home."""

    @field_validator("answer_every_s", mode="before")
    @classmethod
    def _auto_or_seconds(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            return value
        if value != "auto":
            raise ValueError('expected "auto" or a number of seconds, 0 or more')
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteHome:
    """A home that was read and checked."""

    path: Path
    config: SiteConfig
    policy: Policy

    @classmethod
    def create(cls, path: Path, config: SiteConfig, policy: Policy) -> Self:
        """Make a new home: configuration, policy and salt.

        Raises:
            HomeError: there is one already, or the disk refuses.
        """
        if (path / SITE_NAME).exists():
            raise HomeError(f"{path} is a site home already; edit its {SITE_NAME} instead")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)  # it may have been there
            home = cls(path=path, config=config, policy=policy)
            if not home.salt_path.exists():
                Salt.create(home.salt_path)
            write_file(path / POLICY_NAME, _POLICY_HEADER + to_toml(policy))
            # Last: a folder with a site.toml is a whole home.
            write_file(path / SITE_NAME, _SITE_HEADER + to_toml(config))
        except OSError as error:
            raise HomeError(f"cannot make site home {path}: {error.strerror}") from error
        return home

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check a home.

        Raises:
            HomeError: it is missing or a file says something impossible.
        """
        file = path / SITE_NAME
        if not file.is_file():
            raise HomeError(f"no site home at {path}; make one with crafts-client init")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
            config = SiteConfig.model_validate(values)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise HomeError(f"cannot read {file}: {error}") from error
        except ValidationError as error:
            raise HomeError(f"{file}: {describe_first_error(error)}") from error
        return cls(path=path, config=config, policy=Policy.load(path / POLICY_NAME))

    @property
    def salt_path(self) -> Path:
        return self.path / "salt"

    @property
    def tile_store_path(self) -> Path:
        return self.path / self.config.tile_store

    @property
    def foundation_path(self) -> Path:
        """Where the public foundation lies."""
        return named_path(self.config.foundation, base=self.path)

    @property
    def ingest_report_path(self) -> Path:
        return self.path / "ingest.json"

    @property
    def names_path(self) -> Path:
        """People that no caption may name, one a line. Optional, written by the operator."""
        return self.path / "names.txt"

    @property
    def pictures_path(self) -> Path:
        """Thumbnails and overlays of slides, which ``ingest.html`` shows. Private."""
        return self.path / "pictures"

    @property
    def register_path(self) -> Path:
        return self.path / "patients.jsonl"

    @property
    def coordinator_path(self) -> Path:
        """What was agreed at enrolment."""
        return self.path / "coordinator.json"

    @property
    def approvals(self) -> Approvals:
        """The plans that a person here approved."""
        return Approvals(self.path / "approved.json")

    @property
    def roster_approvals(self) -> RosterApprovals:
        """The rosters of sums that a person here approved."""
        return RosterApprovals(self.path / "approved_rosters.json")

    @property
    def foundations_path(self) -> Path:
        """Foundations that were fetched, each in a folder."""
        return self.path / "foundations"

    @property
    def foundation_approvals(self) -> FoundationApprovals:
        """The foundations that a person here approved."""
        return FoundationApprovals(self.path / "approved_foundations.json")

    @property
    def leakage_path(self) -> Path:
        """The newest attack on a finished generator. Private."""
        return self.path / "leakage.json"

    @property
    def ledger_path(self) -> Path:
        return self.path / LEDGER_NAME

    @property
    def ledger_name(self) -> str:
        """What others call the ledger: the cohort's own name is the hospital's."""
        return hashlib.sha256(self.config.cohort.encode()).hexdigest()[:32]

    @property
    def site_key_path(self) -> Path:
        """The key that others know this site by; it signs the ledger's head."""
        return self.path / "keys" / "site.key"

    @property
    def witness_folders(self) -> tuple[Path, ...]:
        return tuple(self.path / folder for folder in self.config.witness_folders)

    @property
    def peer_heads_path(self) -> Path:
        return self.path / "peer_heads.json"

    @property
    def audit_path(self) -> Path:
        """The newest audit of the engine."""
        return self.path / "audit.json"

    @property
    def figures(self) -> Figures:
        """What accountants answered before, for whoever only looks."""
        return Figures(self.path / "figures.json")

    @property
    def unusable_path(self) -> Path:
        """Counts of tiles and gradients that could not be used. Private."""
        return self.path / "unusable"

    @property
    def outbox_path(self) -> Path:
        return self.path / "outbox"

    @property
    def seen_path(self) -> Path:
        """What the stated adversary saw. Each update left with its noise."""
        return self.path / "seen"

    @property
    def stage_start_path(self) -> Path:
        return self.path / "stage_start.safetensors"


def to_toml(model: BaseModel) -> str:
    """Values as TOML; JSON's scalars and lists of scalars are TOML's. Tables come last."""
    values = model.model_dump(mode="json", exclude_none=True)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    text = _lines({key: value for key, value in values.items() if key not in tables})
    return text + "".join(f"[{key}]\n{_lines(table)}" for key, table in tables.items() if table)


def _lines(values: dict[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


_SITE_HEADER = """\
# Who this site is. declared_patients is public and rounded; the exact number never leaves.
"""
_POLICY_HEADER = """\
# What this site allows, whatever a plan says. Every limit is inclusive; see crafts-client policy.
# lifetime_filters: how max_epsilon and max_delta count over all plans together. "sums" adds up what
# plans declare; "renyi:ORDER" adds up what they run. Choose before the first round: the ledger
# holds the cohort to it (docs/privacy.md, "The limit for life").
# allowed_trust: with "distributed" only a share of the noise is added here; it needs
# max_epsilon_alone (docs/privacy.md, "One step over several hospitals").
"""
