"""Every figure. Functions take arrays or tensors and a path, and write one PNG.

Images are grey values in [0, 1], drawn with that fixed range and never rescaled, so that figures can be compared.
`note` is drawn under the title; it says where the data come from when they are phantoms.
"""

import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # files are all that is drawn; whatever the environment says
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

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


def _never_fatal(draw: Callable[..., None]) -> Callable[..., None]:
    """A figure that cannot be drawn is worth a warning, not hours of training."""

    @functools.wraps(draw)
    def attempt(path: Path, *args, **settings) -> None:
        try:
            draw(path, *args, **settings)
        except Exception as error:
            print(f"warning: {path}: could not be drawn, and is left out ({error})", file=sys.stderr)

    return attempt


@_never_fatal
def image_grid(path: Path, images, title: str, note: str = "", columns: int = 8) -> None:
    """Images (N, 1, H, W), `columns` a row, in the order given."""
    gap, (n, _, h, w) = 4, images.shape
    columns = min(columns, n)
    grid = np.ones((-(-n // columns) * (h + gap) + gap, columns * (w + gap) + gap), np.float32)
    for i, image in enumerate(images[:, 0].float().cpu().clamp(0, 1)):
        top, left = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        grid[top : top + h, left : left + w] = image
    height = 8 * grid.shape[0] / grid.shape[1]
    figure, axes = _figure(8, height + (0.7 if note else 0.45), title, note)
    axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    axes.axis("off")
    _save(figure, path, "L")


@_never_fatal
def single_image(path: Path, image, title: str, note: str = "") -> None:
    """One image (1, H, W), with the scale of its grey values and pixel axes."""
    figure, axes = _figure(5.2, 4.8, title, note)
    shown = axes.imshow(np.asarray(image.float().cpu())[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="x / pixels", ylabel="y / pixels")
    axes.grid(False)
    figure.colorbar(shown, ax=axes, label="grey value", fraction=0.046)
    _save(figure, path, "L")


@_never_fatal
def comparison(path: Path, x, x_hat, ssim: float, title: str, note: str = "") -> None:
    """An image (1, H, W), its reconstruction, and the absolute difference of both."""
    x, x_hat = (np.asarray(image.float().cpu())[0] for image in (x, x_hat))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.5), layout="constrained")
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=STYLE["axes.titlesize"])
    for axes, image, text in zip(panels, (x, x_hat), ("original", f"reconstruction, SSIM {ssim:.4f}"), strict=False):
        grey = axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel(text)
    error = panels[2].imshow(abs(x - x_hat), cmap="magma", vmin=0, vmax=0.25, interpolation="nearest")
    panels[2].set_xlabel(f"absolute difference, mean {abs(x - x_hat).mean():.4f}")
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.colorbar(grey, ax=panels[1], label="grey value", fraction=0.046)
    figure.colorbar(error, ax=panels[2], label="grey values", fraction=0.046, extend="max")
    _save(figure, path)


@_never_fatal
def code_map(path: Path, codes, usage, title: str, note: str = "") -> None:
    """The codes (64, 64) of one image, the most frequent one black; and how often a split uses each code.

    Args:
        usage: (n_embeddings,) counts.
    """
    codes, usage = np.asarray(codes.cpu()), np.asarray(usage.cpu())
    background = np.bincount(codes.ravel()).argmax()
    colours = plt.get_cmap("tab20")(codes % 20)
    colours[codes == background] = (0, 0, 0, 1)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    _title(left, title, note)
    left.imshow(colours, interpolation="nearest")
    left.set(xlabel=f"x / code positions (black: code {background})", ylabel="y / code positions")
    left.grid(False)
    ranked = np.sort(usage)[::-1]
    right.bar(np.arange(1, len(ranked) + 1), ranked, width=1, color=BLUE)
    right.set(xlabel="code, by how often it is used", ylabel="positions (log scale)", yscale="log")
    right.set_title(f"{(usage > 0).sum()} of {len(usage)} codes are used on the validation split")
    _save(figure, path)


@_never_fatal
def ssim_by_epoch(path: Path, mean: list[float], least: list[float], greatest: list[float], note: str = "") -> None:
    """Mean validation SSIM by epoch, with the range from the worst to the best image."""
    epochs = np.arange(1, len(mean) + 1)
    figure, axes = _figure(6.4, 4.2, "Validation SSIM by epoch", note)
    axes.fill_between(epochs, least, greatest, color=BLUE, alpha=0.2, label="worst to best image")
    axes.plot(epochs, mean, color=BLUE, marker="o", markersize=4, label="mean")
    axes.set(xlabel="epoch", ylabel="SSIM (1 = identical)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right")
    _save(figure, path)


@_never_fatal
def recon_losses(path: Path, losses: list[float], updates: list[int], means: list[float], note: str = "") -> None:
    """Reconstruction loss of each update, and the mean of each epoch, whose numbers of updates are `updates`."""
    ends = np.cumsum(updates)
    figure, axes = _figure(6.4, 4.2, "Training reconstruction loss", note)
    axes.plot(np.arange(1, len(losses) + 1), losses, color=BLUE, linewidth=0.6, alpha=0.6, label="each update")
    axes.plot(ends - (np.asarray(updates) - 1) / 2, means, color=ORANGE, marker="o", markersize=4, label="epoch mean")
    axes.set(xlabel="update", ylabel="mean squared error (log scale)", yscale="log")
    axes.legend()
    _save(figure, path)


@_never_fatal
def rate_distortion(path: Path, rows: list[dict], note: str = "") -> None:
    """PSNR and SSIM against the bits of an image's codes, a point for each epoch.

    Args:
        rows: with "epoch", "psnr_mean", "ssim_mean" and, in bits an image, "bits_raw", "bits_entropy" and
            "bits_entropy_by_position".
    """
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.2, 6.4), sharex=True, layout="constrained")
    _title(
        upper, f"Rate and distortion on the validation split, epochs {rows[0]['epoch']} to {rows[-1]['epoch']}", note
    )
    rates = (("bits_raw", GREY, "as they are"), ("bits_entropy", BLUE, "entropy"))
    rates += (("bits_entropy_by_position", ORANGE, "by position (lower bound)"),)
    for axes, key in ((upper, "psnr_mean"), (lower, "ssim_mean")):
        for rate, colour, label in rates:
            x, y = ([row[name] for row in rows] for name in (rate, key))
            axes.plot(x, y, color=colour, marker="o", markersize=3, linewidth=0.6, label=label)
            axes.annotate("last", (x[-1], y[-1]), (4, 4), textcoords="offset points", fontsize=9)
    upper.set(ylabel="PSNR / dB")
    lower.set(xlabel="bits an image", ylabel="SSIM (1 = identical)", xlim=(0, None))
    lower.legend(loc="lower right", bbox_to_anchor=(0.96, 0.05))  # between the curves
    _save(figure, path)


@_never_fatal
def gan_losses(path: Path, history: dict[str, list[float]], note: str = "") -> None:
    """The DCGAN's losses by update (above), and how sure the discriminator is (below).

    Args:
        history: by update, "d_loss" and "g_loss", and the discriminator's mean outputs on real and on generated
            latents, "d_real" and "d_fake", all read before the discriminator's own update.
    """
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.2, 6.4), sharex=True, layout="constrained")
    _title(upper, "DCGAN training", note)
    update = np.arange(1, len(history["d_loss"]) + 1)
    for axes, rows in (
        (upper, (("d_loss", BLUE, "discriminator"), ("g_loss", ORANGE, "generator"))),
        (lower, (("d_real", BLUE, "D(x), real latents"), ("d_fake", ORANGE, "D(G(z)), generated latents"))),
    ):
        for key, colour, label in rows:
            axes.plot(update, history[key], color=colour, linewidth=0.4, alpha=0.4)
            axes.plot(*_smooth(update, history[key]), color=colour, label=label)
        axes.legend(loc="upper right", ncols=2)
    upper.set(ylabel="binary cross entropy")
    lower.set(xlabel="update", ylabel="mean probability of being real", ylim=(0, 1.15))  # the legend covers nothing
    _save(figure, path)


@_never_fatal
def gan_measures(path: Path, rows: list[dict], floor: dict, note: str = "") -> None:
    """How far generated brains are from the validation split, by epoch, beside reconstructed training images.

    Args:
        rows: with "epoch", "swd_256" to "swd_16" and "swd_mean" (sliced Wasserstein distance, by level and mean), and
            "grey_values" (distance of grey values).
        floor: the same of reconstructed training images.
    """
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.2, 6.4), sharex=True, layout="constrained")
    _title(upper, "Distance of generated brains from the validation split", note)
    epochs = [row["epoch"] for row in rows]
    for size, marker in ((256, "o"), (128, "s"), (64, "^"), (32, "v"), (16, "D")):
        values = [row[f"swd_{size}"] for row in rows]
        upper.plot(epochs, values, color=GREY, marker=marker, markersize=4, linewidth=0.6, label=f"{size} pixels")
    for axes, key in ((upper, "swd_mean"), (lower, "grey_values")):
        label = "mean" if axes is upper else "generated"
        axes.plot(epochs, [row[key] for row in rows], color=BLUE, marker="o", markersize=4, label=label)
        axes.axhline(floor[key], color=ORANGE, linestyle="--", label="reconstructed training images")
        axes.set(ylim=(0, None))
    upper.set(ylabel="sliced Wasserstein distance × 10³")
    upper.legend(ncols=2, fontsize=9)
    lower.set(xlabel="epoch", ylabel="distance of grey values")
    lower.xaxis.get_major_locator().set_params(integer=True)
    lower.legend()
    _save(figure, path)


@_never_fatal
def scores(path: Path, ssim, cases: list, threshold: float, title: str, note: str = "") -> None:
    """SSIM of each image, in the data set's order, with the threshold and the mean; and their histogram.

    Args:
        ssim: (N,).
        cases: of each image what it belongs to: colour changes where that does.
    """
    ssim = np.asarray(ssim)
    changes = np.cumsum([i > 0 and case != cases[i - 1] for i, case in enumerate(cases)])
    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.2, 6.4), layout="constrained")
    _title(upper, title, note)
    for parity, colour, label in ((0, BLUE, "images of a subject"), (1, ORANGE, "of the next one")):
        some = changes % 2 == parity
        upper.scatter(np.flatnonzero(some), ssim[some], s=9, color=colour, label=label)
    upper.axhline(ssim.mean(), color=GREY, label=f"mean {ssim.mean():.4f}")
    upper.axhline(threshold, color=GREY, linestyle="--", label=f"threshold {threshold}")
    upper.set(xlabel="image (in order of case and slice)", ylabel="SSIM (1 = identical)")
    upper.legend(loc="best", ncols=2)
    lower.hist(ssim, bins=min(40, max(5, len(ssim) // 5)), color=BLUE)
    lower.axvline(ssim.mean(), color=GREY, label=f"mean {ssim.mean():.4f}")
    lower.set(xlabel="SSIM (1 = identical)", ylabel="images")
    _save(figure, path)


def _figure(width: float, height: float, title: str, note: str):
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        _title(axes, title, note)
    return figure, axes


def _title(axes, title: str, note: str) -> None:
    axes.set_title(f"{title}\n{note}" if note else title)


def _smooth(x: np.ndarray, y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a fiftieth of the curve."""
    width = max(1, len(y) // 50)
    return x[width - 1 :] - (width - 1) / 2, np.convolve(y, np.ones(width) / width, "valid")


def _save(figure, path: Path, mode: str = "RGB") -> None:
    """Mode "L" for figures without colour: a grid of grainy brains takes half a megabyte as it is."""
    temporary = path.with_name(f".{path.name}.tmp")
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format="png")
        Image.open(drawn).convert(mode).save(temporary, format="png", optimize=True)
        os.replace(temporary, path)  # a figure of this name is never half written
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)
