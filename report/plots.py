"""Every figure of the programs."""

import functools
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are only written to files, whatever the environment says
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image
from torchvision.utils import make_grid

from evaluation.generation import MEASURES
from support import console, files

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#777777"  # distinguishable with colour-blind eyes (Okabe and Ito)
STYLE = {
    "figure.dpi": 100,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
NOTE = "data: phantoms (synthetic)"
MOST_BITS = 18  # of a code in figures: twice those of an equal choice among 512


def _figure(draw: Callable[..., None]) -> Callable[..., None]:
    """A method that draws the figure `name`. If it fails, it prints a warning instead."""

    @functools.wraps(draw)
    def attempt(self: "Figures", name: str, *args, **settings) -> None:
        with console.warn_on_failure(self.folder / name), plt.style.context("default"):  # whatever matplotlibrc says
            draw(self, name, *args, **settings)

    return attempt


class Figures:
    """The figures of a folder. Each method writes one PNG.

    Images are grey values in [0, 1], drawn with that fixed range and never rescaled, so that figures can be compared.
    Figures made from phantoms say so under their titles.
    """

    def __init__(self, folder: Path, phantoms: bool = False):
        self.folder = folder
        self.phantoms = phantoms

    @_figure
    def image_grid(self, name: str, images, title: str, planes: Sequence[int] = ()) -> None:
        """Images (N, 1, H, W), eight in each row; or one for each of `planes`, whose numbers are below the columns."""
        per_row = len(planes) or 8
        grid = make_grid(images.float().cpu().clamp(0, 1), nrow=per_row, padding=4, pad_value=1.0)[0].numpy()
        width = max(8, per_row)  # inches
        height = width * grid.shape[0] / grid.shape[1]
        figure, axes = self._axes(width, height + (0.7 if self.phantoms else 0.45) + (0.45 if planes else 0), title)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
        if planes:
            size = images.shape[-1]
            axes.set_xticks([4 + i * (size + 4) + size / 2 for i in range(per_row)], planes)
            axes.set(xlabel="plane", yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(False)
        else:
            axes.axis("off")
        self._save(figure, name, "L")

    @_figure
    def panels(self, name: str, images: dict, title: str) -> None:
        """Maps (H, W) by title, four in each row, each with its own range of grey because their units differ."""
        rows = -(-len(images) // 4)
        figure, axes = _subplots(rows, 4, 11, 0.5 + 2.9 * rows)
        figure.suptitle(self._with_note(title), fontsize=STYLE["axes.titlesize"])
        for panel, (text, image) in zip(axes.flat, images.items(), strict=True):
            panel.imshow(np.asarray(image.float().cpu()), cmap="gray", interpolation="nearest")
            panel.set_title(text, fontsize=10)
            panel.axis("off")
        self._save(figure, name, "L")

    @_figure
    def single_image(self, name: str, image, title: str) -> None:
        """One image (1, H, W), with the scale of its grey values and pixel axes."""
        figure, axes = self._axes(5.2, 4.8, title)
        shown = axes.imshow(np.asarray(image.float().cpu())[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="x / pixels", ylabel="y / pixels")
        axes.grid(False)
        figure.colorbar(shown, ax=axes, label="grey value", fraction=0.046)
        self._save(figure, name, "L")

    @_figure
    def comparison(self, name: str, x, x_hat, ssim: float, title: str) -> None:
        """An image (1, H, W), its reconstruction, and the absolute difference of both."""
        x, x_hat = (np.asarray(image.float().cpu())[0] for image in (x, x_hat))
        figure, panels = _subplots(1, 3, 9.6, 3.5)
        figure.suptitle(self._with_note(title), fontsize=STYLE["axes.titlesize"])
        for axes, image, text in zip(
            panels, (x, x_hat), ("original", f"reconstruction, SSIM {ssim:.4f}"), strict=False
        ):
            grey = axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xlabel(text)
        error = panels[2].imshow(abs(x - x_hat), cmap="magma", vmin=0, vmax=0.25, interpolation="nearest")
        panels[2].set_xlabel(f"absolute difference, mean {abs(x - x_hat).mean():.4f}")
        for axes in panels:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        figure.colorbar(grey, ax=panels[1], label="grey value", fraction=0.046)
        figure.colorbar(error, ax=panels[2], label="grey values", fraction=0.046, extend="max")
        self._save(figure, name)

    @_figure
    def code_map(self, name: str, codes, usage, title: str) -> None:
        """The codes (64, 64) of one image, the most frequent one black; usage (n_embeddings,), counts of a split."""
        codes, usage = np.asarray(codes.cpu()), np.asarray(usage.cpu())
        background = np.bincount(codes.ravel()).argmax()
        colours = plt.get_cmap("tab20")(codes % 20)
        colours[codes == background] = (0, 0, 0, 1)
        figure, (left, right) = _subplots(1, 2, 9.6, 4.6)
        left.set_title(self._with_note(title))
        left.imshow(colours, interpolation="nearest")
        left.set(xlabel=f"x / code positions (black: code {background})", ylabel="y / code positions")
        left.grid(False)
        ranked = np.sort(usage)[::-1]
        right.bar(np.arange(1, len(ranked) + 1), ranked, width=1, color=BLUE)
        right.set(xlabel="code, by frequency", ylabel="positions (log scale)", yscale="log")
        right.set_title(f"{(usage > 0).sum()} of {len(usage)} codes are used on the validation split")
        self._save(figure, name)

    @_figure
    def likelihood(self, name: str, image, bits, title: str) -> None:
        """An image (1, 256, 256), and the bits of its codes (64, 64)."""
        figure, (left, right) = _subplots(1, 2, 9.6, 4.6)
        figure.suptitle(self._with_note(title))
        left.imshow(np.asarray(image.float().cpu())[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        left.set(xlabel="x / pixels", ylabel="y / pixels", title="image")
        shown = right.imshow(np.asarray(bits.cpu()), vmin=0, vmax=MOST_BITS, interpolation="nearest")
        right.set(xlabel="x / code positions", ylabel="y / code positions", title="information of its codes")
        for axes in (left, right):
            axes.grid(False)
        figure.colorbar(shown, ax=right, label="−log2 p / bits a code", fraction=0.046)
        self._save(figure, name)

    @_figure
    def ssim_by_epoch(self, name: str, rows: list[dict]) -> None:
        """Mean validation SSIM by epoch, with the range from the worst to the best image; rows of metrics.csv."""
        epochs, mean, low, high = ([row[key] for row in rows] for key in ("epoch", "ssim_mean", "ssim_min", "ssim_max"))
        figure, axes = self._axes(6.4, 4.2, "Validation SSIM by epoch")
        axes.fill_between(epochs, low, high, color=BLUE, alpha=0.2, label="worst to best image")
        axes.plot(epochs, mean, color=BLUE, marker="o", markersize=4, label="mean")
        brain = [row.get("ssim_brain", np.nan) for row in rows]  # label maps may come and go while a run is stopped
        if not np.isnan(brain).all():
            axes.plot(epochs, brain, color=ORANGE, marker="s", markersize=4, label="mean inside the brain")
        axes.set(xlabel="epoch", ylabel="SSIM (1 = identical)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower right")
        self._save(figure, name)

    @_figure
    def losses(
        self,
        name: str,
        losses: list[float],
        rows: list[dict],
        title: str,
        *columns: str,
        unit: str = "mean squared error",
    ) -> None:
        """The loss of each step, and `columns` of metrics.csv: its mean over an epoch, and any validation loss."""
        updates, *values = (np.asarray([row[key] for row in rows]) for key in ("updates", *columns))
        figure, axes = self._axes(6.4, 4.2, title)
        axes.plot(np.arange(1, len(losses) + 1), losses, color=BLUE, linewidth=0.6, alpha=0.6, label="each step")
        places = np.cumsum(updates) - (updates - 1) / 2, np.cumsum(updates)
        looks = (ORANGE, "epoch mean"), (GREY, "validation split, averaged weights")
        for x, y, (colour, label) in zip(places, values, looks, strict=False):
            axes.plot(x, y, color=colour, marker="o", markersize=4, label=label)
        axes.set(xlabel="step", ylabel=f"{unit} (log scale)", yscale="log")
        axes.legend()
        self._save(figure, name)

    @_figure
    def curves(self, name: str, curves: dict[str, tuple], title: str, xlabel: str, levels: dict[str, float]) -> None:
        """SSIM of several sides: for each its x values (log scale) and SSIM; `levels` of SSIM as lines, by name."""
        figure, axes = self._axes(10, 4.8, title)
        for i, (label, (x, y)) in enumerate(curves.items()):
            axes.plot(x, y, color=f"C{i}", marker="os^vDPX*"[i % 8], markersize=4, linewidth=1, label=label)
        for label, level in levels.items():
            axes.axhline(level, color=GREY, linestyle="--", linewidth=0.8)
            axes.annotate(
                label, (1, level), (-4, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=9
            )
        axes.set(xlabel=xlabel, ylabel="SSIM (1 = identical)", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        figure.legend(loc="outside right upper", fontsize=9)
        self._save(figure, name)

    @_figure
    def gan_losses(self, name: str, history: dict[str, list[float]]) -> None:
        """The DCGAN's losses (above) and the discriminator's mean outputs (below) by step, as `DCGANStage` has them."""
        figure, (upper, lower) = _subplots(2, 1, 7.2, 6.4, sharex=True)
        upper.set_title(self._with_note("DCGAN training"))
        steps = np.arange(1, len(history["d_loss"]) + 1)
        for axes, rows in (
            (upper, (("d_loss", BLUE, "discriminator"), ("g_loss", ORANGE, "generator"))),
            (lower, (("d_real", BLUE, "D(x), real"), ("d_fake", ORANGE, "D(G(z)), generated"))),
        ):
            for key, colour, label in rows:
                axes.plot(steps, history[key], color=colour, linewidth=0.4, alpha=0.4)
                axes.plot(*_smooth(steps, history[key]), color=colour, label=label)
            axes.legend(loc="upper right", ncols=2)
        upper.set(ylabel="binary cross entropy")
        lower.set(xlabel="step", ylabel="mean probability of being real", ylim=(0, 1.15))  # the legend covers nothing
        self._save(figure, name)

    @_figure
    def measures_by_epoch(self, name: str, rows: list[dict], reconstructions: dict) -> None:
        """MEASURES of generated slices by epoch, with those of reconstructed scans.

        `rows` of metrics.csv that have measures; `reconstructions` as `training.samples.Samples` has it.
        """
        # few images lack some measures
        shown = {key: label for key, label in MEASURES.items() if np.isfinite(reconstructions[key])}
        n_rows = len(MEASURES) // 3 + 1  # the legend takes a place, too
        figure, axes = _subplots(n_rows, 3, 11, 3.2 * n_rows)
        figure.suptitle(self._with_note("Generated slices beside those of the validation split, by epoch"))
        for each, (key, label) in zip(axes.flat, shown.items(), strict=False):
            each.plot([row["epoch"] for row in rows], [row[key] for row in rows], color=BLUE, marker="o", markersize=4)
            each.axhline(reconstructions[key], color=ORANGE, linestyle="--")
            each.set(xlabel="epoch", ylabel=textwrap.fill(label, 26))
            each.xaxis.get_major_locator().set_params(integer=True)
        for each in axes.flat[len(shown) :]:
            each.remove()
        figure.legend(axes[0, 0].lines, ["generated", "reconstructions of other scans"], loc="lower right")
        self._save(figure, name)

    @_figure
    def measures(self, name: str, rows: list, sides: tuple[str, ...], title: str) -> None:
        """Measures with their confidence intervals; `rows` of `evaluation.generation.Row`, `sides` names of columns."""
        figure, axes = _subplots(2, -(-len(rows) // 2), 14, 7.5)
        figure.suptitle(self._with_note(f"{title} (bars: 95 % confidence)"))
        for each in axes.flat[len(rows) :]:
            each.remove()
        for each, row in zip(axes.flat, rows, strict=False):
            for x, (interval, colour) in enumerate(zip(row[1:], (BLUE, ORANGE, GREY), strict=True)):
                each.plot(x, interval.value, "o", color=colour)
                if interval.low is not None:
                    each.plot([x, x], [interval.low, interval.high], color=colour, linewidth=2)
            each.set_ylabel(textwrap.fill(row.name, 36))
            each.set_xticks(range(len(sides)), sides, rotation=60, ha="right", fontsize=8, rotation_mode="anchor")
            each.set_xlim(-0.6, len(sides) - 0.4)
        self._save(figure, name)

    @_figure
    def pairs(self, name: str, pairs: list[tuple], title: str) -> None:
        """Pairs of images (1, H, W) uint8 side by side, each with text: (image, other, text), four pairs a row."""
        rows = -(-len(pairs) // 4)
        figure, axes = _subplots(rows, 4, 14, 2.1 * rows + 0.6)
        figure.suptitle(self._with_note(title), fontsize=STYLE["axes.titlesize"])
        for each in axes.flat:
            each.axis("off")
        for each, (image, other, text) in zip(axes.flat, pairs, strict=False):
            both = np.concatenate([np.asarray(side.cpu())[0] for side in (image, other)], 1)
            each.imshow(both, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
            each.set_title(text, fontsize=8)
        self._save(figure, name, "L")

    @_figure
    def scores(self, name: str, ssim, cases: list, threshold: float, title: str) -> None:
        """SSIM of each image in the data set's order, with the threshold and the mean, and their histogram.

        `ssim` is (N,); `cases` are the subjects of the images: the colour changes with them.
        """
        ssim = np.asarray(ssim)
        changes = np.cumsum([i > 0 and case != cases[i - 1] for i, case in enumerate(cases)])
        figure, (upper, lower) = _subplots(2, 1, 7.2, 6.4)
        upper.set_title(self._with_note(title))
        for parity, colour, label in ((0, BLUE, "images of a subject"), (1, ORANGE, "of the next one")):
            mask = changes % 2 == parity
            upper.scatter(np.flatnonzero(mask), ssim[mask], s=9, color=colour, label=label)
        upper.axhline(ssim.mean(), color=GREY, label=f"mean {ssim.mean():.4f}")
        upper.axhline(threshold, color=GREY, linestyle="--", label=f"threshold {threshold}")
        upper.set(xlabel="image (in order of case and slice)", ylabel="SSIM (1 = identical)")
        upper.legend(loc="best", ncols=2)
        lower.hist(ssim, bins=min(40, max(5, len(ssim) // 5)), color=BLUE)
        lower.axvline(ssim.mean(), color=GREY, label=f"mean {ssim.mean():.4f}")
        lower.set(xlabel="SSIM (1 = identical)", ylabel="images")
        self._save(figure, name)

    def _axes(self, width: float, height: float, title: str):
        figure, axes = _subplots(1, 1, width, height)
        axes.set_title(self._with_note(title))
        return figure, axes

    def _with_note(self, title: str) -> str:
        return f"{title}\n{NOTE}" if self.phantoms else title

    def _save(self, figure, name: str, mode: str = "RGB") -> None:
        """Write a figure; mode "L" (grey) makes files smaller, and even so a grid of slices takes half a megabyte.

        Pillow's `optimize` would take three times as long for files that are 2 % smaller.
        """
        try:
            figure.canvas.draw()
            with files.atomically(self.folder / name) as temporary:
                pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
                pixels.convert(mode).save(temporary, format="png")
        finally:
            plt.close(figure)


def _subplots(rows: int, columns: int, width: float, height: float, **settings):
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **settings)


def _smooth(x: np.ndarray, y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a fiftieth of the curve."""
    width = max(1, len(y) // 50)
    return x[width - 1 :] - (width - 1) / 2, np.convolve(y, np.ones(width) / width, "valid")
