"""The audit of sums finds what takes a guarantee away, and raises no alarm without it."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crafts_client import site_audit, sums
from crafts_client.audit_record import audited_settings, library_versions, weakness
from crafts_client.home import SiteHome
from crafts_client.sum_audit import audit_sums
from crafts_client.sums import SiteSums
from crafts_privacy import held_sum
from crafts_privacy.held_sum import HeldSum
from crafts_privacy.noise import GridNoise
from crafts_privacy.secure_aggregation import masking
from crafts_privacy.secure_aggregation.masking import Group, MaskKey
from support.noise import NoNoise, SeededNoise
from support.sites import make_site_home, policy_of

POLICY = policy_of("key", allowed_trust=("distributed",), max_epsilon_alone=5.0)
Patch = Callable[[pytest.MonkeyPatch], None]


def failed(seed: int, patch: Patch | None = None, noise: object | None = None) -> set[str]:
    with pytest.MonkeyPatch.context() as patched:
        if patch is not None:
            patch(patched)
        checks = audit_sums(POLICY, noise or SeededNoise(seed))
    return {check.name for check in checks if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 20), marks=pytest.mark.exhaustive)], ids=["4", "16"]
)
def test_no_alarm_without_a_fault(seeds: range) -> None:
    assert [failed(seed) for seed in seeds] == [set()] * len(seeds)


def test_a_floor_of_noise_is_no_fault() -> None:
    policy = POLICY.model_copy(update={"min_own_noise_multiplier": 2.5})
    assert all(check.passed for check in audit_sums(policy, GridNoise()))


def by_members(patch: pytest.MonkeyPatch) -> None:
    """Sized as if nobody could collude."""
    patch.setattr(
        sums,
        "own_noise_multiplier",
        lambda sigma, *, num_members, colluding_sites, floor: sigma / num_members**0.5,
    )


def no_masks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(held_sum, "add_masks_", lambda vector, pairs: None)


def one_mask_less(patch: pytest.MonkeyPatch) -> None:
    whole = held_sum.add_masks_
    patch.setattr(held_sum, "add_masks_", lambda vector, pairs: whole(vector, pairs[1:]))


def zero_masks(patch: pytest.MonkeyPatch) -> None:
    """Half of every vector is not masked."""
    whole = held_sum.add_masks_

    def half(vector: Group, pairs: object) -> None:
        whole(vector[: len(vector) // 2], pairs)

    patch.setattr(held_sum, "add_masks_", half)


def one_key(patch: pytest.MonkeyPatch) -> None:
    """A site's key is the same in every attempt; sites answer by turns."""
    turns = itertools.cycle([X25519PrivateKey.generate() for _ in range(5)])
    patch.setattr(sums, "MaskKey", lambda: MaskKey(next(turns)))


def masks_of_keys_alone(patch: pytest.MonkeyPatch) -> None:
    whole = masking._pair_key
    patch.setattr(
        masking,
        "_pair_key",
        lambda private, key, _, first, second: whole(private, key, "0" * 64, first, second),
    )


def believed(patch: pytest.MonkeyPatch) -> None:
    """Whatever is announced."""
    patch.setattr(
        sums,
        "verify_members",
        lambda told, roster, own, *, min_members: sums.Members(
            hash=sums.members_hash(told),
            keys={word.site: word.key for word in told.members},
            declared_patients=1,
            noise_multiplier=own.noise_multiplier,
        ),
    )


def leaves_twice(patch: pytest.MonkeyPatch) -> None:
    """The sum stays where it was, and so does what was said of it."""
    whole, released = SiteSums.release, HeldSum.release

    def again(self: SiteSums, *args: object, **values: object) -> object:
        held = self._held
        try:
            return whole(self, *args, **values)  # type: ignore[arg-type]
        finally:
            self._held = held

    def kept(self: HeldSum, *args: object) -> Group:
        sum_D = self._sum_D
        assert sum_D is not None
        kept_D = sum_D.clone()
        try:
            return released(self, *args)  # type: ignore[arg-type]
        finally:
            self._sum_D = kept_D

    patch.setattr(SiteSums, "release", again)
    patch.setattr(HeldSum, "release", kept)


@pytest.mark.parametrize(
    ("patch", "finds"),
    [
        (by_members, "noise"),
        (no_masks, "one vector"),
        (one_mask_less, "all but one"),
        (zero_masks, "one vector"),
        (one_key, "keys"),
        (masks_of_keys_alone, "members"),
        (believed, "announcements"),
        (leaves_twice, "once"),
    ],
)
@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, 20), marks=pytest.mark.exhaustive)], ids=["1", "19"]
)
def test_a_fault_is_found(patch: Patch, finds: str, seeds: range) -> None:
    found = [finds in failed(seed, patch) for seed in seeds]
    assert sum(found) >= len(found) - len(found) // 19


def test_shares_that_are_missing_or_the_same_are_found() -> None:
    assert "noise" in failed(0, noise=NoNoise())

    class Frozen:
        def add_(self, grid_sum_D, std: float) -> None:
            SeededNoise(1).add_(grid_sum_D, std)

    assert "noise" in failed(0, noise=Frozen()), "all sites draw the same"
    assert "fresh" in failed(0, noise=Frozen())


def test_where_sums_are_allowed_an_audit_without_them_is_stale(
    tmp_path: Path, foundation, coordinator, monkeypatch
) -> None:
    home = make_site_home(
        tmp_path / "site",
        foundation,
        coordinator.public_key,
        allowed_trust=("site", "distributed"),
        max_epsilon_alone=5.0,
    )
    plain = SiteHome(
        path=home.path,
        config=home.config,
        policy=home.policy.model_copy(update={"allowed_trust": ("site",)}),
    )
    record = {
        "passed": True,
        "code_sha256": "c",
        "libraries": library_versions(),
        "settings": audited_settings(home.config),
        "training": {"stages": ["pretraining", "alignment"]},
    }
    assert weakness(record, plain, "c") is None
    assert weakness(record, home, "c") is not None
    assert "no sums over sites" in str(weakness(record, home, "c"))
    checks = site_audit._audited_sums(home)
    assert weakness(record | {"sums": [check.name for check in checks]}, home, "c") is None
    assert site_audit._audited_sums(plain) == ()
    assert np.all([check.passed for check in checks])
