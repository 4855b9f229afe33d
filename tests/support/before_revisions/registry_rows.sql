INSERT INTO registry_info VALUES (1);
INSERT INTO site VALUES ('aachen', '2026-11-28 18:18:49.102689');
INSERT INTO plan VALUES ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'lungs', '{}', 's', 'k', '2026-11-28 18:18:49.047003');
INSERT INTO run VALUES ('run', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'running', '2026-11-28 18:18:49.063145', NULL);
INSERT INTO round VALUES ('run', 1, 'pretraining', 'second', 0.1, 0.2, 1.0, 0.5, 0.05, 10, 5, 1.5, '2026-11-28 18:18:49.095113');
INSERT INTO participation (run_id, round, site, outcome, reason, weight) VALUES ('run', 1, 'aachen', 'used', '', 1.0);
INSERT INTO checkpoint VALUES ('run', 1, 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', '2026-11-28 18:18:49.096006');
INSERT INTO cohort_size VALUES ('north', 120, 120, 120);
INSERT INTO enrolment VALUES ('north', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'key', '2026-11-28 18:18:49.137737', NULL);
