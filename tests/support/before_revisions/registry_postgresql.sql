CREATE TABLE cohort_size (
    site VARCHAR(63) NOT NULL,
    invited INTEGER,
    told INTEGER,
    agreed INTEGER,
    CONSTRAINT pk_cohort_size PRIMARY KEY (site)
);
CREATE TABLE enrolment (
    site VARCHAR(63) NOT NULL,
    fingerprint VARCHAR(64) NOT NULL,
    node_public_key TEXT NOT NULL,
    enrolled_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    revoked_at TIMESTAMP WITHOUT TIME ZONE,
    CONSTRAINT pk_enrolment PRIMARY KEY (site)
);
CREATE TABLE identity (
    site VARCHAR(63) NOT NULL,
    public_key VARCHAR(64) NOT NULL,
    CONSTRAINT pk_identity PRIMARY KEY (site),
    CONSTRAINT uq_identity_public_key UNIQUE (public_key)
);
CREATE TABLE invitation (
    site VARCHAR(63) NOT NULL,
    token_hash VARCHAR(64) NOT NULL,
    expires_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    used BOOLEAN NOT NULL,
    CONSTRAINT pk_invitation PRIMARY KEY (site),
    CONSTRAINT uq_invitation_token_hash UNIQUE (token_hash)
);
CREATE TABLE plan (
    hash VARCHAR(64) NOT NULL,
    study VARCHAR(63) NOT NULL,
    json TEXT NOT NULL,
    signature VARCHAR(128) NOT NULL,
    public_key VARCHAR(64) NOT NULL,
    signed_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    CONSTRAINT pk_plan PRIMARY KEY (hash)
);
CREATE TABLE registry_info (
    format_version INTEGER NOT NULL,
    CONSTRAINT pk_registry_info PRIMARY KEY (format_version)
);
CREATE TABLE signed_head (
    holder VARCHAR(63) NOT NULL,
    number INTEGER NOT NULL,
    site VARCHAR(63) NOT NULL,
    json TEXT NOT NULL,
    CONSTRAINT pk_signed_head PRIMARY KEY (holder, number)
);
CREATE INDEX ix_signed_head_site ON signed_head (site);
CREATE TABLE site (
    name VARCHAR(63) NOT NULL,
    first_seen_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    CONSTRAINT pk_site PRIMARY KEY (name)
);
CREATE TABLE witness (
    site VARCHAR(63) NOT NULL,
    ledger VARCHAR(64) NOT NULL,
    entries INTEGER NOT NULL,
    head VARCHAR(64) NOT NULL,
    seen_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    CONSTRAINT pk_witness PRIMARY KEY (site, ledger)
);
CREATE TABLE roster (
    plan_hash VARCHAR(64) NOT NULL,
    json TEXT NOT NULL,
    CONSTRAINT pk_roster PRIMARY KEY (plan_hash),
    CONSTRAINT fk_roster_plan_hash_plan FOREIGN KEY(plan_hash) REFERENCES plan (hash)
);
CREATE TABLE run (
    run_id VARCHAR(64) NOT NULL,
    plan_hash VARCHAR(64) NOT NULL,
    status VARCHAR(16) NOT NULL,
    started_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    finished_at TIMESTAMP WITHOUT TIME ZONE,
    CONSTRAINT pk_run PRIMARY KEY (run_id),
    CONSTRAINT fk_run_plan_hash_plan FOREIGN KEY(plan_hash) REFERENCES plan (hash)
);
CREATE INDEX ix_run_plan_hash ON run (plan_hash);
CREATE TABLE announcement (
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    part INTEGER NOT NULL,
    json TEXT NOT NULL,
    missing TEXT,
    CONSTRAINT pk_announcement PRIMARY KEY (run_id, round, attempt, part),
    CONSTRAINT fk_announcement_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
CREATE TABLE attempt (
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    void BOOLEAN NOT NULL,
    CONSTRAINT pk_attempt PRIMARY KEY (run_id, round, attempt),
    CONSTRAINT fk_attempt_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
CREATE TABLE checkpoint (
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    manifest_hash VARCHAR(64) NOT NULL,
    state_hash VARCHAR(64) NOT NULL,
    created_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    CONSTRAINT pk_checkpoint PRIMARY KEY (run_id, round),
    CONSTRAINT fk_checkpoint_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
CREATE TABLE participation (
    id SERIAL NOT NULL,
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    site VARCHAR(63) NOT NULL,
    outcome VARCHAR(16) NOT NULL,
    reason TEXT NOT NULL,
    weight DOUBLE PRECISION,
    gain DOUBLE PRECISION,
    update_norm DOUBLE PRECISION,
    noise_multiplier DOUBLE PRECISION,
    steps INTEGER,
    sample_rate DOUBLE PRECISION,
    declared_patients INTEGER,
    CONSTRAINT pk_participation PRIMARY KEY (id),
    CONSTRAINT fk_participation_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
CREATE INDEX ix_participation_run_id ON participation (run_id);
CREATE TABLE round (
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    stage VARCHAR(32) NOT NULL,
    factor VARCHAR(16) NOT NULL,
    margin_before DOUBLE PRECISION NOT NULL,
    margin_after DOUBLE PRECISION NOT NULL,
    step_scale DOUBLE PRECISION NOT NULL,
    step_norm DOUBLE PRECISION NOT NULL,
    trust_norm DOUBLE PRECISION NOT NULL,
    bytes_down INTEGER NOT NULL,
    bytes_up INTEGER NOT NULL,
    seconds DOUBLE PRECISION NOT NULL,
    finished_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
    CONSTRAINT pk_round PRIMARY KEY (run_id, round),
    CONSTRAINT fk_round_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
