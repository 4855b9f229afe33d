"""What a simulated study gave: measurement, accounts of the sites, sample images, report."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from pydantic import TypeAdapter

from crafts_client.home import SiteHome
from crafts_core import __version__
from crafts_core.durable import write_file
from crafts_core.evaluation.baselines import PublicPart
from crafts_core.evaluation.encoder import Images, load_encoder
from crafts_core.evaluation.evaluate import Evaluator
from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.evaluation.figures import Evaluation
from crafts_core.evaluation.leakage import (
    Leakage,
    LeakageConfig,
    measure_leakage,
)
from crafts_core.evaluation.memorisation import FEWEST_PATIENTS
from crafts_core.evaluation.nuclei_finder import NucleiFinder
from crafts_core.evaluation.real_tiles import RealTiles, read_by_content
from crafts_core.evaluation.steering import (
    Steering,
    SteeringConfig,
    measure_steering,
    steered_sheet,
    teach_finder,
)
from crafts_core.evaluation.table import markdown, remarks
from crafts_core.export import CONTROLS, add_measurement
from crafts_core.generator import Generator
from crafts_core.plan_sections import Modality
from crafts_core.pretrained import read_part
from crafts_core.progress import Progress
from crafts_core.provenance import Origin, Provenance, encode_png
from crafts_core.sampling import contact_sheet, sample_images
from crafts_core.tiles import TileStore
from crafts_privacy import accounting
from crafts_privacy.ledger import Ledger
from crafts_server.receipts import RoundReceipt
from crafts_simulations.errors import ScenarioError
from crafts_simulations.report import (
    Report,
    SamplePair,
    SiteReport,
    round_report,
    study_report,
    write_report,
)
from crafts_simulations.sites import COHORT, heldout_store
from crafts_simulations.study import LocalStudy

MAX_SAMPLE_LABELS, NUM_STEERED_SHOWN = 10, 8
_STEERINGS = TypeAdapter(tuple[Steering, ...])
_LIBRARIES = ("torch", "diffusers", "flwr", "dp-accounting", "opacus")


def evaluate(study: LocalStudy, public: PublicPart | None = None) -> Evaluation:
    """Measure once, beside what the study had of a public pool; the result is kept."""
    workspace = study.workspace
    if workspace.evaluation.exists():
        return Evaluation.model_validate_json(workspace.evaluation.read_bytes())
    config = study.scenario.evaluation
    held_out = _all_tiles(heldout_store(workspace))
    try:
        evaluator = Evaluator(
            study.foundation,
            held_out,
            config,
            load_encoder(config.encoder),
            training=_real_tiles(study),
        )
    except ValueError as error:
        raise ScenarioError(f"the test set cannot be measured: {error}") from error
    shared = Generator.from_directory(workspace.generator, device=study.foundation.device)
    evaluation = evaluator.compare(
        study.foundation.generator, shared, partial(_measuring, study.progress), public=public
    )
    add_measurement(workspace.generator, _card_section(evaluation))
    write_file(workspace.evaluation, evaluation.model_dump_json(indent=2) + "\n")
    return evaluation


def _card_section(evaluation: Evaluation) -> str:
    told = "\n".join(f"- {remark}" for remark in remarks(evaluation))
    start = "In a simulation, on tiles of patients that no site has."
    return f"{start}\n\n{markdown(evaluation)}\n\n{told}\n"


def attack(study: LocalStudy) -> Leakage | None:
    """Patients of the sites against held-out ones, once. None where there are too few of either."""
    workspace = study.workspace
    if workspace.leakage.exists():
        return Leakage.model_validate_json(workspace.leakage.read_bytes())
    stores, test = _training_stores(study), heldout_store(workspace)
    if min(test.num_patients, sum(store.num_patients for store in stores)) < FEWEST_PATIENTS:
        return None
    shared = Generator.from_directory(workspace.generator, device=study.foundation.device)
    leakage = measure_leakage(
        shared,
        study.foundation.generator,
        RealTiles.cat([_all_tiles(store) for store in stores]),
        _all_tiles(test),
        LeakageConfig(tiles_per_patient=2, num_images=64),
        partial(_measuring, study.progress),
    )
    write_file(workspace.leakage, leakage.model_dump_json(indent=2) + "\n")
    return leakage


def steering(study: LocalStudy) -> tuple[Steering, ...]:
    """How far the generator follows each condition, on held-out tiles, once, and a picture."""
    workspace = study.workspace
    pictures = [_steered_picture(study, part) for part in _controls(study)]
    if workspace.steering.exists() and all(each.is_file() for each in pictures):
        return _STEERINGS.validate_json(workspace.steering.read_bytes())
    generator = Generator.from_directory(workspace.generator, device=study.foundation.device)
    test = heldout_store(workspace)
    measured: list[Steering] = []
    for modality in _controls(study):
        study.progress(f"measuring {modality}", len(measured), len(measured) + 1)
        directory = workspace.generator / CONTROLS / modality
        network = read_part(ControlNetModel, directory, dtype=torch.float32)
        network = network.to(study.foundation.device).eval()
        finder = _finder(study) if modality == "nuclei" else None
        try:
            measured.append(measure_steering(generator, network, test, modality, finder=finder))
        except ValueError as error:
            raise ScenarioError(f"{modality} cannot be measured: {error}") from error
        few = SteeringConfig(max_tiles=NUM_STEERED_SHOWN)
        sheet = steered_sheet(generator, network, test, modality, few)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        write_file(_steered_picture(study, modality), buffer.getvalue())
    write_file(workspace.steering, _STEERINGS.dump_json(tuple(measured), indent=2))
    return tuple(measured)


def _finder(study: LocalStudy) -> NucleiFinder | None:
    """Taught by all sites' tiles, which only a simulation may pool."""
    try:
        return teach_finder(_training_stores(study))
    except NotMeasurableError:  # the evaluation's own remarks say what to install
        return None


def _controls(study: LocalStudy) -> list[Modality]:
    return [part for part in study.plan.parts if part != "generator"]


def _steered_picture(study: LocalStudy, modality: Modality) -> Path:
    study.workspace.samples.mkdir(exist_ok=True)
    return study.workspace.samples / f"steered-{modality}.png"


def _all_tiles(store: TileStore) -> RealTiles:
    return RealTiles.read(store, np.arange(store.num_tiles))


def _training_stores(study: LocalStudy) -> list[TileStore]:
    return _stores(study, study.scenario.participants)


def _real_tiles(study: LocalStudy) -> RealTiles:
    """What judges learn from: tiles of all sites, which only a simulation may pool.

    Also of sites that take no part, and the same however tiles are dealt: one hospital by itself,
    all three and the pooled tiles are measured by one ruler.
    """
    stores = _stores(study, study.scenario.site_names)
    return read_by_content(stores, study.scenario.evaluation.num_training_tiles, seed=0)


def _stores(study: LocalStudy, names: Sequence[str]) -> list[TileStore]:
    homes = [SiteHome.open(study.workspace.site(name)) for name in names]
    return [TileStore.open(home.tile_store_path) for home in homes]


def report(
    study: LocalStudy,
    receipts: Sequence[RoundReceipt],
    evaluation: Evaluation,
    leakage: Leakage | None,
    steered: tuple[Steering, ...] = (),
    *,
    num_parameters: int,
    seconds: float,
) -> Report:
    """Write ``report.json``, ``report.html`` and ``samples/``."""
    result = Report(
        created=datetime.now(UTC),
        seconds=seconds,
        versions=_versions(),
        study=study_report(
            study.scenario.scenario.title,
            study.plan,
            num_parameters,
            repeatable=study.repeatable_seed is not None,
        ),
        rounds=tuple(round_report(receipt) for receipt in receipts),
        sites=tuple(site_report(study, name) for name in study.scenario.participants),
        evaluation=evaluation,
        leakage=leakage,
        steering=steered,
    )
    steered_png = [_steered_picture(study, each.modality).read_bytes() for each in steered]
    write_report(result, _samples(study), study.workspace.path, steered_png)
    return result


def site_report(study: LocalStudy, name: str) -> SiteReport:
    """What one site spent, by its own ledger, at the delta that the plan promised."""
    home = SiteHome.open(study.workspace.site(name))
    events = Ledger(home.ledger_path).events(COHORT)
    delta = study.plan.privacy.delta
    epsilon = opinion = None
    if delta is not None:
        epsilon = accounting.epsilon(events, delta)
        opinion = accounting.epsilon_second_opinion(events, delta).epsilon
    return SiteReport(
        name=name,
        declared_patients=home.config.declared_patients,
        tiles=TileStore.open(home.tile_store_path).num_tiles,
        epsilon=epsilon,
        epsilon_second_opinion=opinion,
        delta=delta,
        events=len(events),
        steps=sum(event.steps for event in events),
        noise_multiplier=min((event.noise_multiplier for event in events), default=0.0),
    )


def _samples(study: LocalStudy) -> list[SamplePair]:
    """One caption per label of the test set, drawn by both generators."""
    captions = _caption_of_label(heldout_store(study.workspace))
    labels, prompts = list(captions), list(captions.values())
    shared = Generator.from_directory(study.workspace.generator, device=study.foundation.device)
    before = _draw(study, study.foundation.generator, prompts)
    after = _draw(study, shared, prompts)
    shown = (
        _write_images(study, labels, prompts, "before", before),
        _write_images(study, labels, prompts, "after", after),
    )
    return [
        SamplePair(label=label, prompt=prompt, before=first, after=second)
        for label, prompt, first, second in zip(labels, prompts, *shown, strict=True)
    ]


def _caption_of_label(store: TileStore) -> dict[str, str]:
    """Each label with the first of its captions by name; the first labels by name."""
    captions: dict[str, str] = {}
    ids = store.caption_ids(np.arange(store.num_tiles))
    for label, caption_id in zip(store.labels, ids, strict=True):
        caption = store.captions[caption_id]
        name = str(label) or caption
        captions[name] = min(captions.get(name, caption), caption)
    return {label: captions[label] for label in sorted(captions)[:MAX_SAMPLE_LABELS]}


def _draw(study: LocalStudy, generator: Generator, prompts: Sequence[str]) -> Images:
    """The same seeds for every generator."""
    settings = study.scenario.evaluation
    return sample_images(
        generator,
        prompts,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
    )


def _write_images(
    study: LocalStudy, labels: Sequence[str], prompts: Sequence[str], when: str, images: Images
) -> list[bytes]:
    """One PNG per label, and all of them on one sheet; what was written of each label."""
    settings = study.scenario.evaluation
    manifest = study.foundation.manifest
    drawn = Provenance(
        origin=Origin(
            generator=f"{study.plan.study.name}, {when} training",
            foundation=manifest.name,
            foundation_hash=manifest.hash,
            study=study.plan.study.name,
            plan_hash=study.plan.hash,
        ),
        seed=settings.seed,
        scheduler="ddim",
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    folder = study.workspace.samples
    folder.mkdir(exist_ok=True)
    written = []
    for index, (label, image) in enumerate(zip(labels, images, strict=True)):
        said = drawn.of_image(prompts[index], index=index)
        written.append(encode_png(Image.fromarray(image), said))
        (folder / f"{_file_name(label)}-{when}.png").write_bytes(written[-1])
    sheet = contact_sheet(images, columns=5)
    (folder / f"sheet-{when}.png").write_bytes(encode_png(sheet, drawn.of_sheet(prompts)))
    return written


def _file_name(label: str) -> str:
    """Letters, digits and dashes only."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in label.lower())
    return plain[:60]


def _versions() -> dict[str, str]:
    """This project and what it stands on."""
    libraries = {name: metadata.version(name) for name in _LIBRARIES}
    return {"crafts-federated": __version__, **libraries}


def _measuring(progress: Progress, what: str, done: int, total: int) -> None:
    progress(f"measuring {what}", done, total)
