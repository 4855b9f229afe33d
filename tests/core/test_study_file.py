"""The one file of a study: whose images, whose answers, and what survives."""

import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import event

from crafts_core.study import study_file
from crafts_core.study.questions import StudyError
from crafts_core.study.records import Reader
from crafts_core.study.rows import TrialRow
from crafts_core.study.study_file import FileBusyError, NotCurrentError, StudyFile
from support.reader_studies import ALL_QUESTIONS, ONLY_SIDES, make_study, read_on, some_answer


def trial_of(study: StudyFile, reader: Reader) -> str:
    trial = study.position(reader).trial
    assert trial is not None
    return trial


def test_a_reader_goes_on_at_the_same_image_after_the_file_was_closed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    (reader,) = study.readers()
    read_on(study, reader, [1, 6, 3])
    before = study.position(reader)
    study.close()
    again = StudyFile.open(tmp_path / "study.db")
    assert again.position(reader) == before
    assert (before.done, before.total) == (3, 14)
    assert list(tmp_path.glob("study.db*")) == [tmp_path / "study.db"]
    again.close()


def test_an_image_is_answered_once_whatever_two_windows_send(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    (reader,) = study.readers()
    answer = some_answer(trial_of(study, reader), study.info.questions)
    refused = []

    def send() -> None:
        try:
            study.record(reader, answer)
        except NotCurrentError as error:
            refused.append(error)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert study.position(reader).done == 1
    study.close()


def test_two_windows_at_the_same_moment_are_told_apart_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw the image as current before either had answered."""
    study = make_study(tmp_path)
    (reader,) = study.readers()
    answer = some_answer(trial_of(study, reader), study.info.questions)
    study.record(reader, answer)
    monkeypatch.setattr(
        study_file, "_checked_current", lambda session, _, trial: session.get(TrialRow, trial)
    )
    with pytest.raises(NotCurrentError, match="answered already"):
        study.record(reader, answer)
    assert study.position(reader).done == 1
    study.close()


def test_practice_comes_in_no_order_of_kinds(tmp_path: Path) -> None:
    seen = set()
    for seed in range(5):
        study = make_study(tmp_path, per_kind=5, calibration=4, seed=seed)
        (reader,) = study.readers()
        told = []
        for _ in range(4):
            answer = some_answer(trial_of(study, reader), study.info.questions)
            truth = study.record(reader, answer)
            told.append(truth is not None and truth.is_synthetic)
        seen.add(tuple(told))
        study.close()
        (tmp_path / "study.db").unlink()
    assert len(seen) > 1


def test_nobody_looks_at_an_image_of_another_or_ahead_or_back(tmp_path: Path) -> None:
    study = make_study(tmp_path, readers=2)
    one, other = study.readers()
    first = trial_of(study, one)
    study.picture(one, first)
    with pytest.raises(NotCurrentError):
        study.picture(other, first)
    read_on(study, one, [2])
    with pytest.raises(NotCurrentError):
        study.picture(one, first)
    with pytest.raises(NotCurrentError):
        study.record(other, some_answer(trial_of(study, one), study.info.questions))
    study.close()


def test_the_last_answer_can_be_taken_back_and_stays_on_record(tmp_path: Path) -> None:
    study = make_study(tmp_path, calibration=0)
    (reader,) = study.readers()
    read_on(study, reader, [1, 2])
    study.undo(reader)
    assert study.position(reader).done == 1
    with pytest.raises(NotCurrentError, match="no answer to take back"):
        study.undo(reader)  # one step: no walk from image to image, to a first showing
    read_on(study, reader, [5])
    assert [each.score for each in study.readings()] == [1, 5]
    with sqlite3.connect(tmp_path / "study.db") as raw:
        assert raw.execute("SELECT score FROM answer ORDER BY id").fetchall() == [(1,), (2,), (5,)]
    raw.close()
    study.close()


def test_what_a_calibration_image_told_cannot_be_taken_back(tmp_path: Path) -> None:
    study = make_study(tmp_path, calibration=2)
    (reader,) = study.readers()
    told = [
        study.record(reader, some_answer(trial_of(study, reader), study.info.questions))
        for _ in range(2)
    ]
    assert sorted(truth.is_synthetic for truth in told if truth) == [False, True]
    assert not study.position(reader).can_undo
    with pytest.raises(NotCurrentError):
        study.undo(reader)
    third = some_answer(trial_of(study, reader), study.info.questions)
    assert study.record(reader, third) is None
    assert len(study.readings()) == 1
    study.close()


def test_readers_have_other_codes_orders_and_trials_but_one_practice(tmp_path: Path) -> None:
    study = make_study(tmp_path, readers=3, calibration=4, questions=ALL_QUESTIONS)
    assert len({reader.code for reader in study.readers()}) == 3
    study.close()
    with sqlite3.connect(tmp_path / "study.db") as raw:
        rows = raw.execute("SELECT reader, image_id, id FROM trial ORDER BY reader, place")
        trials = rows.fetchall()
    raw.close()
    orders = [[image for reader, image, _ in trials if reader == number] for number in (1, 2, 3)]
    assert len({tuple(order[:4]) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) == 3
    assert len({trial for _, _, trial in trials}) == len(trials)


def test_the_same_seed_chooses_the_same_images_but_no_code(tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        study = make_study(tmp_path, per_kind=5)
        (reader,) = study.readers()
        read_on(study, reader, [1] * 12)
        kept.append(([each.source for each in study.readings()], reader.code, study.info.token))
        study.close()
        (tmp_path / "study.db").unlink()
    (sources, code, token), (same, other_code, other_token) = kept
    assert sources == same
    assert code != other_code
    assert token != other_token


def test_a_study_is_never_written_over(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    with pytest.raises(FileExistsError, match="may hold answers"):
        make_study(tmp_path)


def test_what_fails_leaves_no_file(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    (tmp_path / "study.db").unlink()
    with pytest.raises(StudyError, match="expected 202 images"):
        make_study(tmp_path, per_kind=201)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "synthetic"]


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    assert (tmp_path / "study.db").stat().st_mode & 0o777 == 0o600


def test_what_is_no_study_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "empty", "missing"):
        with pytest.raises(StudyError, match="no study"):
            StudyFile.open(tmp_path / name)
    assert not (tmp_path / "missing").exists()


def test_a_study_of_another_version_is_refused(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("UPDATE study SET format_version = 7")
    raw.close()
    with pytest.raises(StudyError, match="has format 7, expected 1"):
        StudyFile.open(tmp_path / "study.db")


def test_types_are_not_asked_where_none_is_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("real", "synthetic"):
        (tmp_path / name).mkdir()
        for index in range(5):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    with pytest.raises(StudyError, match="no image has a type that is known"):
        make_study(tmp_path, calibration=0, questions=ALL_QUESTIONS, per_kind=5)


def test_a_full_disk_is_one_line_and_the_answers_stay(tmp_path: Path) -> None:
    study = make_study(tmp_path, calibration=0)
    pages = sqlite3.connect(tmp_path / "study.db").execute("PRAGMA page_count").fetchone()[0]

    def fill(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    study.close()
    event.listen(study._engine, "connect", fill)
    reader = study.readers()[0]

    def answer_on() -> None:
        while True:
            study.record(reader, some_answer(trial_of(study, reader), ONLY_SIDES))
            study.undo(reader)

    with pytest.raises(FileBusyError, match="full"):
        answer_on()
    study.position(reader)
