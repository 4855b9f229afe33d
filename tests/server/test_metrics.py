"""What Prometheus reads after a round, on loopback only."""

import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crafts_server.audit_log import Event
from crafts_server.errors import ServerError
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.metrics import Metrics
from crafts_server.receipts import Refusal, RoundReceipt, SiteReceipt, WeightRise
from crafts_server.registry import CheckpointRecord, PlanRecord
from crafts_server.service import Service

pytestmark = pytest.mark.network


HASH = "a" * 64


def receipt(run: str = "r1", number: int = 4) -> RoundReceipt:
    site = SiteReceipt(
        site="aachen",
        weight=1.0,
        max_weight=1.0,
        gain=None,
        update_norm=0.5,
        steps=3,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        declared_patients=100,
        declared_noise_variance=1e-4,
    )
    return RoundReceipt(
        run_id=run,
        round=number,
        stage="pretraining",
        stage_index=0,
        factor="second",
        sites=(site,),
        missing=("cork",),
        rises=(WeightRise(site="aachen", before=0.9, now=1.8),),
        margin_before=0.1,
        refused=(Refusal(site="bern", reason="x"), Refusal(site="oslo", reason="y")),
        margin_after=0.25,
        step_norm=0.5,
        trust_norm=0.0,
        step_scale=1.0,
        bytes_down=100,
        bytes_up=50,
        seconds=7.5,
        sent_hash=HASH,
        finished_at=datetime.now(UTC),
        state_hash=HASH,
    )


def test_a_round_is_counted() -> None:
    metrics = Metrics()
    port = metrics.start(0)
    for _ in range(2):
        metrics.committed(receipt())
    metrics.connected({"aachen": True, "bern": True, "cork": False})
    metrics.connected({"aachen": True, "cork": False})
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    metrics.stop()
    lines = set(text.splitlines())
    assert lines >= {
        'crafts_round{run="r1"} 4.0',
        'crafts_alignment_margin{run="r1"} 0.25',
        'crafts_rounds_total{run="r1"} 2.0',
        'crafts_updates_total{outcome="refused",run="r1"} 4.0',
        'crafts_updates_total{outcome="missing",run="r1"} 2.0',
        'crafts_bytes_total{direction="up",run="r1"} 100.0',
        'crafts_weight_rises_total{run="r1"} 2.0',
        "crafts_sites_enrolled 2.0",
        "crafts_sites_online 1.0",
        'crafts_site_online{site="aachen"} 1.0',
        'crafts_site_online{site="cork"} 0.0',
    }
    assert 'site="bern"' not in text


def test_the_first_refusal_of_a_run_is_an_increase() -> None:
    """Prometheus sees a rise between two readings, and none in what a series is born with."""
    metrics = Metrics()
    metrics.began("r1")
    before = numbers(metrics)
    metrics.committed(receipt())
    after = numbers(metrics)
    risen = {name.split("[")[0] for name, value in after.items() if value > before.get(name, value)}
    assert {"crafts_rounds_total", "crafts_updates_total", "crafts_weight_rises_total"} <= risen


def test_a_port_that_is_taken_is_one_line() -> None:
    first, second = Metrics(), Metrics()
    port = first.start(0)
    with pytest.raises(ServerError, match="set metrics_port"):
        second.start(port)
    first.stop()


def numbers(metrics: Metrics) -> dict[str, float]:
    """Every series but when it was made."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in metrics._registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_after_a_restart_counters_are_where_they_were(tmp_path: Path) -> None:
    """Otherwise the first refusal after it would be no increase of anything."""
    home = CoordinatorHome.create(tmp_path / "home", HomeConfig())
    registry, log, before = home.registry(), home.audit_log, Metrics()
    registry.add_plan(PlanRecord(hash=HASH, study="s", json="", signature="", public_key=""))
    for run in ("r1", "r2"):
        registry.start_run(run, HASH)
        for number in (1, 2):
            told = receipt(run, number)
            before.committed(told)
            checkpoint = CheckpointRecord(round=number, manifest_hash=HASH, state_hash=HASH)
            registry.record(run, checkpoint, told)
            log.write(Event.ROSE, run=run, round=number, site="aachen")
    log.write(Event.SHORT, plan=HASH, why="x")
    before.short_rounds.inc()
    service = Service(home)
    service._count_on()
    assert numbers(service.metrics) == numbers(before)
    registry.close()
    service._registry.close()
