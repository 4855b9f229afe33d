"""Small reader studies: two folders of images that say what they are, and readers who answer."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from crafts_core.provenance import Origin, Provenance, encode_png
from crafts_core.study.creation import StudyConfig, create_study
from crafts_core.study.questions import Answer, Questions
from crafts_core.study.records import Reader, Reading
from crafts_core.study.study_file import StudyFile

ALL_QUESTIONS = Questions(ratings=True, types=True)
ONLY_SIDES = Questions(ratings=False, types=False)
TYPES = {"COAD": "H&E, colon adenocarcinoma, colon", "normal lung": "H&E, normal lung"}


def write_synthetic(folder: Path, num: int, *, px: int = 24) -> Path:
    """As ``crafts sample`` writes them: flat names, provenance in each file, a contact sheet."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    said = Provenance(
        origin=Origin(generator="g"), scheduler="unipc", num_inference_steps=2, guidance_scale=1.0
    )
    captions = list(TYPES.values())
    for index in range(num):
        pixels = rng.integers(0, 256, (px, px, 3), dtype=np.uint8)
        prompt = f"{captions[index % 2]}, necrosis"
        png = encode_png(Image.fromarray(pixels), said.of_image(prompt, index=index))
        (folder / f"tile-{index:04d}.png").write_bytes(png)
    sheet = Image.fromarray(np.zeros((2 * px, 3 * px, 3), np.uint8))
    (folder / "sheet.png").write_bytes(encode_png(sheet, said.of_sheet(captions)))
    return folder


def write_real(folder: Path, num: int, *, px: int = 24) -> Path:
    """A folder for each type; smooth tissue, and files that name their patient."""
    rng = np.random.default_rng(2)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for index in range(num):
        name = ("COAD", "normal-lung")[index % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.full((px, px, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        chunks = PngInfo()
        chunks.add_text("Patient", "Doe, Jane")
        Image.fromarray(pixels).save(
            folder / name / f"doe-{index}.png", pnginfo=chunks, dpi=(300, 300), icc_profile=profile
        )
    return folder


def make_study(
    folder: Path,
    *,
    per_kind: int = 6,
    calibration: int = 2,
    repeats: float = 0.0,
    readers: int = 1,
    questions: Questions = ONLY_SIDES,
    seed: int = 0,
) -> StudyFile:
    """A study of random and flat images."""
    if not (folder / "real").exists():
        write_real(folder / "real", per_kind + calibration)
        write_synthetic(folder / "synthetic", per_kind + calibration)
    config = StudyConfig(
        name="Two kinds",
        per_kind=per_kind,
        calibration=calibration,
        repeats=repeats,
        readers=readers,
        questions=questions,
        seed=seed,
        fit=None,
    )
    return create_study(folder / "study.db", folder / "synthetic", folder / "real", config)


def some_answer(trial: str, questions: Questions, score: int = 2) -> Answer:
    """One that answers what is asked."""
    ratings = {"nuclei": 3, "architecture": 4, "stain": 5, "artefacts": 2}
    return Answer(
        trial=trial,
        score=score,
        seconds=1.5,
        type_guess="COAD" if questions.types else None,
        **(ratings if questions.ratings else {}),
    )


def read_on(study: StudyFile, reader: Reader, scores: Sequence[int]) -> None:
    """Answer the next images with these scores."""
    for score in scores:
        trial = study.position(reader).trial
        assert trial is not None
        study.record(reader, some_answer(trial, study.info.questions, score))


def reading(
    reader: int, image: int, score: int, *, is_synthetic: bool, **values: object
) -> Reading:
    """One answer, beside the truth."""
    known: dict[str, object] = {
        "place": image, "source": f"{image}.png", "type": None, "is_repeat": False,
        "nuclei": None, "architecture": None, "stain": None, "artefacts": None,
        "type_guess": None, "seconds": 2.0, "answered_at": datetime(2026, 11, 28),
    }  # fmt: skip
    return Reading(
        reader=reader, image=image, score=score, is_synthetic=is_synthetic, **(known | values)
    )  # type: ignore[arg-type]
