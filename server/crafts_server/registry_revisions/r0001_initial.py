"""The registry as it was when revisions began. What an older program made without them stays."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Make what is missing."""
    op.create_table(
        "cohort_size",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("invited", sa.Integer(), nullable=True),
        sa.Column("told", sa.Integer(), nullable=True),
        sa.Column("agreed", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("site", name="pk_cohort_size"),
        if_not_exists=True,
    )
    op.create_table(
        "enrolment",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("node_public_key", sa.Text(), nullable=False),
        sa.Column("enrolled_at", sa.DateTime(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("site", name="pk_enrolment"),
        if_not_exists=True,
    )
    op.create_table(
        "identity",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("public_key", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_identity"),
        sa.UniqueConstraint("public_key", name="uq_identity_public_key"),
        if_not_exists=True,
    )
    op.create_table(
        "invitation",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("used", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_invitation"),
        sa.UniqueConstraint("token_hash", name="uq_invitation_token_hash"),
        if_not_exists=True,
    )
    op.create_table(
        "plan",
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("study", sa.String(length=63), nullable=False),
        sa.Column("json", sa.Text(), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.Column("public_key", sa.String(length=64), nullable=False),
        sa.Column("signed_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_plan"),
        if_not_exists=True,
    )
    op.create_table(
        "registry_info",
        sa.Column("format_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("format_version", name="pk_registry_info"),
        if_not_exists=True,
    )
    op.create_table(
        "signed_head",
        sa.Column("holder", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("holder", "number", name="pk_signed_head"),
        if_not_exists=True,
    )
    op.create_index("ix_signed_head_site", "signed_head", ["site"], if_not_exists=True)
    op.create_table(
        "site",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_site"),
        if_not_exists=True,
    )
    op.create_table(
        "witness",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("ledger", sa.String(length=64), nullable=False),
        sa.Column("entries", sa.Integer(), nullable=False),
        sa.Column("head", sa.String(length=64), nullable=False),
        sa.Column("seen_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("site", "ledger", name="pk_witness"),
        if_not_exists=True,
    )
    op.create_table(
        "roster",
        sa.Column("plan_hash", sa.String(length=64), nullable=False),
        sa.Column("json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["plan_hash"], ["plan.hash"], name="fk_roster_plan_hash_plan"),
        sa.PrimaryKeyConstraint("plan_hash", name="pk_roster"),
        if_not_exists=True,
    )
    op.create_table(
        "run",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("plan_hash", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.ForeignKeyConstraint(["plan_hash"], ["plan.hash"], name="fk_run_plan_hash_plan"),
        sa.PrimaryKeyConstraint("run_id", name="pk_run"),
        if_not_exists=True,
    )
    op.create_index("ix_run_plan_hash", "run", ["plan_hash"], if_not_exists=True)
    op.create_table(
        "announcement",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("part", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("json", sa.Text(), nullable=False),
        sa.Column("missing", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_announcement_run_id_run"),
        sa.PrimaryKeyConstraint("run_id", "round", "attempt", "part", name="pk_announcement"),
        if_not_exists=True,
    )
    op.create_table(
        "attempt",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("void", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_attempt_run_id_run"),
        sa.PrimaryKeyConstraint("run_id", "round", "attempt", name="pk_attempt"),
        if_not_exists=True,
    )
    op.create_table(
        "checkpoint",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("manifest_hash", sa.String(length=64), nullable=False),
        sa.Column("state_hash", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_checkpoint_run_id_run"),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_checkpoint"),
        if_not_exists=True,
    )
    op.create_table(
        "participation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.Column("gain", sa.Double(), nullable=True),
        sa.Column("update_norm", sa.Double(), nullable=True),
        sa.Column("noise_multiplier", sa.Double(), nullable=True),
        sa.Column("steps", sa.Integer(), nullable=True),
        sa.Column("sample_rate", sa.Double(), nullable=True),
        sa.Column("declared_patients", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_participation_run_id_run"),
        sa.PrimaryKeyConstraint("id", name="pk_participation"),
        if_not_exists=True,
    )
    op.create_index("ix_participation_run_id", "participation", ["run_id"], if_not_exists=True)
    op.create_table(
        "round",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stage", sa.String(length=32), nullable=False),
        sa.Column("factor", sa.String(length=16), nullable=False),
        sa.Column("margin_before", sa.Double(), nullable=False),
        sa.Column("margin_after", sa.Double(), nullable=False),
        sa.Column("step_scale", sa.Double(), nullable=False),
        sa.Column("step_norm", sa.Double(), nullable=False),
        sa.Column("trust_norm", sa.Double(), nullable=False),
        sa.Column("bytes_down", sa.Integer(), nullable=False),
        sa.Column("bytes_up", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name="fk_round_run_id_run"),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_round"),
        if_not_exists=True,
    )
