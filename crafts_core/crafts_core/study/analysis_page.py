"""The analysis as one HTML page that needs nothing but itself."""

from markupsafe import Markup

from crafts_core.pages import page_environment
from crafts_core.study import plots
from crafts_core.study.questions import ATTRIBUTES, MAX_RATING, SCORES
from crafts_core.study.results import Rating, StudyAnalysis
from crafts_core.study.verdict import GUESSING, MEANING, MEASURE_NAMES, number, share, span, verdict

_LIMITS = {"balanced_accuracy": (0.0, 1.0), "area": (0.0, 1.0), "d_prime": (-1.0, 3.0)}


def render_page(analysis: StudyAnalysis) -> str:
    """The page, with plots and tables."""
    environment = page_environment("crafts_core.study")
    environment.filters |= {"number": number, "span": span, "share": share}
    return environment.get_template("analysis.html.j2").render(
        analysis=analysis,
        verdict=list(verdict(analysis)),
        meaning=MEANING,
        measures=MEASURE_NAMES,
        guessing=GUESSING,
        attributes=ATTRIBUTES,
        d_prime=_readers_beside_mean(analysis, "d_prime"),
        area=_readers_beside_mean(analysis, "area"),
        roc=_roc(analysis),
        scores=_scores(analysis),
        ratings=[(each, _rating(each)) for each in analysis.ratings],
    )


def _readers_beside_mean(analysis: StudyAnalysis, name: str) -> Markup:
    dots = [
        plots.Dot(
            label=f"reader {each.reader}",
            value=getattr(each, name).value,
            interval=getattr(each, name).by_image,
        )
        for each in analysis.readers
    ]
    if len(dots) > 1:
        mean = analysis.mean_reader[name]
        dots.append(
            plots.Dot(
                label="mean reader",
                value=mean.value,
                interval=mean.by_image_and_reader,
                is_mean=True,
            )
        )
    return plots.intervals(
        dots, reference=GUESSING[name], limits=_LIMITS[name], title=MEASURE_NAMES[name]
    )


def _roc(analysis: StudyAnalysis) -> Markup:
    curves = [
        (f"reader {each.reader}", each.scores_real, each.scores_synthetic)
        for each in analysis.readers
    ]
    return plots.roc(curves, title="ROC curves of the readers")


def _scores(analysis: StudyAnalysis) -> Markup:
    real, synthetic = (
        [sum(column) for column in zip(*rows, strict=True)]
        for rows in (
            [each.scores_real for each in analysis.readers],
            [each.scores_synthetic for each in analysis.readers],
        )
    )
    return plots.paired_columns(
        [f"{score} {words.split()[0]}" for score, words in SCORES.items()],
        [count / sum(real) for count in real],
        [count / sum(synthetic) for count in synthetic],
        title="How often each score was given",
    )


def _rating(rating: Rating) -> Markup:
    return plots.paired_columns(
        [str(value) for value in range(1, MAX_RATING + 1)],
        rating.shares_real,
        rating.shares_synthetic,
        title=f"Ratings of {rating.attribute}",
    )
