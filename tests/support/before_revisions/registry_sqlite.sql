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
    created_at DATETIME NOT NULL,
    CONSTRAINT pk_checkpoint PRIMARY KEY (run_id, round),
    CONSTRAINT fk_checkpoint_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
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
    enrolled_at DATETIME NOT NULL,
    revoked_at DATETIME,
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
    expires_at DATETIME NOT NULL,
    used BOOLEAN NOT NULL,
    CONSTRAINT pk_invitation PRIMARY KEY (site),
    CONSTRAINT uq_invitation_token_hash UNIQUE (token_hash)
);
CREATE TABLE participation (
    id INTEGER NOT NULL,
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    site VARCHAR(63) NOT NULL,
    outcome VARCHAR(16) NOT NULL,
    reason TEXT NOT NULL,
    weight DOUBLE,
    gain DOUBLE,
    update_norm DOUBLE,
    noise_multiplier DOUBLE,
    steps INTEGER,
    sample_rate DOUBLE,
    declared_patients INTEGER,
    CONSTRAINT pk_participation PRIMARY KEY (id),
    CONSTRAINT fk_participation_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
CREATE TABLE "plan" (
    hash VARCHAR(64) NOT NULL,
    study VARCHAR(63) NOT NULL,
    json TEXT NOT NULL,
    signature VARCHAR(128) NOT NULL,
    public_key VARCHAR(64) NOT NULL,
    signed_at DATETIME NOT NULL,
    CONSTRAINT pk_plan PRIMARY KEY (hash)
);
CREATE TABLE registry_info (
    format_version INTEGER NOT NULL,
    CONSTRAINT pk_registry_info PRIMARY KEY (format_version)
);
CREATE TABLE roster (
    plan_hash VARCHAR(64) NOT NULL,
    json TEXT NOT NULL,
    CONSTRAINT pk_roster PRIMARY KEY (plan_hash),
    CONSTRAINT fk_roster_plan_hash_plan FOREIGN KEY(plan_hash) REFERENCES "plan" (hash)
);
CREATE TABLE round (
    run_id VARCHAR(64) NOT NULL,
    round INTEGER NOT NULL,
    stage VARCHAR(32) NOT NULL,
    factor VARCHAR(16) NOT NULL,
    margin_before DOUBLE NOT NULL,
    margin_after DOUBLE NOT NULL,
    step_scale DOUBLE NOT NULL,
    step_norm DOUBLE NOT NULL,
    trust_norm DOUBLE NOT NULL,
    bytes_down INTEGER NOT NULL,
    bytes_up INTEGER NOT NULL,
    seconds DOUBLE NOT NULL,
    finished_at DATETIME NOT NULL,
    CONSTRAINT pk_round PRIMARY KEY (run_id, round),
    CONSTRAINT fk_round_run_id_run FOREIGN KEY(run_id) REFERENCES run (run_id)
);
CREATE TABLE run (
    run_id VARCHAR(64) NOT NULL,
    plan_hash VARCHAR(64) NOT NULL,
    status VARCHAR(16) NOT NULL,
    started_at DATETIME NOT NULL,
    finished_at DATETIME,
    CONSTRAINT pk_run PRIMARY KEY (run_id),
    CONSTRAINT fk_run_plan_hash_plan FOREIGN KEY(plan_hash) REFERENCES "plan" (hash)
);
CREATE TABLE signed_head (
    holder VARCHAR(63) NOT NULL,
    number INTEGER NOT NULL,
    site VARCHAR(63) NOT NULL,
    json TEXT NOT NULL,
    CONSTRAINT pk_signed_head PRIMARY KEY (holder, number)
);
CREATE TABLE site (
    name VARCHAR(63) NOT NULL,
    first_seen_at DATETIME NOT NULL,
    CONSTRAINT pk_site PRIMARY KEY (name)
);
CREATE TABLE witness (
    site VARCHAR(63) NOT NULL,
    ledger VARCHAR(64) NOT NULL,
    entries INTEGER NOT NULL,
    head VARCHAR(64) NOT NULL,
    seen_at DATETIME NOT NULL,
    CONSTRAINT pk_witness PRIMARY KEY (site, ledger)
);
CREATE INDEX ix_signed_head_site ON signed_head (site);
CREATE INDEX ix_run_plan_hash ON run (plan_hash);
CREATE INDEX ix_participation_run_id ON participation (run_id);
