"""Charts fit any number of sites."""

import re

import pytest

from crafts_core import charts


def picture(num_sites: int) -> str:
    shares = [1 / num_sites] * num_sites
    names = [f"site-{number}" for number in range(num_sites)]
    return charts.stacked([(1, shares), (2, shares)], names, unit="weights")


@pytest.mark.parametrize("num_sites", [1, 3, 4, 5, 10, 24])
def test_every_site_is_in_the_legend_and_inside_the_picture(num_sites: int) -> None:
    drawn = picture(num_sites)
    found = re.search(r'viewBox="0 0 (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)"', drawn)
    assert found is not None
    width, height = map(float, found.groups())
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>(site-\d+)<', drawn)
    assert {name for _, _, name in places} == {f"site-{n}" for n in range(num_sites)}
    assert all(float(x) < width - 60 and float(y) < height for x, y, _ in places)
    assert len(set(places)) == num_sites


@pytest.mark.parametrize("num_sites", [10, 30, 100])
def test_no_two_sites_of_a_study_share_a_colour(num_sites: int) -> None:
    drawn = picture(num_sites)
    bars = re.findall(r'fill="([^"]+)"><title>round 1, (site-\d+)', drawn)
    assert len(bars) == num_sites
    assert len({colour for colour, _ in bars}) == num_sites


def test_many_sites_are_named_on_hover_and_counted() -> None:
    drawn = picture(100)
    assert "100 sites, named on hover" in drawn
    assert len(re.findall("<title>round 2, site-", drawn)) == 100


def test_a_name_is_text() -> None:
    drawn = charts.stacked([(1, [1.0])], ["<b>&</b>"], unit="weights")
    assert "<b>" not in drawn
