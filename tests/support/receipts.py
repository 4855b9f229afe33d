"""Receipts of rounds that nobody ran."""

from datetime import UTC, datetime

from crafts_server.receipts import RoundReceipt, SiteReceipt

PATIENTS = {"aachen": 120, "bern": 40, "coimbra": 40}
HASH = "a" * 64


def site_receipts(**weights: float) -> tuple[SiteReceipt, ...]:
    return tuple(
        SiteReceipt(
            site=site,
            weight=weight,
            max_weight=1.0,
            gain=None,
            update_norm=1.0,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            sample_rate=0.5,
            steps=1,
            declared_patients=PATIENTS[site],
            declared_noise_variance=1e-4,
        )
        for site, weight in weights.items()
    )


def receipt(stage_index: int = 0, **weights: float) -> RoundReceipt:
    return RoundReceipt(
        run_id="run",
        round=1,
        stage="pretraining",
        stage_index=stage_index,
        factor="second",
        sites=site_receipts(**weights),
        refused=(),
        missing=(),
        rises=(),
        margin_before=0.1,
        margin_after=0.1,
        step_norm=1.0,
        trust_norm=0.0,
        step_scale=1.0,
        bytes_down=1,
        bytes_up=1,
        seconds=1.0,
        finished_at=datetime.now(UTC),
        sent_hash=HASH,
        state_hash=HASH,
    )
