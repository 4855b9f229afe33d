"""``crafts study``."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from click.testing import Result
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.installing import how_to_install
from crafts_core.study.study_file import StudyFile
from support.reader_studies import make_study, read_on, write_real, write_synthetic


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["study", *map(str, words)])


@pytest.fixture
def folders(tmp_path: Path) -> list[object]:
    return [
        "--real", write_real(tmp_path / "real", 12),
        "--synthetic", write_synthetic(tmp_path / "synthetic", 12),
    ]  # fmt: skip


def test_a_study_is_made_read_exported_and_analysed(tmp_path: Path, folders: list[object]) -> None:
    path = tmp_path / "s.db"
    made = run("create", path, *folders, "--num", 8, "--readers", 2, "--repeats", 0.5,
               "--calibration", 3, "--no-ratings", "--name", "Colon")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "8 real and 8 synthetic images, 3 to practise on" in made.stdout
    study = StudyFile.open(path)
    for reader in study.readers():
        assert f"reader {reader.number}: code {reader.code}" in made.stdout
        total = study.position(reader).total
        assert total > 19
        read_on(study, reader, [1 + place % 6 for place in range(total)])
    study.close()
    told = run("export", path, "--out", tmp_path / "a.csv")
    assert told.exit_code == 0, told.output
    with (tmp_path / "a.csv").open(newline="") as stored:
        rows = list(csv.DictReader(stored))
    assert len(rows) == 2 * (total - 3)
    assert {row["is_synthetic"] for row in rows} == {"True", "False"}
    found = run("analyse", path, "--page", tmp_path / "page.html", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["num_real"] == 8
    assert "<h1>Colon</h1>" in (tmp_path / "page.html").read_text()
    assert "Colon: 8 real and 8 synthetic images, 2 readers" in run("analyse", path).stdout


def test_one_folder_is_not_both_kinds(tmp_path: Path) -> None:
    """Readers could then tell nothing apart, which would flatter any generator."""
    real = write_real(tmp_path / "real", 12)
    for synthetic in (real, real.parent):
        made = run("create", tmp_path / "s.db", "--real", real, "--synthetic", synthetic)
        assert (made.exit_code, "hold the same images" in made.stderr) == (1, True)


def test_too_few_answers_end_with_one_line(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    result = run("analyse", tmp_path / "study.db")
    assert result.exit_code == 1
    assert result.stderr.startswith("crafts: too few answers: ")
    assert result.stderr.count("\n") == 1


def test_a_study_with_answers_is_not_written_over(tmp_path: Path, folders: list[object]) -> None:
    (tmp_path / "s.db").write_bytes(b"answers")
    result = run("create", tmp_path / "s.db", *folders, "--num", 5)
    assert result.exit_code == 1
    assert "may hold answers" in result.stderr
    assert (tmp_path / "s.db").read_bytes() == b"answers"


@pytest.mark.parametrize("words", [("export", "--out"), ("analyse", "--page")])
def test_no_result_is_written_over_the_answers(tmp_path: Path, words: tuple[str, str]) -> None:
    study = make_study(tmp_path)
    (reader,) = study.readers()
    read_on(study, reader, [1 + place % 6 for place in range(study.position(reader).total)])
    study.close()
    path = tmp_path / "study.db"
    before = path.read_bytes()
    (tmp_path / "link.db").symlink_to(path)
    for out in (path, tmp_path / "link.db"):
        result = run(words[0], path, words[1], out)
        assert result.exit_code == 1
        assert "is the study itself" in result.stderr
    assert path.read_bytes() == before


def test_exported_truth_is_its_owners_alone(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    assert run("export", tmp_path / "study.db", "--out", tmp_path / "a.csv").exit_code == 0
    assert (tmp_path / "a.csv").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_exported_name_is_a_formula(tmp_path: Path, name: str) -> None:
    """A spreadsheet would run it. Names without one, and numbers, are as they were."""
    (tmp_path / "real").mkdir()
    write_real(tmp_path / "real" / name, 6)
    write_synthetic(tmp_path / "synthetic", 6)
    study = make_study(tmp_path, per_kind=5, calibration=0)
    read_on(study, study.readers()[0], [3] * 10)
    study.close()
    assert run("export", tmp_path / "study.db", "--out", tmp_path / "a.csv").exit_code == 0
    with (tmp_path / "a.csv").open(newline="") as stored:
        rows = list(csv.DictReader(stored))
    told = {row["source"] for row in rows if row["is_synthetic"] == "False"}
    assert all(source.startswith(f"'{name}/") for source in told)
    assert all(row["source"].startswith("tile-") for row in rows if row["is_synthetic"] == "True")
    assert {row["score"] for row in rows} == {"3"}


def test_images_that_look_alike_are_told_at_creation(tmp_path: Path, folders: list[object]) -> None:
    from PIL import Image

    with Image.open(tmp_path / "synthetic/tile-0000.png") as image:
        image.rotate(90).save(tmp_path / "real/COAD/doe-0.png")
    result = run("create", tmp_path / "s.db", *folders, "--num", 12, "--calibration", 0)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "look alike" in line]
    assert re.search(
        r"alike: (COAD/doe-0.png|tile-0000.png) and (COAD/doe-0|tile-0000)\.png;", line
    )


def test_what_may_unblind_is_told_on_stderr(tmp_path: Path, folders: list[object]) -> None:
    from PIL import Image

    for path in list((tmp_path / "real").rglob("*.png")):
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_suffix(".jpg"), quality=100)
        path.unlink()
    result = run("create", tmp_path / "s.db", *folders, "--num", 5, "--calibration", 0)
    assert result.exit_code == 0, result.output
    assert "crafts: real images are JPEG, synthetic ones PNG" in result.stderr


@pytest.mark.slow
@pytest.mark.network
def test_a_served_study_goes_on_after_a_kill_at_the_same_link(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    (reader,) = study.readers()
    port = "0"
    for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0)):
        words = ["-m", "crafts_core", "study", "serve", str(tmp_path / "study.db"), "--port", port]
        environment = {"PYTHONPATH": ":".join(sys.path)}
        with subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True
        ) as served:
            try:
                assert served.stdout is not None
                served.stdout.readline()
                told, link = served.stdout.readline().rsplit(" ", 1)
                done = study.position(reader).done
                assert told == f"reader 1 ({done} of 14 read):"
                port = link.split("/")[2].split(":")[1]
                with urlopen(link.strip(), timeout=30) as page:
                    assert f"Image {done + 1} of 14" in page.read().decode()
                read_on(study, reader, [4])
                served.send_signal(end)
                assert served.wait(30) == code
            finally:
                served.kill()
    assert study.position(reader).done == 2
    study.close()


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    make_study(tmp_path).close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", tmp_path / "study.db", "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "is the study served already? Otherwise give another --port" in result.stderr


@pytest.mark.parametrize(
    ("words", "library", "module"),
    [
        (["serve"], "fastapi", "reading_app"),
        (["analyse"], "statsmodels", "agreement"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], library: str, module: str
) -> None:
    make_study(tmp_path).close()
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    for name in (module, "serving", "analysis"):
        monkeypatch.delitem(sys.modules, f"crafts_core.study.{name}", raising=False)
    result = run(*words, tmp_path / "study.db")
    assert result.exit_code == 1
    assert f"{library} is not installed" in result.stderr or f"{library}." in result.stderr
    assert f"run: {how_to_install('study')}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_making_a_study_imports_nothing_heavy(tmp_path: Path, folders: list[object]) -> None:
    words = ["study", "create", tmp_path / "s.db", *folders, "--num", "5"]
    program = (
        "import sys\nfrom crafts_core.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'fastapi', 'statsmodels', 'sklearn', 'pandas', 'scipy'}\n"
        "sys.exit(sorted(heavy & sys.modules.keys()) and 'heavy' or 0)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], env=environment)
    assert done.returncode == 0


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path, folders: list[object]) -> None:
    for path in (tmp_path / "real").iterdir():
        path.rename(path.with_name(os.fsdecode(path.stem.encode() + b"\xe9.png")))
    result = run("create", tmp_path / "s.study", *folders, "--num", 8)
    assert result.exit_code == 1, result.stderr
    assert "is no UTF-8 text; rename it" in result.stderr
