"""Public procedural histology: tissue that looks like H&E and belongs to no patient.

A region is drawn in micrometres, in four steps: a *layout* says where epithelium, stroma and empty
space are; *cells* are scattered over it; both become density maps of hematoxylin and eosin; and the
Beer-Lambert law turns densities into the colours of one laboratory's stain and scanner.

Maps have shape (H, W); point lists (N, 2) hold x, y in micrometres.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from crafts_core.vocabulary import TissueAttributes

Map = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]
TUMOUR, STROMAL, LYMPHOCYTE = 0, 1, 2
EOSINOPHILIC = 1.0
"""Cytoplasm density from which a tissue counts as eosinophilic."""
RED_CELL_DENSITY = np.array([0.12, 0.85, 0.55])
MELANIN_DENSITY = np.array([0.5, 0.75, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stain:
    """One laboratory: stain vectors and strengths, and what its scanner does."""

    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    """Unit optical density per RGB channel."""
    hematoxylin_strength: float
    eosin_strength: float
    white: tuple[float, float, float]
    """Light through empty glass, in [0, 1]."""
    blur_um: float
    noise: float


def random_stain(rng: np.random.Generator) -> Stain:
    """A laboratory drawn from a range much broader than one hospital's."""

    def vector(mean: tuple[float, float, float], spread: float) -> tuple[float, float, float]:
        values = np.array(mean) * np.exp(spread * rng.standard_normal(3))
        red, green, blue = (float(v) for v in values / np.linalg.norm(values))
        return red, green, blue

    hematoxylin, eosin = vector((0.68, 0.68, 0.28), 0.13), vector((0.10, 0.93, 0.30), 0.16)
    strengths = rng.uniform(0.85, 1.7), rng.uniform(0.5, 1.25)
    tint = np.array([0.95, 0.94, 0.95]) + rng.normal(0, 0.025, 3) - rng.uniform(0, 0.06)
    red, green, blue = (float(v) for v in np.clip(tint, 0.0, 1.0))
    return Stain(
        hematoxylin=hematoxylin,
        eosin=eosin,
        hematoxylin_strength=float(strengths[0]),
        eosin_strength=float(strengths[1]),
        white=(red, green, blue),
        blur_um=float(rng.uniform(0.2, 0.6)),
        noise=float(rng.uniform(0.004, 0.014)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phenotype:
    """How one tissue is drawn. Lengths in micrometres, the rest in [0, 1] or density."""

    layout: str
    unit_um: float = 62.0
    """Spacing of glands, nests, cords or air spaces."""
    epithelium_um: float = 14.0
    nucleus_um: float = 7.0
    cell_um: float = 9.0
    pleomorphism: float = 0.1
    elongation: float = 0.2
    chromatin: float = 1.0
    vesicular: float = 0.0
    nucleoli: float = 0.0
    cytoplasm: float = 0.55
    basophilia: float = 0.12
    clearing: float = 0.0
    membrane: float = 0.0
    stroma: float = 0.45
    stroma_density: float = 0.5
    stroma_cell_um: float = 17.0
    irregularity: float = 0.5
    lymphocytes: float = 0.12
    blood: float = 0.15
    colloid: float = 0.0
    goblet: float = 0.0
    petals: bool = False
    """Goblet vacuoles fill each crypt as the petals of a rosette."""
    keratin: float = 0.0
    necrosis: float = 0.0
    pigment: float = 0.0


_BASES: dict[str, Phenotype] = {
    "glands": Phenotype(
        layout="glands", unit_um=72, epithelium_um=15, elongation=0.9, chromatin=1.1
    ),
    "crypts": Phenotype(
        layout="glands", unit_um=60, epithelium_um=24, elongation=0.5, irregularity=0.1, petals=True
    ),
    "follicles": Phenotype(layout="glands", unit_um=56, epithelium_um=9, vesicular=0.5),
    "papillae": Phenotype(layout="papillae", elongation=0.35),
    "nests": Phenotype(layout="nests"),
    "squamous": Phenotype(layout="nests", unit_um=95, cytoplasm=0.7, membrane=0.12),
    "sheets": Phenotype(layout="sheets", vesicular=0.3),
    "cords": Phenotype(layout="cords", unit_um=24),
    "trabeculae": Phenotype(layout="trabeculae", unit_um=32),
    "spindle": Phenotype(layout="spindle", elongation=2.2, cytoplasm=0.6),
    "fibrillar": Phenotype(layout="fibrillar", elongation=0.5, stroma_density=0.42),
    "alveoli": Phenotype(layout="alveoli", unit_um=58, stroma_cell_um=9, stroma_density=0.45),
}
_GRADES = {"low": (6.2, 0.08, 1.0), "intermediate": (7.3, 0.17, 1.1), "high": (8.8, 0.32, 1.2)}
_STROMA = {"scant": 0.1, "moderate": 0.45, "abundant": 0.85}
_GLIAL_SPACING_UM = {"low": 15.0, "intermediate": 12.0, "high": 9.5}


def phenotype(attributes: TissueAttributes) -> Phenotype:
    """What a caption's attributes mean in micrometres and densities."""
    base = _BASES[attributes.growth_pattern]
    nucleus_um, pleomorphism, chromatin = _GRADES[attributes.nuclear_grade]
    roomy = attributes.growth_pattern in ("nests", "squamous", "sheets")
    shown = set(attributes.features)
    eosinophilic, clear = "eosinophilic cytoplasm" in shown, "clear cytoplasm" in shown
    loose = attributes.growth_pattern == "spindle" and attributes.stroma == "abundant"
    cell_um = nucleus_um * 1.32 + (0.9 if roomy else 0.0)
    cell_um *= (1.3 if clear else 1.0) * (1.22 if eosinophilic else 1.0) * (1.35 if loose else 1.0)
    glial = attributes.growth_pattern == "fibrillar"
    return replace(
        base,
        nucleus_um=nucleus_um,
        pleomorphism=pleomorphism,
        chromatin=base.chromatin * chromatin,
        cell_um=cell_um,
        stroma=_STROMA[attributes.stroma],
        stroma_cell_um=(
            _GLIAL_SPACING_UM[attributes.nuclear_grade] if glial else base.stroma_cell_um
        ),
        stroma_density=base.stroma_density * (0.45 if "myxoid stroma" in shown else 1.0),
        clearing=0.95 if clear else 0.0,
        cytoplasm=EOSINOPHILIC if eosinophilic else base.cytoplasm,
        basophilia=0.02 if eosinophilic else base.basophilia,
        membrane=base.membrane + (0.15 if eosinophilic else 0.0),
        vesicular=0.6 if "prominent nucleoli" in shown else base.vesicular,
        nucleoli=1.0 if "prominent nucleoli" in shown else 0.0,
        goblet=0.85 if "goblet cells" in shown else 0.0,
        colloid=0.55 if "colloid" in shown else 0.0,
        keratin=1.0 if "keratin pearls" in shown else 0.0,
        necrosis=0.7 if "necrosis" in shown else 0.0,
        pigment=0.9 if "pigment" in shown else 0.0,
        lymphocytes=0.95 if "many lymphocytes" in shown else base.lymphocytes,
        blood=0.9 if "red blood cells" in shown else base.blood,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRegion:
    """Pixels (uint8, H x W x 3) and the nucleus each pixel belongs to (int32, 0 is none)."""

    image: npt.NDArray[np.uint8]
    instances: npt.NDArray[np.int32]


def render_region(
    rng: np.random.Generator,
    *,
    width_px: int,
    height_px: int,
    mpp: float,
    phenotype: Phenotype,
    stain: Stain,
) -> RenderedRegion:
    """Draw one region of one tissue under one stain.

    Raises:
        ValueError: the region has no pixels or no resolution.
    """
    if min(width_px, height_px) < 1 or not mpp > 0:
        raise ValueError(f"expected positive size and mpp, got {width_px}x{height_px} at {mpp}")
    canvas = _Canvas(rng, height_px, width_px, mpp)
    layout = _LAYOUTS[phenotype.layout](canvas, phenotype)
    necrosis = _necrosis(canvas, phenotype)
    cells = _scatter(canvas, phenotype, layout, necrosis)
    nuclei = _draw_nuclei(canvas, phenotype, cells, necrosis)
    density = _densities(canvas, phenotype, layout, nuclei, necrosis)
    return RenderedRegion(image=_expose(rng, density, stain, mpp), instances=nuclei.instances)


class _Canvas:
    """Pixel positions in micrometres, and noise with a length in micrometres."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, mpp: float) -> None:
        self.rng, self.mpp = rng, mpp
        self.height, self.width = height, width
        self.y, self.x = (np.mgrid[0:height, 0:width] * mpp).astype(np.float64)
        self.pixels = np.stack([self.x.ravel(), self.y.ravel()], axis=1)
        self.tilt = float(rng.uniform(0, np.pi))
        self.flow = self.tilt + 0.5 * self.noise(40)

    def noise(self, length_um: float) -> Map:
        """Smooth noise of zero mean and unit variance."""
        sigma = length_um / self.mpp
        stride = max(1, int(sigma / 2))
        coarse = self.rng.standard_normal((self.height // stride + 6, self.width // stride + 6))
        coarse = ndimage.gaussian_filter(coarse, max(0.6, sigma / stride), mode="wrap")
        fine = ndimage.zoom(coarse, stride, order=1) if stride > 1 else coarse
        fine = fine[: self.height, : self.width]
        result: Map = (fine - fine.mean()) / (fine.std() + 1e-9)
        return result

    def scattered(self, step_um: float, jitter: float = 0.35) -> Points:
        """A jittered hexagonal grid that covers the canvas and a margin."""
        ys, xs = np.mgrid[
            -step_um : self.height * self.mpp + step_um : step_um,
            -step_um : self.width * self.mpp + step_um : step_um,
        ]
        xs = xs + (np.arange(len(xs)) % 2)[:, None] * step_um / 2
        points = np.stack([xs.ravel(), ys.ravel()], axis=1)
        return points + self.rng.uniform(-jitter, jitter, points.shape) * step_um

    def at(self, values: Map, points: Points) -> npt.NDArray[np.float64]:
        """The map's value under each point (the border's value outside)."""
        columns = np.clip((points[:, 0] / self.mpp).astype(int), 0, self.width - 1)
        rows = np.clip((points[:, 1] / self.mpp).astype(int), 0, self.height - 1)
        under: npt.NDArray[np.float64] = values[rows, columns]
        return under

    def nearest(self, points: Points) -> tuple[Map, npt.NDArray[np.int64]]:
        """Distance in micrometres to the nearest point, and which one it is."""
        distance, index = cKDTree(points).query(self.pixels)
        shape = self.height, self.width
        return distance.reshape(shape), index.reshape(shape)

    def gap(self, points: Points) -> Map:
        """Distance to the border between the two nearest points' territories."""
        distance, _ = cKDTree(points).query(self.pixels, k=2)
        result: Map = (distance[:, 1] - distance[:, 0]).reshape(self.height, self.width) / 2
        return result

    @property
    def across(self) -> Map:
        """Distance across the canvas's main direction, a straight ramp."""
        ramp: Map = -self.x * np.sin(self.tilt) + self.y * np.cos(self.tilt)
        return ramp


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where what is; each map in [0, 1], together 1. ``depth`` runs from 0 (base) to 1 (lumen)."""

    epithelium: Map
    stroma: Map
    lumen: Map
    depth: Map | None = None
    axis: Map | None = None
    """Direction of the long axis of epithelial nuclei, where they have one."""
    basal: Points | None = None
    """Where epithelial nuclei stand, if the layout places them itself."""
    petals: Map | None = None
    """Goblet vacuoles, if the layout places them itself."""


def _step(distance: Map, softness: float = 1.5) -> Map:
    """0 below, 1 above zero, with an edge of about ``softness``."""
    result: Map = 1.0 / (1.0 + np.exp(-np.clip(distance / softness, -30, 30)))
    return result


def _glands(canvas: _Canvas, look: Phenotype) -> _Layout:
    centres = canvas.scattered(look.unit_um, 0.22)
    distance, index = canvas.nearest(centres)
    radii = look.unit_um * canvas.rng.uniform(0.36, 0.5, len(centres)) * (1 - 0.25 * look.stroma)
    wobble = 0.10 * canvas.noise(14) + 0.08 * canvas.noise(7) * look.irregularity
    outer = radii[index] * (1 + wobble)
    inner = np.maximum(outer - look.epithelium_um, 0.12 * outer)
    body, lumen = _step(outer - distance), _step(inner - distance)
    depth = (outer - distance) / np.maximum(outer - inner, 1.0)
    angle = np.arctan2(canvas.y - centres[index, 1], canvas.x - centres[index, 0])
    return _Layout(
        epithelium=body * (1 - lumen),
        stroma=1 - body,
        lumen=lumen,
        depth=depth,
        axis=angle,
        basal=_basal_row(canvas, look, centres, radii, wobble),
        petals=_petals(canvas, look, radii, index, angle, depth) if look.petals else None,
    )


def _basal_row(
    canvas: _Canvas, look: Phenotype, centres: Points, radii: npt.NDArray[np.float64], wobble: Map
) -> Points:
    """Nuclei side by side along each gland's wall, stratified where the tissue is irregular."""
    row = radii - 0.62 * look.nucleus_um * np.sqrt(1 + look.elongation)
    counts = np.maximum((2 * np.pi * row / (0.95 * look.nucleus_um)).astype(int), 3)
    gland = np.repeat(np.arange(len(centres)), counts)
    turn = np.arange(len(gland)) - np.repeat(np.cumsum(counts) - counts, counts)
    angle = 2 * np.pi * (turn + canvas.rng.uniform(-0.22, 0.22, len(gland))) / counts[gland]
    lift = look.irregularity * look.nucleus_um * canvas.rng.uniform(-0.05, 0.85, len(gland))
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    straight = centres[gland] + row[gland, None] * ray
    distance = row[gland] + radii[gland] * canvas.at(wobble, straight) - lift
    points = centres[gland] + np.maximum(distance, 2.0)[:, None] * ray
    owner = cKDTree(centres).query(points)[1]
    own: Points = points[owner == gland]
    return own


def _petals(
    canvas: _Canvas,
    look: Phenotype,
    radii: npt.NDArray[np.float64],
    index: npt.NDArray[np.int64],
    angle: Map,
    depth: Map,
) -> Map:
    """Pale drops between thin walls, narrow at the base and wide towards the lumen."""
    count = np.maximum(np.round(2 * np.pi * radii * 0.5 / 8.0), 4)
    phase = canvas.rng.uniform(0, 2 * np.pi, len(radii))
    sector = (angle + np.pi) / (2 * np.pi) * count[index] + phase[index] + 0.12 * canvas.noise(6)
    cell = np.floor(sector).astype(np.int64)
    draw = canvas.rng.random((len(radii), int(count.max()) * 2 + 9))
    chosen = draw[index, cell % draw.shape[1]]
    across = (sector - cell - 0.5) / 0.40
    along = (depth - (0.62 + 0.12 * chosen)) / 0.36
    drop = 1 - np.sqrt(across**2 + along**2)
    result: Map = _step(drop * 4, 0.6) * (chosen < look.goblet)
    return result


def _papillae(canvas: _Canvas, look: Phenotype) -> _Layout:
    ridge = np.abs(canvas.noise(22))
    core_width = 0.1 + 0.3 * look.stroma
    core, outer = _step((core_width - ridge) * 21), _step((core_width + 0.75 - ridge) * 21)
    dy, dx = np.gradient(ridge) if min(ridge.shape) > 1 else (ridge, ridge)
    return _Layout(
        epithelium=outer * (1 - core),
        stroma=core * outer,
        lumen=1 - outer,
        axis=np.arctan2(dy, dx),
    )


def _nests(canvas: _Canvas, look: Phenotype) -> _Layout:
    gap = canvas.gap(canvas.scattered(look.unit_um, 0.3))
    gap = gap * (1 + 0.15 * canvas.noise(12)) + 2 * canvas.noise(10)
    inside = _step(gap - (1.2 + 7.5 * look.stroma))
    return _Layout(epithelium=inside, stroma=1 - inside, lumen=np.zeros_like(inside))


def _cords(canvas: _Canvas, look: Phenotype) -> _Layout:
    wave = np.sin(2 * np.pi * (canvas.across + 9 * canvas.noise(26)) / look.unit_um)
    inside = _step((wave - (0.1 + 0.5 * look.stroma)) * 9)
    return _Layout(epithelium=inside, stroma=1 - inside, lumen=np.zeros_like(inside))


def _trabeculae(canvas: _Canvas, look: Phenotype) -> _Layout:
    wave = np.sin(2 * np.pi * (canvas.across + 7 * canvas.noise(30)) / look.unit_um)
    inside = _step((wave + 0.55) * 9)
    fibrous = _step((canvas.noise(30) - 1.6 + 2.4 * look.stroma) * 4)
    return _Layout(
        epithelium=inside, stroma=(1 - inside) * fibrous, lumen=(1 - inside) * (1 - fibrous)
    )


def _alveoli(canvas: _Canvas, look: Phenotype) -> _Layout:
    gap = canvas.gap(canvas.scattered(look.unit_um)) + 1.5 * canvas.noise(9)
    space = _step(gap - (3.5 + 7 * look.stroma))
    return _Layout(epithelium=np.zeros_like(space), stroma=1 - space, lumen=space)


def _sheets(canvas: _Canvas, look: Phenotype) -> _Layout:
    band = np.abs(canvas.noise(26) + 0.2 * canvas.noise(9))
    stroma = _step((0.04 + 0.6 * look.stroma - 0.12 - band) * 15)
    return _Layout(epithelium=1 - stroma, stroma=stroma, lumen=np.zeros_like(stroma))


def _spindle(canvas: _Canvas, look: Phenotype) -> _Layout:
    across = -canvas.x * np.sin(canvas.flow) + canvas.y * np.cos(canvas.flow)
    band = np.sin(2 * np.pi * (across + 5 * canvas.noise(14)) / 26) + 0.3 * canvas.noise(11)
    stroma = _step((band - (1.25 - 1.2 * look.stroma)) * 5)
    nothing = np.zeros_like(stroma)
    return _Layout(epithelium=1 - stroma, stroma=stroma, lumen=nothing, axis=canvas.flow)


def _fibrillar(canvas: _Canvas, look: Phenotype) -> _Layout:
    """Glial felt; where there is little of it, microcysts open between the processes."""
    cysts = _step((np.abs(canvas.noise(7)) - (1.7 + 1.2 * look.stroma)) * 6)
    return _Layout(epithelium=np.zeros_like(cysts), stroma=1 - cysts, lumen=cysts)


_LAYOUTS: dict[str, Callable[[_Canvas, Phenotype], _Layout]] = {
    "glands": _glands,
    "papillae": _papillae,
    "nests": _nests,
    "cords": _cords,
    "trabeculae": _trabeculae,
    "alveoli": _alveoli,
    "sheets": _sheets,
    "spindle": _spindle,
    "fibrillar": _fibrillar,
}


def _necrosis(canvas: _Canvas, look: Phenotype) -> Map:
    if not look.necrosis:
        return np.zeros_like(canvas.x)
    return _step((canvas.noise(35) - (2.2 - 2.6 * look.necrosis)) * 12)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells:
    """Positions, kinds, half axes (a along ``angle``, b across) and chromatin density."""

    xy: Points
    kind: npt.NDArray[np.int64]
    a: npt.NDArray[np.float64]
    b: npt.NDArray[np.float64]
    angle: npt.NDArray[np.float64]
    chromatin: npt.NDArray[np.float64]


def _scatter(canvas: _Canvas, look: Phenotype, layout: _Layout, necrosis: Map) -> _Cells:
    rng = canvas.rng

    def kept(points: Points, chance: npt.NDArray[np.float64]) -> Points:
        return points[rng.random(len(points)) < chance]

    tumour = layout.basal if layout.basal is not None else canvas.scattered(look.cell_um)
    tumour = kept(tumour, canvas.at(layout.epithelium, tumour) * 1.15 - 0.1)
    tumour = kept(tumour, 1 - 0.8 * canvas.at(necrosis, tumour))
    stromal = canvas.scattered(look.stroma_cell_um, 0.45)
    stromal = kept(stromal, canvas.at(layout.stroma, stromal) * 0.8)
    room = layout.stroma + 0.15 * layout.epithelium + (0.5 if look.lymphocytes > 0.6 else 0.0)
    crowd = _step((canvas.noise(28) - 1.2 + 2.2 * look.lymphocytes) * 4.5) * np.clip(room, 0, 1)
    lymphocytes = canvas.scattered(7.2)
    lymphocytes = kept(lymphocytes, 0.85 * canvas.at(crowd * (layout.lumen < 0.5), lymphocytes))
    groups = (tumour, stromal, lymphocytes)
    kind = np.repeat([TUMOUR, STROMAL, LYMPHOCYTE], [len(group) for group in groups])
    # Two cells far outside, so that even an empty canvas has a nearest and a second nearest.
    xy = np.concatenate([*groups, np.array([[-90.0, -90.0], [-99.0, -99.0]])])
    kind = np.concatenate([kind, [STROMAL, STROMAL]])
    return _shape_cells(canvas, look, layout, xy, kind)


def _shape_cells(
    canvas: _Canvas, look: Phenotype, layout: _Layout, xy: Points, kind: npt.NDArray[np.int64]
) -> _Cells:
    rng, count = canvas.rng, len(xy)
    size = look.nucleus_um / 2 * np.exp(look.pleomorphism * rng.standard_normal(count))
    aspect = 1 + look.elongation * rng.uniform(0.5, 1.5, count)
    angle = rng.uniform(0, np.pi, count)
    wander = 0.25 * rng.standard_normal(count)
    if layout.axis is not None:
        angle = np.where(kind == TUMOUR, canvas.at(layout.axis, xy) + wander, angle)
    if look.layout != "fibrillar":  # fibroblasts lie along the fibres; glial cells do not
        fibroblast = kind == STROMAL
        size = np.where(fibroblast, 2.6, size)
        aspect = np.where(fibroblast, rng.uniform(1.6, 3.4, count), aspect)
        angle = np.where(fibroblast, canvas.at(canvas.flow, xy) + wander, angle)
    lymphocyte = kind == LYMPHOCYTE
    size = np.where(lymphocyte, 2.7, size)
    aspect = np.where(lymphocyte, 1.05, aspect)
    chromatin = np.choose(kind, [look.chromatin, 1.15, 1.5])
    return _Cells(
        xy=xy,
        kind=kind,
        a=size * np.sqrt(aspect),
        b=size / np.sqrt(aspect),
        angle=angle,
        chromatin=chromatin * np.exp(0.15 * rng.standard_normal(count)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Nuclei:
    """Maps of the drawn nuclei; ``border`` is the distance to the next cell in micrometres."""

    coverage: Map
    hematoxylin: Map
    border: Map
    cell_variation: Map
    cell_draw: Map
    """One uniform number a cell: decides which of two kinds it is, where a tissue has two."""
    instances: npt.NDArray[np.int32]


def _draw_nuclei(canvas: _Canvas, look: Phenotype, cells: _Cells, necrosis: Map) -> _Nuclei:
    distance, index = cKDTree(cells.xy).query(canvas.pixels, k=2)
    shape = canvas.height, canvas.width
    near = index[:, 0].reshape(shape)
    dx, dy = canvas.x - cells.xy[near, 0], canvas.y - cells.xy[near, 1]
    cosine, sine = np.cos(cells.angle[near]), np.sin(cells.angle[near])
    along, across = dx * cosine + dy * sine, -dx * sine + dy * cosine
    radius = np.hypot(along / cells.a[near], across / cells.b[near]) * (1 + 0.07 * canvas.noise(3))
    size = np.sqrt(cells.a * cells.b)[near]
    border = (distance[:, 1] - distance[:, 0]).reshape(shape)
    seam = 1 - 0.75 * np.exp(-((border / 0.9) ** 2))
    coverage = _step((1 - radius) * size, 0.45) * (1 - 0.7 * necrosis) * seam
    is_tumour = cells.kind[near] == TUMOUR
    hollow = 0.45 * look.vesicular * is_tumour * (radius < 0.75)
    membrane = 0.25 * np.exp(-(((radius - 0.88) / 0.15) ** 2))
    hematoxylin = cells.chromatin[near] * (1 - hollow + 0.22 * canvas.noise(1.3) + membrane)
    if look.nucleoli:
        shift = canvas.rng.uniform(-0.3, 0.3, (len(cells.xy), 2))[near]
        spot = np.hypot(along - shift[..., 0] * size, across - shift[..., 1] * size)
        hematoxylin = hematoxylin + 1.1 * look.nucleoli * is_tumour * np.exp(-((spot / 0.9) ** 2))
    variation = np.exp(0.18 * canvas.rng.standard_normal(len(cells.xy)))[near]
    inside = (radius < 1) & (necrosis < 0.5)
    return _Nuclei(
        coverage=coverage,
        hematoxylin=coverage * hematoxylin,
        border=border,
        cell_variation=variation,
        cell_draw=canvas.rng.random(len(cells.xy))[near],
        instances=np.where(inside, near + 1, 0).astype(np.int32),
    )


@dataclass(slots=True)
class _Density:
    """Optical densities of everything that takes light."""

    hematoxylin: Map
    eosin: Map
    red_cells: Map
    melanin: Map = field(repr=False)


def _densities(
    canvas: _Canvas, look: Phenotype, layout: _Layout, nuclei: _Nuclei, necrosis: Map
) -> _Density:
    noise = canvas.noise
    cell_line = np.exp(-((nuclei.border / 1.3) ** 2))
    cytoplasm = look.cytoplasm * nuclei.cell_variation * (1 + 0.18 * noise(2.2) + 0.1 * noise(8))
    mixed = look.clearing > 0 and look.cytoplasm >= EOSINOPHILIC
    clearing = look.clearing * (nuclei.cell_draw < 0.5) if mixed else look.clearing
    cytoplasm = cytoplasm * (1 - clearing) * (1 - 0.25 * cell_line)
    cytoplasm = cytoplasm + clearing * (0.06 + 0.4 * cell_line) + look.membrane * cell_line
    eosin = layout.epithelium * cytoplasm + layout.stroma * _fibres(canvas, look)
    eosin = eosin + layout.lumen * look.colloid * (1 + 0.05 * noise(20))
    basophilia = layout.epithelium * look.basophilia * (1 - clearing)
    density = _Density(
        hematoxylin=nuclei.hematoxylin + basophilia,
        eosin=eosin * (1 - 0.5 * nuclei.coverage),
        red_cells=np.zeros_like(eosin),
        melanin=np.zeros_like(eosin),
    )
    if look.goblet:
        _add_goblets(canvas, look, layout, density)
    if look.keratin:
        _add_keratin(canvas, density)
    if look.necrosis:
        debris = np.clip(noise(1.6) - 0.9, 0, 1) * 0.8
        density.eosin = density.eosin * (1 - necrosis) + necrosis * (0.62 + 0.2 * noise(1.5))
        density.hematoxylin = density.hematoxylin + necrosis * (debris - basophilia)
    if look.blood:
        _add_blood(canvas, look, layout, density)
    if look.pigment:
        clumps = _step((noise(9) - 1.5 + 0.8 * look.pigment) * 4.5) * np.clip(noise(1.6), 0, 2)
        density.melanin = 1.6 * look.pigment * clumps * (layout.epithelium > 0.5)
    if look.layout != "fibrillar":  # a few retraction clefts
        cleft = 1 - _step((noise(18) - 2.5) * 9)
        density.hematoxylin, density.eosin = density.hematoxylin * cleft, density.eosin * cleft
    return density


def _fibres(canvas: _Canvas, look: Phenotype) -> Map:
    """Eosin density of stroma: wavy collagen, or the felt of glial processes."""
    if look.layout == "fibrillar":
        felt = 0.28 * canvas.noise(1.2) + 0.18 * canvas.noise(4) + 0.12 * canvas.noise(18)
        return look.stroma_density * (1 + felt)
    across = -canvas.x * np.sin(canvas.flow) + canvas.y * np.cos(canvas.flow)
    wave = np.sin(2 * np.pi * (across + 4 * canvas.noise(9)) / 5.5)
    bundles = 0.5 + 0.5 * np.tanh(canvas.noise(14))
    fibres: Map = np.clip(1 + 0.35 * wave * bundles + 0.25 * canvas.noise(1.8), 0.15, 2)
    return look.stroma_density * fibres


def _add_goblets(canvas: _Canvas, look: Phenotype, layout: _Layout, density: _Density) -> None:
    """Pale mucin vacuoles: petals of a crypt, the luminal side of a gland, or within any cell."""
    centres = canvas.scattered(9.5)
    distance, index = canvas.nearest(centres)
    present = canvas.rng.random(len(centres)) < look.goblet
    radius = (2.6 + 1.8 * canvas.rng.random(len(centres))) * present
    vacuole = layout.petals
    if vacuole is None:
        luminal = layout.epithelium > 0.5 if layout.depth is None else layout.depth > 0.5
        vacuole = _step(radius[index] - distance, 0.5) * luminal
    vacuole = vacuole * (layout.lumen < 0.9)
    density.eosin = density.eosin * (1 - 0.85 * vacuole) + 0.03 * vacuole
    density.hematoxylin = density.hematoxylin * (1 - vacuole) + 0.06 * vacuole


def _add_keratin(canvas: _Canvas, density: _Density) -> None:
    """Whorls of pink lamellae without nuclei, none of them quite round."""
    centres = canvas.scattered(85, 0.4)
    distance, index = canvas.nearest(centres)
    size = canvas.rng.uniform(11, 20, len(centres))[index]
    bent = distance * (1 + 0.22 * canvas.noise(12)) + 1.2 * canvas.noise(5)
    pearl = _step(size - bent, 2)
    lamellae = 0.95 + 0.2 * np.sin(2 * np.pi * bent / 4.2 + canvas.noise(9)) * _step(bent - 3)
    density.eosin = density.eosin * (1 - pearl) + pearl * (lamellae + 0.08 * canvas.noise(2))
    density.hematoxylin = density.hematoxylin * (1 - 0.85 * pearl)


def _add_blood(canvas: _Canvas, look: Phenotype, layout: _Layout, density: _Density) -> None:
    """Red cells in vessels that run in stroma and along empty space."""
    vessel = _step((canvas.noise(16) - 2.0 + 1.4 * look.blood) * 9)
    open_vessel = (vessel * np.clip(layout.stroma + 0.6 * layout.lumen, 0, 1)) > 0.5
    centres = canvas.scattered(7.5)
    distance, index = canvas.nearest(centres)
    present = (canvas.rng.random(len(centres)) < 0.75)[index]
    density.red_cells = _step(3.1 - distance, 0.5) * present * open_vessel
    density.hematoxylin = density.hematoxylin * (1 - density.red_cells)
    density.eosin = density.eosin * (1 - 0.7 * open_vessel)


def _expose(
    rng: np.random.Generator, density: _Density, stain: Stain, mpp: float
) -> npt.NDArray[np.uint8]:
    """Beer-Lambert, then the scanner's blur and noise."""
    hematoxylin = np.array(stain.hematoxylin) * stain.hematoxylin_strength
    eosin = np.array(stain.eosin) * stain.eosin_strength
    absorbed = (
        density.hematoxylin[..., None] * hematoxylin
        + density.eosin[..., None] * eosin
        + density.red_cells[..., None] * RED_CELL_DENSITY * stain.eosin_strength
        + density.melanin[..., None] * MELANIN_DENSITY
    )
    light = np.array(stain.white) * np.exp(-np.clip(absorbed, 0, None))
    sigma_px = stain.blur_um / mpp
    if sigma_px > 0.15:
        light = ndimage.gaussian_filter(light, (sigma_px, sigma_px, 0))
    light = light + rng.normal(0, stain.noise, light.shape)
    image: npt.NDArray[np.uint8] = (np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image
