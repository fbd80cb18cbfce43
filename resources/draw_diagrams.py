"""Draw the diagrams of README.md and docs/, beside this file: networks, and the order of a prior's codes.

python resources/draw_diagrams.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from modules import WINDOW

BLUE, ORANGE, GREEN, GREY, RED = "#cfe3f3", "#fbe3b5", "#cdeadb", "#eeeeee", "#c0392b"


def canvas(width: float, height: float):
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 9) -> None:
    """A rounded box centred on (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor="#444")
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=size)


def arrow(
    axes, start: tuple, end: tuple, text: str = "", colour: str = "#444", curve: float = 0.0, above: float = 0.18
):
    style = dict(arrowstyle="-|>", color=colour, connectionstyle=f"arc3,rad={curve}", linewidth=1.4)
    axes.annotate("", end, start, arrowprops=style)
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above)
    axes.text(*middle, text, ha="center", va="center", fontsize=8.5, color=colour)


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def vqvae() -> None:
    figure, axes = canvas(11, 4.3)
    axes.text(5.5, 4.1, "VQ-VAE: image → codes → image", ha="center", fontsize=12)
    y = 2.6
    box(axes, 0.8, y, 1.1, 1.1, "image x\n1×256×256\n[0, 1]", GREY)
    box(axes, 2.75, y, 1.6, 1.5, "Encoder\n2 strided conv.\n2 residual blocks\n1×1 conv.", BLUE)
    box(axes, 4.7, y, 1.1, 1.1, "$z_e(x)$\n64×64×64", GREY)
    box(axes, 6.4, y, 1.2, 1.1, "codes\n64×64\nof 0…511", GREY)
    box(axes, 8.1, y, 1.1, 1.1, "$z_q(x)$\n64×64×64", GREY)
    box(axes, 9.9, y, 1.6, 1.5, "Decoder\nconv.\n2 residual blocks\n2 transposed conv.", BLUE)
    box(axes, 9.9, 0.7, 1.6, 0.8, "reconstruction $\\hat{x}$\n1×256×256", GREY)
    box(axes, 6.4, 0.7, 2.3, 0.8, "codebook: 512 embeddings $e_k$\nof length 64", ORANGE)
    for a, b in ((1.35, 1.95), (3.55, 4.15), (8.65, 9.1)):
        arrow(axes, (a, y), (b, y))
    arrow(axes, (5.25, y), (5.8, y), "nearest\n$e_k$", above=0.35)
    arrow(axes, (7.0, y), (7.55, y), "look-up", above=0.2)
    arrow(axes, (6.0, 1.1), (6.0, 2.05))
    arrow(axes, (7.2, 1.1), (7.8, 2.05))
    arrow(axes, (9.9, 1.85), (9.9, 1.1))
    arrow(
        axes,
        (8.0, 3.2),
        (4.8, 3.2),
        "straight-through gradient: $\\nabla_{z_e} L = \\nabla_{z_q} L$",
        RED,
        curve=0.18,
        above=0.47,
    )
    save(figure, "vqvae-architecture.png")


def stack(axes, y: float, colour: str, layers: list[tuple[str, str]], names: tuple[str, str, str]) -> None:
    """A row of layers (shape, what it is) from the input's name to the output's, with a title on the left."""
    title, first, last = names
    axes.text(0.1, y + 1.05, title, fontsize=11)
    box(axes, 0.85, y, 1.25, 0.9, first, GREY)
    for i, (shape, kind) in enumerate(layers):
        x = 2.45 + 1.6 * i
        arrow(axes, (x - 0.95, y), (x - 0.65, y))
        box(axes, x, y, 1.3, 0.9, shape, colour)
        axes.text(x, y - 0.62, kind, ha="center", va="top", fontsize=7.5)
    arrow(axes, (x + 0.65, y), (x + 0.95, y))
    box(axes, x + 1.6, y, 1.25, 0.9, last, GREY)


def dcgan() -> None:
    figure, axes = canvas(11.4, 5.0)
    up, down = "transposed conv. 4×4, stride 2", "conv. 4×4, stride 2"
    norm = "\nBatchNorm, LeakyReLU"
    stack(
        axes,
        3.7,
        GREEN,
        [
            ("512×4×4", "transposed conv. 4×4" + norm),
            ("256×8×8", up.replace(", ", ",\n") + norm),
            ("128×16×16", up.replace(", ", ",\n") + norm),
            ("64×32×32", up.replace(", ", ",\n") + norm),
            ("64×64×64", up.replace(", ", ",\n") + "\ntanh"),
        ],
        ("Generator", "noise\n128×1×1", "output\n64×64×64\n[-1, 1]"),
    )
    stack(
        axes,
        1.2,
        BLUE,
        [
            ("32×32×32", down.replace(", ", ",\n") + norm),
            ("64×16×16", down.replace(", ", ",\n") + norm),
            ("128×8×8", down.replace(", ", ",\n") + norm),
            ("256×4×4", down.replace(", ", ",\n") + norm),
            ("1", "conv. 4×4\nsigmoid"),
        ],
        ("Discriminator", "input\n64×64×64\n[-1, 1]", "probability\nof being real"),
    )
    save(figure, "dcgan-architecture.png")


def squares(axes, left: float, n: int, colour_of) -> None:
    """n x n squares of 0.25 from (left, 0.3) upwards, each with the colour and the text of its row and column."""
    for row in range(n):
        for column in range(n):
            colour, text = colour_of(row, column)
            x = left + 0.25 * column
            y = 0.3 + 0.25 * (n - 1 - row)
            axes.add_patch(Rectangle((x, y), 0.25, 0.25, facecolor=colour, edgecolor="#888", linewidth=0.6))
            axes.text(x + 0.125, y + 0.115, text, ha="center", va="center", fontsize=7.5)


def order() -> None:
    figure, axes = canvas(10.4, 4.7)
    colours = {8: RED, 4: ORANGE, 2: GREEN, 1: BLUE}

    def grid(row: int, column: int) -> tuple[str, str]:
        number, stride = next((i, s) for i, s in enumerate(colours) if row % s == 0 and column % s == 0)
        return colours[stride], str(number + 1)

    def window(row: int, column: int) -> tuple[str, str]:
        here = (8, 7)
        above = row < 8 or (row == 8 and column < 7)
        if (row, column) == here:
            return RED, "?"
        if above and row >= 8 - WINDOW and abs(column - 7) <= WINDOW:
            return ORANGE, ""
        if row % 2 == 0 and column % 2 == 0:
            return GREEN, ""
        return (BLUE if above else "white"), ""

    axes.text(2.3, 4.45, "Four grids, one after the other", ha="center", fontsize=11)
    squares(axes, 0.3, 16, grid)
    axes.text(2.3, 0.1, "1 to 4: every 8th, 4th, 2nd row and column; all", ha="center", va="center", fontsize=8.5)
    axes.text(6.9, 4.45, "A code of the last grid", ha="center", fontsize=11)
    squares(axes, 4.9, 16, window)
    coarser = "coarser grid:\nseen by a\nconvolution"
    texts = (RED, "drawn now"), (ORANGE, "seen directly"), (GREEN, coarser), (BLUE, "drawn before")
    for i, (colour, text) in enumerate(texts):
        axes.add_patch(Rectangle((9.0, 3.9 - 0.75 * i), 0.25, 0.25, facecolor=colour, edgecolor="#888", linewidth=0.6))
        axes.text(9.35, 4.02 - 0.75 * i, text, va="center", fontsize=8.5)
    save(figure, "autoregressive-order.png")


if __name__ == "__main__":
    vqvae()
    dcgan()
    order()
