from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation.fixed_point import sum_fits
from crafts_privacy.secure_aggregation.shares import MOST_OWN_NOISE
from crafts_simulations.cli import app
from crafts_simulations.errors import ScenarioError
from crafts_simulations.scenario import load_scenario, parse_scenario, shipped_scenarios
from crafts_simulations.tile_split import sizes_of
from support.scenarios import tiny_scenario, tiny_scenario_values, tiny_site

HASH = "ab" * 32
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", shipped_scenarios())
def test_every_shipped_scenario_makes_a_plan(name: str) -> None:
    plan = load_scenario(name).plan(HASH)

    assert plan.study.foundation == HASH
    expected = ["control"] if name == "control" else ["pretraining", "alignment"]
    assert [stage.name for stage in plan.stage] == expected
    assert plan.privacy.mechanism == "patient_dp"


def test_the_two_scenarios_of_the_readme_are_shipped() -> None:
    assert {"quickstart", "real-tiles"} <= set(shipped_scenarios())


@pytest.mark.parametrize("command", ["run", "plan"])
def test_help_names_every_shipped_scenario(command: str) -> None:
    told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert [name for name in shipped_scenarios() if name not in told.stdout] == []


def test_the_readme_and_the_researchers_page_name_every_shipped_scenario() -> None:
    readme, page = (
        (ROOT / name).read_text() for name in ("README.md", "docs/tutorials/researcher.md")
    )
    (row,) = (line for line in readme.splitlines() if line.startswith("| `crafts-sim` |"))
    assert [name for name in shipped_scenarios() if f"`{name}`" not in row] == []
    named = {name for name in shipped_scenarios() if f"crafts-sim run {name} " in page}
    assert named == set(shipped_scenarios()) - {"control"}  # docs/control.md has that one


def test_held_out_patients_are_other_patients_of_the_same_laboratory() -> None:
    for site in load_scenario("quickstart").site:
        training, heldout = site.hospital(), site.heldout_hospital()
        assert training.stain == heldout.stain
        assert training.cancer_mix == heldout.cancer_mix
        assert (training.name, training.seed) != (heldout.name, heldout.seed)


def changed(path: str, value: object) -> dict:
    values = tiny_scenario_values(Path("foundation"))
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("privacy.target_epsilom", 8, "privacy.target_epsilom: unknown key"),
        ("site.0.num_patients", 0, "site.0.num_patients"),
        ("site.1.name", "north", "same name"),
        ("tiles", {"num_sites": 2, "alpha": 1, "heldout_fraction": 0.2, "seed": 1}, "either"),
        ("site", [], "either"),
        ("aggregation.min_sites", 3, "only 2 sites take part"),
        ("scenario.participants", ["west"], "west, which is no site"),
        ("stage.0.lambda_drift", 1.0, "alignment only"),
        ("study.foundation", HASH, "unknown key"),
    ],
)
def test_a_wrong_value_is_named(path: str, value: object, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        parse_scenario(changed(path, value), "file")


class TestDrawnHospitals:
    def values(self, **changes: object) -> dict:
        values = tiny_scenario_values(Path("foundation"))
        del values["site"]
        return values | {"hospitals": {"num_sites": 100, "patients": [20, 400]} | changes}

    def test_three_lines_are_a_hundred_hospitals(self) -> None:
        scenario = parse_scenario(self.values(), "file")
        sizes = [site.num_patients for site in scenario.site]
        assert len(sizes) == len(set(scenario.site_names)) == 100
        assert min(sizes) >= 20
        assert max(sizes) <= 400
        assert 70 < sorted(sizes)[50] < 115, "as many below the middle of the logarithm as above"
        assert {site.mpp for site in scenario.site} == {0.25, 0.5}
        assert len({site.stain_seed for site in scenario.site}) == 100
        assert all(abs(site.slide_px * site.mpp - 256) < 1 for site in scenario.site)
        for site in scenario.site:
            assert site.hospital().cancer_mix == site.heldout_hospital().cancer_mix
            assert abs(site.declared_patients / site.num_patients - 1) < 0.05

    def test_a_small_alpha_makes_specialists(self) -> None:
        most = {
            alpha: sum(
                max(site.cancer_mix.values()) / sum(site.cancer_mix.values())
                for site in parse_scenario(self.values(alpha=alpha), "file").site
            )
            for alpha in (0.02, 1.0)
        }
        assert most[0.02] > 2 * most[1.0]

    def test_more_hospitals_leave_the_first_ones_as_they_were(self) -> None:
        few, many = (parse_scenario(self.values(num_sites=count), "file").site for count in (5, 9))
        assert few == many[:5]
        assert parse_scenario(self.values(seed=1), "file").site[0] != few[0]

    def test_it_is_written_out_for_good(self) -> None:
        scenario = parse_scenario(self.values(num_sites=4), "file")
        assert parse_scenario(scenario.model_dump(mode="json"), "again") == scenario

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"patients": [30, 20]}, "smallest site first"),
            ({"num_sites": 0}, "num_sites"),
            ({"sizes": 3}, "sizes"),
        ],
    )
    def test_a_wrong_line_is_named(self, changes: dict, says: str) -> None:
        with pytest.raises(ScenarioError, match=says):
            parse_scenario(self.values(**changes), "file")

    def test_both_ways_at_once_are_refused(self) -> None:
        values = self.values() | {"site": [tiny_site("north", "LUAD", 1)]}
        with pytest.raises(ScenarioError, match="not both"):
            parse_scenario(values, "file")


def test_an_unknown_tissue_is_named_when_the_hospital_is_made() -> None:
    scenario = parse_scenario(changed("site.0.cancer_mix", {"LUAD": 0.0}), "file")

    with pytest.raises(ScenarioError, match="site north"):
        scenario.site[0].hospital()


@pytest.mark.parametrize("text", ["[scenario", "[[site]]\nname = 3", "\x00"])
def test_a_file_that_is_no_scenario_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_text(text)

    with pytest.raises(ScenarioError, match=r"bad\.toml"):
        load_scenario(str(tmp_path / "bad.toml"))


def test_a_missing_scenario_names_the_shipped_ones() -> None:
    with pytest.raises(ScenarioError, match="quickstart"):
        load_scenario("quickstrat")


class TestOverrides:
    scenario = tiny_scenario(Path("foundation"))

    def test_epsilon(self) -> None:
        assert self.scenario.changed(epsilon=1.0).privacy.target_epsilon == 1.0

    def test_no_privacy_drops_the_promise_and_keeps_the_clip(self) -> None:
        privacy = self.scenario.changed(private=False).privacy
        assert (privacy.mechanism, privacy.target_epsilon, privacy.delta) == ("none", None, None)
        assert privacy.max_grad_norm == 1.0

    def test_epsilon_means_nothing_without_privacy(self) -> None:
        with pytest.raises(ScenarioError, match="no meaning"):
            self.scenario.changed(private=False).changed(epsilon=1.0)

    def test_fewer_sites(self) -> None:
        fewer = self.scenario.changed(num_sites=1)
        assert fewer.site_names == ("north",)
        assert fewer.aggregation.min_sites == 1

    def test_more_sites_than_there_are(self) -> None:
        with pytest.raises(ScenarioError, match="2 sites, not 3"):
            self.scenario.changed(num_sites=3)

    def test_sites_of_real_tiles(self) -> None:
        assert load_scenario("real-tiles").changed(num_sites=5).site_names[-1] == "site-5"

    def test_nothing_changed_is_the_same_scenario(self) -> None:
        assert self.scenario.changed() == self.scenario
        assert self.scenario.changed(epsilon=1.0).hash != self.scenario.hash


def test_ten_small_hospitals_take_one_step_together() -> None:
    scenario = load_scenario("many-small")
    plan = scenario.plan(HASH)
    assert (plan.privacy.trust, len(scenario.participants)) == ("distributed", 10)
    assert scenario.tiles is not None
    assert scenario.tiles.patients is not None
    sizes = sizes_of(10, *scenario.tiles.patients)
    assert (sizes[0], sizes[-1]) == (20, 100)
    assert sum_fits(
        plan.privacy.sum_grid_bits or 0,
        expected_patients=plan.privacy.sample_rate * sum(sizes),
        total_noise_multiplier=MOST_OWN_NOISE * plan_noise_multiplier(plan) * 10**0.5,
    )


def test_a_hundred_drawn_hospitals_are_shipped() -> None:
    scenario = load_scenario("hundred")
    assert len(set(scenario.participants)) == 100
    sizes = [site.num_patients for site in scenario.site]
    assert 5 <= min(sizes) < max(sizes) <= 20
    delta = scenario.privacy.delta
    assert delta is not None
    assert delta * max(site.declared_patients for site in scenario.site) < 0.1
    assert scenario.aggregation.min_sites == 80


def test_one_key_puts_the_updates_of_a_scenario_into_sums(tmp_path: Path) -> None:
    """With all the noise at each hospital, and as many local steps as before."""
    values = tiny_scenario_values(tmp_path)
    values["site"].append(tiny_site("west", "BRCA", 3))
    values["aggregation"] |= {"min_sites": 3, "secure_aggregation": True}
    scenario = parse_scenario(values, "of updates in sums")
    plan = scenario.plan(HASH)
    assert (plan.privacy.trust, plan.stage[0].local_steps) == ("site", 2)
    assert not scenario.changed(private=False).plan(HASH).aggregation.secure_aggregation


def test_without_privacy_there_are_no_sums_either() -> None:
    plan = load_scenario("many-small").changed(private=False).plan(HASH)
    assert (plan.privacy.trust, plan.aggregation.secure_aggregation) == ("site", False)
