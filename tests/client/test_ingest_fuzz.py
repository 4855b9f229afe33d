"""Damaged slides: every one is read or refused in one sentence; none kills or hangs a process."""

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from support import fuzzing
from support.mutants import mutant
from support.slide_files import write_dicom_slide, write_tiffslide_only, write_tiled_tiff
from support.slides import tissue_image, write_tissue_slide

SILENCE_S = 30.0
"""A mutant takes milliseconds; the rest is for a machine that is busy elsewhere."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small file of each format."""
    folder = tmp_path_factory.mktemp("sources")
    image = tissue_image(256, margin=48)
    write_tissue_slide(folder / "aperio.svs")
    write_tiled_tiff(folder / "plain.tif", image, num_levels=2)
    write_tiffslide_only(folder / "fallback.tif", image)
    write_dicom_slide(folder / "dicom", image, num_levels=1)
    for suffix in ("png", "jpg", "bmp", "webp"):
        Image.fromarray(image).save(folder / f"image.{suffix}")
    Image.fromarray(image).save(folder / "stripped.tif", compression="tiff_lzw")
    return folder


def _run(sources: Path, work: Path, *, first: int, count: int, limit_s: float) -> Counter[str]:
    """Read mutants in a child and count how they went; a dead or silent child is a failure."""
    command = [sys.executable, fuzzing.__file__, str(sources), str(work), str(first), str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    outcomes: Counter[str] = Counter()
    line = "nothing was begun"
    end = time.monotonic() + limit_s
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, bufsize=0, env=environment
        ) as child,
    ):
        for line in _lines(child):
            if line.startswith("end"):
                outcomes[line.split(maxsplit=3)[3].strip()] += 1
            if time.monotonic() > end:
                child.kill()
                return outcomes
        errors.seek(0)
        assert child.wait() == 0, (
            f"died with {child.returncode} in: {line}\n{errors.read()[-2000:]}"
        )
    return outcomes


def _lines(child: "subprocess.Popen[bytes]") -> Iterator[str]:
    """What the child says, as long as it is not silent for long."""
    assert child.stdout is not None
    line = "nothing was begun"
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(SILENCE_S):
                child.kill()
                pytest.fail(f"hangs in: {line}")
            if not (line := child.stdout.readline().decode()):
                return
            yield line


def _assert_well(outcomes: Counter[str]) -> None:
    bad = {
        outcome: n for outcome, n in outcomes.items() if outcome.startswith(("raised", "leaked"))
    }
    assert not bad
    read = sum(n for outcome, n in outcomes.items() if outcome.startswith("read"))
    assert read > outcomes.total() / 10, "too much damage tests nothing but the front door"
    assert outcomes["refused"] > outcomes.total() / 10, "too little damage tests nothing"


@pytest.mark.slow
def test_mutants_are_read_or_refused(sources: Path, tmp_path: Path) -> None:
    outcomes = _run(sources, tmp_path, first=0, count=400, limit_s=300)
    assert outcomes.total() == 400
    _assert_well(outcomes)


@pytest.mark.exhaustive
def test_thousands_of_mutants_are_read_or_refused(sources: Path, tmp_path: Path) -> None:
    """As many as fit in a minute on the machine at hand, 4,000 on one that is idle."""
    outcomes = _run(sources, tmp_path, first=10_000, count=4000, limit_s=60)
    assert outcomes.total() >= 400
    _assert_well(outcomes)


def test_mutants_follow_from_their_seed() -> None:
    data = bytes(range(256)) * 20
    assert mutant(data, 7) == mutant(data, 7)
    assert len({mutant(data, seed) for seed in range(50)}) > 40


def test_child_that_dies_is_noticed(sources: Path, tmp_path: Path) -> None:
    """The control: a work folder that is not there ends the child at once."""
    with pytest.raises(AssertionError, match="died with 1"):
        _run(sources, tmp_path / "missing", first=0, count=1, limit_s=60)
