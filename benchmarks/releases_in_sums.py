"""What many small hospitals tell together: each with noise of its own, or all in one sum.

    crafts-sim run real-tiles --tiles DIR --labels TABLE --out RUN
    python benchmarks/releases_in_sums.py RUN --sites 10

Takes the hospitals' patients out of a finished run and releases their anchors and colour as sites
do (``crafts_core.releases``): every vector cut to its length, Gaussian noise, read by the
coordinator's own code with the noise that is in the mean. Asked is what it is good for: how often a
held-out tile is nearest to the anchor of its own caption (the caption's text beside it), and how
far the mean optical density is off. Both ways pay the same epsilon a hospital. How patients are
dealt makes no difference: a sum is a sum.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from crafts_client.home import SiteHome
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.releases import (
    anchor_vector,
    colour_vector,
    decoded_anchors,
    decoded_colour,
)
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_core.vocabulary import caption_class
from crafts_privacy.accounting import PrivacyEvent, epsilon

DELTA = 5e-4


def main() -> None:
    """Print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run on real tiles")
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--colluding", type=int, default=1)
    parser.add_argument("--noise", type=float, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    foundation = load(embedded_path(), device="cpu")
    homes = [SiteHome.open(path) for path in sorted((args.run / "sites").iterdir())]
    stores = [TileStore.open(home.tile_store_path) for home in homes]
    held_out = TileStore.open(args.run / "heldout" / "tiles")
    captions = tuple(sorted(set(held_out.captions)))
    print("reading the hospitals' patients and the test tiles", file=sys.stderr)
    vectors = [vectors_of(store, foundation.manifest.hash, captions) for store in stores]
    anchors_PV, colour_PV = (torch.cat([each[kind] for each in vectors]) for kind in (0, 1))
    test_ND, class_N = held_out_tiles(held_out, foundation, captions)
    text_KD = foundation.aligner.embed_captions(list(captions)).cpu()
    count = len(anchors_PV)
    clean = decoded_colour((colour_PV.sum(dim=0) / count)[None], 1e-9, foundation).values
    rows = []
    for noise in args.noise:
        event = PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1)
        for way, total in (
            ("each its own noise", noise * math.sqrt(args.sites)),
            # Shares are sized so that all but the colluding ones make the promise.
            ("one sum", noise * math.sqrt(args.sites / (args.sites - args.colluding))),
            ("without noise", 0.0),
        ):
            found = [
                one(seed, total, anchors_PV, colour_PV, text_KD, foundation)
                for seed in range(args.seeds)
            ]
            hits = [nearest(anchors_KD, test_ND, class_N) for anchors_KD, _, _ in found]
            off = [float((colour - clean)[0, 1:4].abs().mean()) for _, colour, _ in found]
            by_text = [share for _, _, share in found]
            rows.append(
                {
                    "noise_multiplier": noise,
                    "epsilon_of_both": epsilon([event, event], DELTA),
                    "way": way,
                    "nearest_anchor": spread(hits),
                    "captions_left_to_text": float(np.mean(by_text)),
                    "density_off_by": spread(off),
                }
            )
    print(
        json.dumps(
            {
                "patients": count,
                "sites": args.sites,
                "colluding": args.colluding,
                "held_out_tiles": len(class_N),
                "by_text": nearest(text_KD, test_ND, class_N),
                "rows": rows,
            },
            indent=1,
        )
    )


def vectors_of(
    store: TileStore, foundation_hash: str, captions: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors' and colour's vector of each patient, cut to length one, (P, V) each."""
    cache = LatentCache.open(store, foundation_hash)
    classes = np.array([caption_class(text, captions) for text in store.captions])
    anchors, colours = [], []
    for patient in range(store.num_patients):
        rows = store.tile_rows_of(patient)
        class_B = torch.from_numpy(classes[store.caption_ids(rows)].astype(np.int64))
        anchors.append(anchor_vector(cache.tile_embeddings(rows), class_B, len(captions)))
        colours.append(colour_vector(store.read_images(rows)))
    return cut(torch.stack(anchors)), cut(torch.stack(colours))


def cut(vector_PV: torch.Tensor) -> torch.Tensor:
    """Each patient's to length one at most, as the engine cuts it."""
    return vector_PV / vector_PV.norm(dim=1, keepdim=True).clamp(min=1.0)


def held_out_tiles(
    store: TileStore, foundation: Foundation, captions: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, D), and which caption each is of."""
    rows = np.arange(store.num_tiles)
    images = torch.from_numpy(store.read_images(rows)).permute(0, 3, 1, 2)
    found = [foundation.aligner.embed_images(part).cpu() for part in images.split(64)]
    ids = [captions.index(store.captions[each]) for each in store.caption_ids(rows)]
    return torch.cat(found), torch.tensor(ids)


def one(
    seed: int,
    noise: float,
    anchors_PV: torch.Tensor,
    colour_PV: torch.Tensor,
    text_KD: torch.Tensor,
    foundation: Foundation,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Anchors, colour, and the share of captions that the text stands in for."""
    source, count = torch.Generator().manual_seed(seed), len(anchors_PV)

    def told(vector_PV: torch.Tensor) -> torch.Tensor:
        total_V = vector_PV.sum(dim=0)
        return (total_V + noise * torch.randn(total_V.shape, generator=source)) / count

    std = max(noise, 1e-9) / count
    anchors = decoded_anchors(told(anchors_PV).reshape(len(text_KD), -1), std, text_KD)
    colour = decoded_colour(told(colour_PV)[None], std, foundation)
    return anchors.values, colour.values, float(np.mean(anchors.is_public))


def nearest(anchors_KD: torch.Tensor, test_ND: torch.Tensor, class_N: torch.Tensor) -> float:
    """Share of tiles that are nearest to their own caption's anchor."""
    return float(((test_ND @ anchors_KD.T).argmax(dim=1) == class_N).float().mean())


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and where nine in ten draws of the noise lie."""
    low, high = np.quantile(values, [0.05, 0.95])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
