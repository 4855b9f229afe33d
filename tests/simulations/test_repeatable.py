"""A seed repeats a simulation to the byte, and everything that it leaves says: not private."""

import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import crafts_client
from crafts_client.home import SiteHome
from crafts_client.privacy_report import privacy_report
from crafts_client.training_task import Randomness
from crafts_privacy.ledger import Ledger
from crafts_privacy.noise import GridNoise
from crafts_privacy.sampling import PoissonSampler
from crafts_simulations import run as simulation
from crafts_simulations.errors import ScenarioError
from crafts_simulations.repeatable import Draws, seeded_randomness
from crafts_simulations.report import Report
from crafts_simulations.scenario import Scenario, parse_scenario
from support.foundations import tiny_foundation
from support.scenarios import tile_source, tiles_scenario_values

run_scenario = partial(simulation.run_scenario, num_workers=0)


def drawn(draws: Draws) -> tuple[list[float], list[int], list[int]]:
    """Noise, patients and a patient's own draws, as training asks for them."""
    randomness = seeded_randomness(draws)
    patients = randomness.sampler.sample(50, 0.3).tolist()
    own = torch.randint(1000, (8,), generator=randomness.generator(1, "p")).tolist()
    noise_D = torch.zeros(8, dtype=torch.float64)
    randomness.noise.add_(noise_D, 1000.0)
    return noise_D.tolist(), patients, own


def at(seed: int, site: str, round_number: int) -> Draws:
    draws = Draws(seed, site)
    draws.begin(round_number)
    return draws


def test_seed_site_and_round_decide_every_draw() -> None:
    wanted = drawn(at(7, "north", 3))
    assert drawn(at(7, "north", 3)) == wanted
    for other in (at(8, "north", 3), at(7, "south", 3), at(7, "north", 4)):
        assert all(a != b for a, b in zip(drawn(other), wanted, strict=True))


def test_a_round_that_begins_again_draws_the_same_and_never_twice_within_it() -> None:
    draws = at(7, "north", 3)
    first, second = drawn(draws), drawn(draws)
    assert first[0] != second[0]
    assert first[1] != second[1]
    draws.begin(3)
    assert drawn(draws) == first


def test_seeded_noise_has_the_deviation_that_was_asked_for() -> None:
    noise_D = torch.zeros(20_000, dtype=torch.float64)
    seeded_randomness(Draws(1, "north")).noise.add_(noise_D, 500.0)
    assert float(noise_D.std()) == pytest.approx(500.0, rel=0.03)
    assert torch.equal(noise_D, noise_D.round())


def test_a_site_that_was_not_simulated_takes_no_seed() -> None:
    """The installed client knows no such noise; what it trains with has no seed."""
    randomness = Randomness.from_os()
    assert type(randomness.noise) is GridNoise
    assert type(randomness.sampler) is PoissonSampler
    folder = Path(crafts_client.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    assert len(sources) > 50
    known = (
        "SeededNoise",
        "RepeatableSite",
        "import crafts_simulations",
        "from crafts_simulations",
    )
    assert not [text for text in sources if any(word in text for word in known)]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Two rounds, so that a run can be interrupted between them."""
    foundation = tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")
    values = tiles_scenario_values(foundation.path)
    values["stage"][0]["rounds"] = 2
    return parse_scenario(values, "t.toml").changed(repeatable=True)


def test_real_programs_are_not_asked_to_repeat_themselves(
    scenario: Scenario, tmp_path: Path
) -> None:
    source = tile_source(tmp_path)
    with pytest.raises(ScenarioError, match="leave out --processes"):
        run_scenario(scenario, tmp_path / "out", source=source, real_processes=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_runs_leave_the_same_bytes_though_one_was_interrupted(
    scenario: Scenario, tmp_path: Path
) -> None:
    source = tile_source(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    report = run_scenario(scenario, first, source=source)
    with pytest.raises(KeyboardInterrupt):
        run_scenario(scenario, second, source=source, progress=_interrupted_after_round_1)
    run_scenario(scenario, second, source=source)
    for name in (
        "adapter.safetensors",
        "evaluation.json",
        "generator/unet/diffusion_pytorch_model.safetensors",
        "generator/README.md",
        "samples/sheet-after.png",
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    indices = [[path.name for path in sorted(out.rglob("index-*"))] for out in (first, second)]
    assert len(indices[0]) == 4  # named by their hash: pseudonyms are the same
    assert indices[0] == indices[1]
    _says_that_it_is_not_private(first, report)


@pytest.mark.exhaustive
def test_processes_killed_while_they_train_change_no_byte_and_no_charge(
    scenario: Scenario, tmp_path: Path
) -> None:
    source = tile_source(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    run_scenario(scenario, first, source=source)
    killed: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "training, round 1 at site-2" and not killed:
            killed.append(0)
            ledger = SiteHome.open(second / "sites" / "site-2").ledger_path
            threading.Thread(target=_kill_once_it_is_charged, args=(ledger, killed)).start()

    run_scenario(scenario, second, source=source, num_trainers=2, progress=progress)
    assert len(killed) == 3
    name = "adapter.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    for site in ("site-1", "site-2", "site-3"):
        ledger = SiteHome.open(second / "sites" / site).ledger_path
        assert [event.steps for event in Ledger(ledger).events("main")] == [2, 2]


def _kill_once_it_is_charged(path: Path, killed: list[int]) -> None:
    """Both processes, between a reservation of this ledger and its commit."""
    while not (path.exists() and Ledger(path).open_reservations()):
        time.sleep(0.01)
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGKILL)
        killed.append(process.pid or 0)


def _interrupted_after_round_1(what: str, done: int, total: int) -> None:
    if what.startswith("training") and done == 1:
        raise KeyboardInterrupt


def _says_that_it_is_not_private(out: Path, report: Report) -> None:
    assert report.study.repeatable
    assert "NOT PRIVATE" in (out / "report.html").read_text()
    assert "| privacy | NOT PRIVATE" in (out / "generator" / "README.md").read_text()
    told = privacy_report(SiteHome.open(out / "sites" / "site-1"))
    assert [line for line in told.unsubstantiated if line.startswith("noise: NOT PRIVATE")]
    assert {sent.noise for sent in told.transmissions} == {"SeededNoise"}
