"""What the answers of a study mean: figures with intervals, and sentences where there is none.

First showings count towards everything but the agreement of a reader with themselves, for which
each is held against its repeat. Shape letters as in ``detection``.
"""

from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt
from statsmodels.stats.proportion import proportion_confint

from crafts_core.study.agreement import alpha, cohen, fleiss, mean_cohen
from crafts_core.study.detection import LEVEL, MEASURES, interval, mean_of
from crafts_core.study.questions import ATTRIBUTES, FIRST_SYNTHETIC, MAX_RATING, UNSURE, StudyError
from crafts_core.study.readings_table import ReadingsTable
from crafts_core.study.records import Reading
from crafts_core.study.results import (
    Figure,
    InterRater,
    IntraRater,
    OneReader,
    Rating,
    Share,
    StudyAnalysis,
    TypeGuess,
)

LEAST_ANSWERS = 5
"""Of each kind, below which a reader's figures would say nothing."""
LEAST_REPEATS = 5


def analyse(study: str, readings: Sequence[Reading], *, seed: int = 0) -> StudyAnalysis:
    """All figures of a study that may still be going on.

    Args:
        study: Its name.
        readings: Answers that stand.
        seed: Of the resamples.

    Raises:
        StudyError: nobody has read enough images of both kinds.
    """
    first = [each for each in readings if not each.is_repeat]
    enough, remarks = _readers_with_enough(first)
    table = ReadingsTable([each for each in first if each.reader in enough], seed)
    intra = _intra_rater([each for each in readings if each.reader in enough], remarks)
    kinds = table.is_synthetic
    if len(enough) < 2:
        remarks.append("agreement between readers needs two of them")
    return StudyAnalysis(
        study=study,
        seed=seed,
        num_real=int((~kinds).sum()),
        num_synthetic=int(kinds.sum()),
        mean_reader={
            name: table.figure(measure(table.counts), measure(table.resampled_counts))
            for name, measure in MEASURES.items()
        },
        readers=tuple(_one_reader(table, row) for row in range(len(table.readers))),
        intra_rater=intra,
        inter_rater=_inter_rater(table) if len(enough) > 1 else None,
        ratings=tuple(_rating(table, name) for name in ATTRIBUTES if _is_asked(table, name)),
        types=tuple(_type_guesses(table, remarks)) if _is_asked(table, "type_guess") else (),
        remarks=tuple(remarks),
    )


def _readers_with_enough(first: Sequence[Reading]) -> tuple[set[int], list[str]]:
    enough: set[int] = set()
    remarks = []
    for reader in sorted({each.reader for each in first}):
        kinds = [each.is_synthetic for each in first if each.reader == reader]
        if min(kinds.count(False), kinds.count(True)) >= LEAST_ANSWERS:
            enough.add(reader)
        else:
            remarks.append(
                f"reader {reader} is left out: {kinds.count(False)} real and {kinds.count(True)} "
                f"synthetic images read, at least {LEAST_ANSWERS} of each are needed"
            )
    if not enough:
        raise StudyError(
            f"too few answers: no reader has judged {LEAST_ANSWERS} real and {LEAST_ANSWERS} "
            f"synthetic images yet ({len(first)} answers in all); calibration does not count"
        )
    return enough, remarks


def _is_asked(table: ReadingsTable, name: str) -> bool:
    return any(getattr(each, name) is not None for each in table.readings)


def _share(right: int, number: int) -> Share:
    low, high = proportion_confint(right, number, alpha=1 - LEVEL, method="wilson")
    return Share(value=right / number, num=number, wilson=(float(low), float(high)))


def _one_reader(table: ReadingsTable, row: int) -> OneReader:
    counts_KL = table.counts[row]
    real, synthetic = counts_KL.astype(int)
    rejected = int(real[: FIRST_SYNTHETIC - 1].sum())
    hits = int(synthetic[FIRST_SYNTHETIC - 1 :].sum())

    def figure(name: str) -> Figure:
        measure = MEASURES[name]
        return Figure(
            value=float(measure(counts_KL)),
            by_image=interval(measure(table.resampled_counts[:, row])),
            by_image_and_reader=None,
        )

    reader = table.readers[row]
    return OneReader(
        reader=reader,
        num_real=int(real.sum()),
        num_synthetic=int(synthetic.sum()),
        accuracy=_share(hits + rejected, int(counts_KL.sum())),
        sensitivity=_share(hits, int(synthetic.sum())),
        specificity=_share(rejected, int(real.sum())),
        d_prime=figure("d_prime"),
        area=figure("area"),
        criterion=figure("criterion"),
        scores_real=tuple(real.tolist()),
        scores_synthetic=tuple(synthetic.tolist()),
        median_seconds=median(each.seconds for each in table.readings if each.reader == reader),
    )


def _intra_rater(readings: Sequence[Reading], remarks: list[str]) -> tuple[IntraRater, ...]:
    found = []
    for reader in sorted({each.reader for each in readings}):
        own = [each for each in readings if each.reader == reader]
        first = {each.image: each for each in own if not each.is_repeat}
        pairs = [(first[each.image], each) for each in own if each.is_repeat]
        if len(pairs) >= LEAST_REPEATS:
            found.append(_with_themselves(reader, pairs))
        else:
            remarks.append(
                f"agreement of reader {reader} with themselves needs {LEAST_REPEATS} repeated "
                f"images, got {len(pairs)}"
            )
    return tuple(found)


def _with_themselves(reader: int, pairs: Sequence[tuple[Reading, Reading]]) -> IntraRater:
    scores = [(before.score, again.score) for before, again in pairs]
    sides = [(one >= FIRST_SYNTHETIC, two >= FIRST_SYNTHETIC) for one, two in scores]

    def kappa(values: Sequence[tuple[float, float]], *, is_ordinal: bool) -> float | None:
        first, second = zip(*values, strict=True)
        return cohen(first, second, is_ordinal=is_ordinal)

    rated = [pair for pair in pairs if pair[0].nuclei is not None]
    return IntraRater(
        reader=reader,
        num_repeats=len(pairs),
        same_side=_share(sum(one == two for one, two in sides), len(sides)),
        kappa=kappa(sides, is_ordinal=False),
        kappa_score=kappa(scores, is_ordinal=True),
        kappa_ratings={
            name: kappa(
                [(getattr(one, name), getattr(two, name)) for one, two in rated], is_ordinal=True
            )
            for name in ATTRIBUTES
            if rated
        },
    )


def _inter_rater(table: ReadingsTable) -> InterRater:
    score_RI = table.scores
    side_RI = np.where(np.isnan(score_RI), np.nan, score_RI >= FIRST_SYNTHETIC)
    codes = {name: code for code, name in enumerate(_guesses(table))}
    type_RI = table.filled([(each, codes.get(each.type_guess or "")) for each in table.readings])
    return InterRater(
        cohen_mean=mean_cohen(side_RI),
        fleiss=fleiss(side_RI),
        alpha=alpha(side_RI, is_ordinal=False),
        alpha_score=alpha(score_RI, is_ordinal=True),
        alpha_ratings={
            name: alpha(table.values(name), is_ordinal=True)
            for name in ATTRIBUTES
            if _is_asked(table, name)
        },
        alpha_type=alpha(type_RI, is_ordinal=False) if codes else None,
    )


def _guesses(table: ReadingsTable) -> list[str]:
    return sorted({each.type_guess for each in table.readings if each.type_guess is not None})


def _rating(table: ReadingsTable, name: str) -> Rating:
    value_RI = table.values(name)
    ones_BI = np.ones((1, len(table.images)))
    kinds = {kind: np.where(table.is_synthetic == kind, value_RI, np.nan) for kind in (False, True)}
    weights_BI = table.resampling.images_BI
    return Rating(
        attribute=name,
        real=table.mean(kinds[False]),
        synthetic=table.mean(kinds[True]),
        difference=table.figure(
            (mean_of(kinds[True], ones_BI) - mean_of(kinds[False], ones_BI))[0],
            mean_of(kinds[True], weights_BI) - mean_of(kinds[False], weights_BI),
        ),
        shares_real=_rating_shares(kinds[False]),
        shares_synthetic=_rating_shares(kinds[True]),
    )


def _rating_shares(value_RI: npt.NDArray[np.float64]) -> tuple[float, ...]:
    given = value_RI[~np.isnan(value_RI)].astype(int)
    return tuple(float(np.mean(given == rating)) for rating in range(1, MAX_RATING + 1))


def _type_guesses(table: ReadingsTable, remarks: list[str]) -> list[TypeGuess]:
    found = []
    for is_synthetic, kind in ((False, "real"), (True, "synthetic")):
        asked = [
            each
            for each in table.readings
            if each.is_synthetic == is_synthetic and each.type is not None
        ]
        if not asked:
            remarks.append(f"no {kind} image has a known type, so no guess of it can be judged")
            continue
        right = table.filled([(each, float(each.type_guess == each.type)) for each in asked])
        unsure = table.filled([(each, float(each.type_guess == UNSURE)) for each in asked])
        found.append(
            TypeGuess(kind=kind, num=len(asked), right=table.mean(right), unsure=table.mean(unsure))
        )
    return found
