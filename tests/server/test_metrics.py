"""What Prometheus reads after a round, on loopback only."""

import urllib.request
from datetime import UTC, datetime

import pytest

from crafts_server.errors import ServerError
from crafts_server.metrics import Metrics
from crafts_server.receipts import Refusal, RoundReceipt, SiteReceipt, WeightRise

pytestmark = pytest.mark.network


def receipt() -> RoundReceipt:
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
        run_id="r1",
        round=4,
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
        sent_hash="a" * 64,
        finished_at=datetime.now(UTC),
        state_hash="a" * 64,
    )


def test_a_round_is_counted() -> None:
    metrics = Metrics()
    port = metrics.start(0)
    for _ in range(2):
        metrics.committed(receipt())
    metrics.sites_online.set(3)
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
        "crafts_sites_online 3.0",
    }


def test_a_port_that_is_taken_is_one_line() -> None:
    first, second = Metrics(), Metrics()
    port = first.start(0)
    with pytest.raises(ServerError, match="set metrics_port"):
        second.start(port)
    first.stop()
