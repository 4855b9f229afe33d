"""Charts show what they are given: dots in their places, any number of sites, text as text."""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from crafts_core import charts


def numbers(text: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_dots_lie_at_equal_distances_for_equal_steps() -> None:
    values = [("a", -1.0, (-2.0, 0.0)), ("b", 0.0, None), ("c", 1.0, (0.0, 2.0))]
    drawn = charts.dots(values, colours=[0, 1, 9], unit="u", band=(-2.0, 2.0), told="others")
    first, second, third = numbers(drawn, r'circle cx="([\d.]+)"')
    assert second - first == pytest.approx(third - second, abs=0.1)
    (left, width), (zero,) = (
        numbers(drawn, r'rect x="([\d.]+)"') + numbers(drawn, r'width="([\d.]+)" height'),
        numbers(drawn, r'path d="M([\d.]+) 2V'),
    )
    assert second == pytest.approx(zero, abs=0.1)
    assert left + width / 2 == pytest.approx(zero, abs=0.1)
    assert "var(--c9)" not in drawn, "the palette begins anew"


def test_one_value_that_is_nothing_has_a_place() -> None:
    drawn = charts.dots([("a", 0.0, None)], colours=[0], unit="u", band=None)
    assert drawn.count("<circle") == 1


def test_labels_are_letters_only() -> None:
    hostile = "</text><script>x</script>"
    drawn = charts.dots(
        [(hostile, 1.0, None)], colours=[0], unit=hostile, band=(0.0, 1.0), told=hostile
    )
    assert "<script" not in drawn


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


@pytest.mark.parametrize("count", [3, 8, 9, 100])
def test_every_bar_has_its_name_and_number_and_a_colour_says_nothing_twice(count: int) -> None:
    """On paper, too: two sites of one colour would look as if they belonged together."""
    values = [(f"site-{number}", 1 + number / 100, None) for number in range(count)]
    drawn = charts.bars(values, unit="epsilon spent", mark=1.0)
    colours = re.findall(r'fill="var\(--c(\d)\)"><title>site-', drawn)
    assert len(colours) == count
    assert len(set(colours)) == (count if count <= 8 else 1)
    labels = re.findall(r'y="([\d.]+)"[^>]*>(site-\d+|[\d.]+)</text>', drawn)
    assert {text for _, text in labels} >= {name for name, _, _ in values}
    heights = sorted({float(y) for y, _ in labels})
    assert len(heights) == count
    assert all(low - high >= 13 for high, low in pairwise(heights)), "text of 13 px"
    (height,) = numbers(drawn, r'viewBox="0 0 \d+ ([\d.]+)"')
    assert heights[-1] < height - 13
    assert height < 2000


def test_many_sites_lie_in_their_order_and_are_counted() -> None:
    drawn = picture(100)
    assert "100 sites in their order, from the bottom up" in drawn
    tops = numbers(drawn, r'<rect x="60.0" y="([\d.]+)"')
    assert len(tops) == 100
    assert tops == sorted(tops, reverse=True)
    assert len(re.findall("<title>round 2, site-", drawn)) == 100


def test_a_name_is_text() -> None:
    drawn = charts.stacked([(1, [1.0])], ["<b>&</b>"], unit="weights")
    assert "<b>" not in drawn


def test_a_timeline_steps_where_its_points_are() -> None:
    first = datetime(2026, 1, 1, tzinfo=UTC)
    points = [(first, 1.0), (first + timedelta(days=5), 3.0)]
    until = first + timedelta(days=10)
    drawn = charts.timeline([("</text><b>", points)], until=until, unit="u", mark=6.0, told="limit")
    one, two = numbers(drawn, r'circle cx="([\d.]+)"')
    (end,) = numbers(drawn, r'H([\d.]+)" fill="none" stroke="var\(--c0\)"')
    assert two - one == pytest.approx(end - two, abs=0.2), "half of the time"
    low, high = numbers(drawn, r'cy="([\d.]+)" r="3"')
    (limit,) = numbers(drawn, r'd="M60 ([\d.]+)H620" stroke="var\(--ink\)"')
    assert low - high == pytest.approx(2 / 3 * (high - limit), abs=0.2), "0 is the bottom"
    assert "<b>" not in drawn


def test_a_timeline_of_one_moment_is_drawn() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    drawn = charts.timeline([("a", [(now, 0.0)])], until=now, unit="u")
    assert "nan" not in drawn
    assert "<title>a, 2026-01-01 00:00: 0</title>" in drawn


def test_curves_are_at_their_values_and_apart_at_a_tick() -> None:
    hostile = "</text><script>x</script>"
    drawn = charts.curves(
        [
            charts.Curve("a", 1, False, [(0.0, (0.0, 0.0)), (1.0, (1.0, 1.0))]),
            charts.Curve(hostile, 2, True, [(0.5, (0.0, 1.0)), (0.5, (0.0, 1.0))]),
        ],
        ticks=["1", hostile],
        unit="u",
        mark=0.5,
        told=hostile,
    )
    bottom, top, *middles = numbers(drawn, r'circle cx="[\d.]+" cy="([\d.]+)"')
    assert middles == pytest.approx([(bottom + top) / 2] * 2, abs=0.1)
    assert numbers(drawn, r'd="M44 ([\d.]+)H')[0] == pytest.approx(middles[0], abs=0.1)
    assert len(set(numbers(drawn, r'circle cx="([\d.]+)"'))) == 4
    assert drawn.count("stroke-dasharray") == 3, "chance, the dashed curve and its legend"
    assert "<script" not in drawn
