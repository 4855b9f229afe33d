"""A study is read by keyboard in a real Chromium."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from crafts_core.study.serving import link, loopback_socket, server
from crafts_core.study.study_file import StudyFile
from support.browsers import chromium
from support.reader_studies import ALL_QUESTIONS, make_study

pytestmark = [pytest.mark.network, pytest.mark.slow]


@contextmanager
def served(study: StudyFile, port: int = 0) -> Iterator[int]:
    """The study on loopback, until the block ends; its port."""
    with loopback_socket(port) as listening:
        running = server(study)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join()


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the page did not come to what was expected"
        time.sleep(0.02)


def press(browser: WebDriver, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def count(browser: WebDriver) -> str:
    """What the page says of progress once its script runs and its image is there."""
    script = """const image = document.querySelector('#image');
        const ready = document.readyState === 'complete' && (!image || image.naturalWidth > 0)
            && (!image || document.querySelector('.question.now'));
        const told = document.querySelector('.count');
        return ready && told ? told.textContent : '';"""
    return str(browser.execute_script(script))


def test_twenty_images_are_read_by_keyboard_to_the_end(tmp_path: Path) -> None:
    """With practice, zoom, a correction, a reload, and the program ended and started again."""
    study = make_study(
        tmp_path, per_kind=9, calibration=2, questions=ALL_QUESTIONS, readers=1, repeats=0.0
    )
    (reader,) = study.readers()
    with chromium(tmp_path / "profile") as browser:
        with served(study) as port:
            browser.get(link(study, port))
            press(browser, reader.code.lower(), Keys.ENTER)
            for number in range(1, 11):
                wait_until(lambda n=number: count(browser) == f"Image {n} of 20")
                if number == 5:
                    browser.refresh()
                    wait_until(lambda: count(browser) == "Image 5 of 20")
                read_one(browser, score=number % 6 + 1, is_practice=number <= 2)
            wait_until(lambda: count(browser) == "Image 11 of 20")
            press(browser, "u")
            wait_until(lambda: count(browser) == "Image 10 of 20")
            read_one(browser, score=6)
            wait_until(lambda: count(browser) == "Image 11 of 20")
        with served(study, port):
            browser.refresh()
            for number in range(11, 21):
                wait_until(lambda n=number: count(browser) == f"Image {n} of 20")
                read_one(browser, score=number % 6 + 1)
            wait_until(lambda: count(browser) == "20 of 20")
        assert "All images are read. Thank you." in browser.page_source
        told = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert told == []
    kept = study.readings()
    assert [each.score for each in kept] == [n % 6 + 1 if n != 10 else 6 for n in range(3, 21)]
    assert {(each.nuclei, each.architecture, each.stain, each.artefacts) for each in kept} == {
        (5, 4, 3, 2)
    }
    assert {each.type_guess for each in kept} == {"normal lung"}
    assert all(0 < each.seconds < 60 for each in kept)
    study.close()


def read_one(browser: WebDriver, *, score: int, is_practice: bool = False) -> None:
    """One image as a pathologist reads it: zoom, answer, correct a slip, save."""
    if is_practice:
        press(browser, "+", "+", Keys.ARROW_LEFT)
        level = browser.execute_script("return document.querySelector('#level').textContent")
        assert level == "225 %"
    answers = ("0", str(score), "1", Keys.BACKSPACE, "5", "4", "3", "2", "lung")
    press(browser, *answers, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER, Keys.ENTER)
    if is_practice:
        script = "return document.querySelector('#told').textContent"
        wait_until(lambda: "This image is" in str(browser.execute_script(script)))
        press(browser, Keys.ENTER)


def test_an_answer_that_cannot_be_saved_is_told_and_kept_on_the_page(tmp_path: Path) -> None:
    study = make_study(tmp_path, calibration=0)
    (reader,) = study.readers()
    script = "return document.querySelector('#told').textContent"
    with chromium(tmp_path / "profile") as browser:
        with served(study) as port:
            browser.get(link(study, port, reader))
            wait_until(lambda: count(browser) == "Image 1 of 12")
        press(browser, "4", Keys.ENTER)
        wait_until(lambda: "does not answer" in str(browser.execute_script(script)))
        with served(study, port):
            press(browser, Keys.ENTER)
            wait_until(lambda: count(browser) == "Image 2 of 12")
    assert [each.score for each in study.readings()] == [4]
    study.close()
