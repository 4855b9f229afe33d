BEGIN TRANSACTION;
CREATE TABLE ledger_entry (
    sequence INTEGER NOT NULL,
    recorded_at DATETIME NOT NULL,
    kind VARCHAR NOT NULL,
    reservation INTEGER NOT NULL,
    cohort VARCHAR NOT NULL,
    plan_hash VARCHAR NOT NULL,
    run_id VARCHAR NOT NULL,
    round INTEGER NOT NULL,
    stage VARCHAR NOT NULL,
    noise_multiplier DOUBLE NOT NULL,
    sample_rate DOUBLE NOT NULL,
    steps INTEGER NOT NULL,
    detail VARCHAR NOT NULL,
    previous_hash VARCHAR NOT NULL,
    hash VARCHAR NOT NULL,
    CONSTRAINT pk_ledger_entry PRIMARY KEY (sequence),
    CONSTRAINT uq_ledger_entry_hash UNIQUE (hash)
);
INSERT INTO "ledger_entry" VALUES(1,'2026-11-28 18:23:11.416948','reserved',1,'breast','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','run-1',1,'pretraining',8.0,0.1,10,'{"delta": 0.0001, "filters": ["renyi:8"], "request": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc", "target_epsilon": null}','60c14848b65cea30ad5f46dec64670603ac0b9e0b4705877ddf7eb6a40519340','f4bcab440fe0d00f0fc986408995495772b01caee5b80c18eef0e6e95a3f4109');
INSERT INTO "ledger_entry" VALUES(2,'2026-11-28 18:23:11.440497','committed',1,'breast','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','run-1',1,'pretraining',8.0,0.1,10,'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','f4bcab440fe0d00f0fc986408995495772b01caee5b80c18eef0e6e95a3f4109','e302bc9796ba734706c81b831527b3ca1b345ec72aae6db1ca63d5460235c82a');
INSERT INTO "ledger_entry" VALUES(3,'2026-11-28 18:23:11.464764','reserved',3,'breast','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','run-1',2,'pretraining',8.0,0.1,10,'{"delta": 0.0001, "filters": ["renyi:8"], "request": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc", "target_epsilon": null}','e302bc9796ba734706c81b831527b3ca1b345ec72aae6db1ca63d5460235c82a','68d444a402a5186dfa23aa7ccc77eabfaddd65f97a4cdcd34a9bd33ad5bca697');
CREATE TABLE ledger_info (
    ledger_id VARCHAR NOT NULL,
    format_version INTEGER NOT NULL,
    CONSTRAINT pk_ledger_info PRIMARY KEY (ledger_id)
);
INSERT INTO "ledger_info" VALUES('582e4c9ad9704c8481badc70008f48db',1);
CREATE TRIGGER ledger_info_refuses_update BEFORE UPDATE ON ledger_info BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_info_refuses_delete BEFORE DELETE ON ledger_info BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_entry_refuses_update BEFORE UPDATE ON ledger_entry BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_entry_refuses_delete BEFORE DELETE ON ledger_entry BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
COMMIT;
