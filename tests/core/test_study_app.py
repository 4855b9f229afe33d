"""The pages of a reader study over HTTP."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from crafts_core.study.questions import ATTRIBUTES
from crafts_core.study.reading_app import HEADERS, reading_app
from crafts_core.study.study_file import FileBusyError, StudyFile
from support.reader_studies import ALL_QUESTIONS, make_study, some_answer


@dataclass
class Desk:
    """A study that is served, and the browser of whoever sits there."""

    study: StudyFile
    client: TestClient

    @property
    def door(self) -> str:
        return f"/{self.study.info.token}/"

    def of(self, number: int) -> str:
        return f"{self.door}{self.study.readers()[number - 1].code}/"

    def trial(self, number: int = 1) -> str:
        found = re.search(r'data-trial="(\w+)"', self.client.get(self.of(number)).text)
        assert found is not None
        return found[1]

    def answer(self, number: int = 1, **changes: object) -> Response:
        body = some_answer(self.trial(number), self.study.info.questions).model_dump()
        kept = {key: value for key, value in (body | changes).items() if value is not None}
        return self.client.post(f"{self.of(number)}answer", json=kept)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    study = make_study(tmp_path, readers=2, calibration=2, questions=ALL_QUESTIONS)
    with TestClient(reading_app(study), base_url="http://127.0.0.1:8765") as client:
        yield Desk(study, client)
    study.close()


def test_no_token_no_page(desk: Desk) -> None:
    code, trial = desk.study.readers()[0].code, desk.trial()
    near = desk.study.info.token[:-1] + "~"
    for token in ("", "x", near, desk.study.info.token.lower(), "é"):
        for path in ("", "enter", "assets/reading.js", f"{code}/", f"{code}/image/{trial}"):
            response = desk.client.get(f"/{token}/{path}")
            assert (response.status_code, response.content) == (404, b"")
        response = desk.client.post(f"/{token}/{code}/answer", json={})
        assert (response.status_code, response.content) == (404, b"")
    for path in ("/", "/docs", "/openapi.json", "/favicon.ico"):
        assert desk.client.get(path).status_code == 404
    assert desk.study.readings() == []


def test_every_answer_has_strict_headers(desk: Desk) -> None:
    paths = [desk.door, desk.of(1), f"{desk.of(1)}image/{desk.trial()}", "/nobody/"]
    for path in (*paths, f"{desk.door}assets/reading.css", f"{desk.door}nobody/"):
        headers = desk.client.get(path).headers
        assert headers.items() >= {k.lower(): v for k, v in HEADERS.items()}.items()
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_pages_name_nothing_that_is_elsewhere(desk: Desk) -> None:
    texts = [desk.client.get(desk.door).text, desk.client.get(desk.of(1)).text]
    texts += [desk.client.get(f"{desk.door}assets/reading.{end}").text for end in ("css", "js")]
    for text in texts:
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
        assert not re.search(r"<script(?! src=)|<style| style=| on[a-z]+=", text)


def test_another_host_name_is_refused(desk: Desk) -> None:
    response = desk.client.get(desk.door, headers={"Host": "evil.example"})
    assert response.status_code == 400
    assert desk.study.info.name not in response.text


def test_a_code_opens_one_readers_part(desk: Desk) -> None:
    code = desk.study.readers()[1].code
    typed = f"{code[:5].lower()}-{code[5:]} "
    response = desk.client.get(f"{desk.door}enter", params={"code": typed})
    assert response.url.path == desk.of(2)
    assert "Image 1 of 14" in response.text


def test_a_wrong_code_opens_nothing(desk: Desk) -> None:
    response = desk.client.get(f"{desk.door}enter", params={"code": "ABCDEFGHJK"})
    assert "No reader of this study has this code" in response.text
    wrong = f"{desk.door}ABCDEFGHJK/"
    assert desk.client.get(wrong).status_code == 404
    assert desk.client.post(f"{wrong}answer", json={}).status_code == 404
    assert desk.client.post(f"{wrong}undo").status_code == 404


def test_a_reader_reaches_nothing_of_another(desk: Desk) -> None:
    trial = desk.trial(1)
    assert desk.client.get(f"{desk.of(1)}image/{trial}").status_code == 200
    assert desk.client.get(f"{desk.of(2)}image/{trial}").status_code == 409
    body = some_answer(trial, ALL_QUESTIONS).model_dump()
    assert desk.client.post(f"{desk.of(2)}answer", json=body).status_code == 409
    assert desk.answer(1).status_code == 200
    assert "Image 1 of 14" in desk.client.get(desk.of(2)).text
    assert desk.client.post(f"{desk.of(2)}undo").status_code == 409


def test_a_page_and_an_image_do_not_say_what_they_show(desk: Desk) -> None:
    """All pages of a study are one page but for a random id and the count."""
    pages, images, texts = set(), [], []
    while 'id="done"' not in (text := desk.client.get(desk.of(1)).text):
        response = desk.client.get(f"{desk.of(1)}image/{desk.trial()}")
        images.append((tuple(sorted(response.headers.items())), len(response.content)))
        texts.append(text)
        if "Practice" not in text:
            page = re.sub(r"[0-9a-f]{24}|value=\"\d+\" aria|Image \d+", "", text)
            pages.add(page.replace(' id="undo" disabled', ' id="undo"'))
        assert desk.answer().status_code == 200
    assert len(images) == 14
    assert len(set(images)) == 1
    assert len(pages) == 1
    for told in ("doe", "tile-", "COAD/", ".png", *(str(p) for p in ("real/", "synthetic/"))):
        assert not any(told in text for text in texts)


def test_a_repeat_has_an_id_of_its_own(tmp_path: Path) -> None:
    study = make_study(tmp_path, repeats=0.5, calibration=0, per_kind=8)
    with TestClient(reading_app(study), base_url="http://127.0.0.1") as client:
        desk = Desk(study, client)
        trials, shown = [], []
        for _ in range(study.position(study.readers()[0]).total):
            trials.append(desk.trial())
            shown.append(client.get(f"{desk.of(1)}image/{trials[-1]}").content)
            desk.answer()
    assert len(set(trials)) == len(trials) > len(set(shown)) == 16
    study.close()


def test_practice_says_the_truth_after_the_answer_and_nothing_else_does(desk: Desk) -> None:
    for _ in range(2):
        assert "Practice: the answer is shown" in desk.client.get(desk.of(1)).text
        told = desk.answer().json()
        assert told["truth"] in ("real", "synthetic")
        assert told["type"] in ("colon adenocarcinoma, colon", "normal lung")
    assert "Practice" not in desk.client.get(desk.of(1)).text
    assert desk.answer().json() == {}


def test_reload_shows_the_same_image_and_an_answer_the_next(desk: Desk) -> None:
    first = desk.trial()
    assert desk.trial() == first
    desk.answer()
    assert desk.trial() != first
    assert desk.client.get(f"{desk.of(1)}image/{first}").status_code == 409


def test_an_answer_sent_twice_counts_once(desk: Desk) -> None:
    body = some_answer(desk.trial(), ALL_QUESTIONS).model_dump()
    codes = [desk.client.post(f"{desk.of(1)}answer", json=body).status_code for _ in range(2)]
    assert codes == [200, 409]
    assert desk.study.position(desk.study.readers()[0]).done == 1


def test_the_last_answer_is_taken_back(desk: Desk) -> None:
    for _ in range(2):
        desk.answer()
    third = desk.trial()
    desk.answer(score=1)
    assert desk.client.post(f"{desk.of(1)}undo").status_code == 200
    assert desk.trial() == third
    desk.answer(score=6)
    assert [each.score for each in desk.study.readings()] == [6]


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": 0}, {"score": 7}, {"score": None}, {"nuclei": 6}, {"nuclei": None},
        {"type_guess": "dog"}, {"type_guess": None}, {"seconds": -1.0}, {"seconds": 1e9},
        {"truth": "real"},
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(desk: Desk, wrong: dict[str, object]) -> None:
    assert desk.answer(**wrong).status_code == 422
    assert desk.study.position(desk.study.readers()[0]).done == 0


def test_an_answer_that_the_disk_has_no_room_for_is_told_to_whoever_can_help(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = some_answer(desk.trial(), ALL_QUESTIONS).model_dump()

    def full(*_: object) -> None:
        raise FileBusyError("/srv/study.db: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(desk.study, "record", full)
        refused = desk.client.post(f"{desk.of(1)}answer", json=body)
    assert (refused.status_code, refused.json()) == (503, {"detail": "not saved"})
    assert "/srv/study.db: database or disk is full" in caplog.text
    assert desk.client.post(f"{desk.of(1)}answer", json=body).status_code == 200


def test_an_answer_is_kept_with_time_and_duration(desk: Desk) -> None:
    for _ in range(3):
        desk.answer(seconds=7.25)
    (kept,) = desk.study.readings()
    assert (kept.seconds, kept.score, kept.type_guess) == (7.25, 2, "COAD")
    assert [getattr(kept, name) for name in ATTRIBUTES] == [3, 4, 5, 2]
    assert kept.answered_at >= desk.study.info.created_at


def test_only_what_the_study_asks_is_on_the_page(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with TestClient(reading_app(study), base_url="http://127.0.0.1") as client:
        text = client.get(Desk(study, client).of(1)).text
        assert text.count('class="question') == 1
        assert Desk(study, client).answer(nuclei=3).status_code == 422
    study.close()


def test_a_name_with_markup_is_only_a_name(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with study._session() as session:
        from crafts_core.study.rows import StudyRow

        session.query(StudyRow).update({"name": "<script>alert(1)</script>"})
    with TestClient(reading_app(study), base_url="http://127.0.0.1") as client:
        assert "<script>alert" not in client.get(Desk(study, client).door).text
    study.close()


def test_the_end_says_thanks(desk: Desk) -> None:
    for _ in range(14):
        desk.answer()
    text = desk.client.get(desk.of(1)).text
    assert "All images are read. Thank you." in text
    assert "14 of 14" in text
