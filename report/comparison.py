"""Printed lines, tables and figures of a comparison of generated images with real ones."""

import math
from pathlib import Path

from evaluation.generation import Comparison, Images
from evaluation.memorisation import CHANCE
from report.plots import Figures
from support import files
from support.run import mark

SIDES = ("scored", "other subjects", "reconstructions")
SHOWN = 16  # pairs with the nearest training images
# References for a paper that uses the measures.
SOURCES = (
    "classifier two-sample tests (AUC): arXiv 1610.06545; coverage: arXiv "
    "2002.09797; sliced Wasserstein distance: arXiv 1710.10196; this project: CITATION.cff"
)


def write(folder: Path, comparison: Comparison, train: Images | None, phantoms: bool) -> None:
    """Print a line for each measure; write measures.csv, nearest.csv and two figures.

    nearest.csv has a row for each image that is scored.
    """
    rows = comparison.rows
    figures = Figures(folder, phantoms)
    columns = ["measure", *(side + limit for side in SIDES for limit in ("", ", low", ", high"))]
    table = [[row.name, *(_cell(value) for side in row[1:] for value in side)] for row in rows]
    files.write_csv(folder / "measures.csv", columns, table)
    figures.measures("measures.png", rows, SIDES, "Images beside real ones")
    for row in rows:
        print(f"{row.name}: {row.fake} ({SIDES[1]}: {row.real}; {SIDES[2]}: {row.reconstructions}){mark(phantoms)}")
    for reason in comparison.missing:
        print(f"–: {reason}")
    if comparison.copies is not None:
        _write_copies(folder, comparison, train, figures)


def _write_copies(folder: Path, comparison: Comparison, train: Images, figures: Figures) -> None:
    fake = comparison.fake
    copies = comparison.copies
    nearest = comparison.copies.fake
    columns = ["image", "training image", "distance", "rows", "columns", "brightness", "near"]
    table = []
    for i, name in enumerate(fake.names):
        index, *values = (each[i].item() for each in nearest)
        table.append([name, train.names[index], *values, int(copies.near[i])])
    files.write_csv(folder / "nearest.csv", columns, table)
    pairs = []
    for i in nearest.distance.argsort()[:SHOWN].tolist():
        other = nearest.index[i].item()
        text = f"{fake.names[i]} | {train.names[other]}\ndistance {nearest.distance[i]:.3f}"
        pairs.append((fake.pixels[i], train.pixels[other], text))
    title = f"Nearest training images (right); near is below {copies.threshold:.3f}"
    figures.pairs("nearest.png", pairs, title)
    print(f"{copies_line(comparison)}{mark(figures.phantoms)}")


def copies_line(comparison: Comparison) -> str:
    """How many images are near training images, in two sentences."""
    near, share = comparison.copies.near, comparison.copies.share
    limits = "" if share.low is None else f" [{share.low:.2%}, {share.high:.2%}]"
    return (
        f"Near a training image: {int(near.sum())} of {len(near)} images, {share.value:.2%}{limits}; of held-out "
        f"images {CHANCE:.0%} are as near by definition. If it is more, look at nearest.png"
    )


def _cell(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
