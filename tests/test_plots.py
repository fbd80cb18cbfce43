"""Figures: grey values are never rescaled, and titles, axes, colours and data are the right ones."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from evaluation.generation import MEASURES, Row
from evaluation.two_sample import Interval
from report import plots
from report.plots import Figures

FIGURES = Figures(Path())


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, in place of files."""
    drawn = []
    monkeypatch.setattr(Figures, "_save", lambda self, figure, name, mode="RGB": drawn.append(figure))
    yield drawn
    plt.close("all")


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, 1.5])
def test_grey_values_are_not_rescaled(tmp_path, value):
    image = torch.full((1, 256, 256), value)
    Figures(tmp_path).single_image("one.png", image, "Title")
    Figures(tmp_path).image_grid("grid.png", image.expand(8, 1, 256, 256), "Title")
    for name in ("one.png", "grid.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        height, width = pixels.shape
        assert pixels[height // 2, int(0.47 * width)] == pytest.approx(min(value, 1) * 255, abs=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["grid.png", "one.png"]


def test_the_number_of_a_plane_is_below_the_middle_of_its_column(figures):
    FIGURES.image_grid("x.png", torch.zeros(6, 1, 64, 64), "T", [4, 5, 6])
    axes = figures[0].axes[0]
    (black,) = np.nonzero(axes.images[0].get_array()[40] == 0)
    assert axes.get_xticks() == pytest.approx(black.reshape(3, 64).mean(1), abs=0.6)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "5", "6"] and axes.get_xlabel() == "plane"


def test_images_stand_in_rows_of_eight_in_their_order_whatever_matplotlibrc_says(tmp_path):
    images = torch.linspace(0, 0.9, 32).view(32, 1, 1, 1).expand(32, 1, 64, 64)
    with plt.rc_context({"image.origin": "lower"}):
        Figures(tmp_path).image_grid("grid.png", images, "Title")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    grid = pixels[-int(pixels.shape[1] / 2) :]  # 4 rows of 8 squares; the title is above
    rows, columns = ((np.arange(n) + 0.5) / n for n in (4, 8))
    found = [[grid[int(r * len(grid)), int(c * grid.shape[1])] for c in columns] for r in rows]
    assert np.ravel(found) == pytest.approx(np.linspace(0, 0.9, 32) * 255, abs=2)


def test_panels_are_named_in_their_order_each_with_its_own_range(figures):
    maps = {f"map {i}": torch.arange(6.0).view(2, 3) * 10**i for i in range(8)}
    FIGURES.panels("x.png", maps, "T")
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == list(maps) and figures[0].get_suptitle() == "T"
    assert [axes.images[0].get_clim() for axes in panels] == [(0, 5 * 10**i) for i in range(8)]


def test_every_title_says_that_the_data_are_phantoms(figures, tmp_path):
    image, name, drawn = torch.rand(1, 64, 64), "x.png", Figures(tmp_path, phantoms=True)
    history = {key: [1.0, 0.5] for key in ("d_loss", "g_loss", "d_real", "d_fake")}
    drawn.image_grid(name, image[None], "T")
    drawn.single_image(name, image, "T")
    drawn.code_map(name, torch.zeros(64, 64, dtype=torch.long), torch.arange(512), "T")
    drawn.ssim_by_epoch(name, [dict(epoch=1, ssim_mean=0.5, ssim_min=0.4, ssim_max=0.6)])
    drawn.losses(name, [0.5, 0.4], [dict(updates=2, training_loss=0.45)], "T", "training_loss")
    drawn.gan_losses(name, history)
    drawn.scores(name, [0.5], [1], 0.6, "T")
    drawn.measures_by_epoch(name, [dict.fromkeys(MEASURES, 0.5) | {"epoch": 1}], dict.fromkeys(MEASURES, 0.4))
    drawn.measures(name, 2 * [Row("M", *3 * [Interval(0.5, 0.4, 0.6)])], ("a", "b", "c"), "T")
    drawn.pairs(name, [(image, image, "text")], "T")
    drawn.panels(name, {f"map {i}": image[0] for i in range(8)}, "T")
    drawn.comparison(name, image, image, 0.9, "T")
    drawn.likelihood(name, image, torch.rand(64, 64), "T")
    drawn.curves(name, {"side": ([1, 2], [0.5, 0.6])}, "T", "minutes", {})
    assert len(figures) == len([method for method in vars(Figures) if not method.startswith("_")])
    for figure in figures:
        first, second = (figure.get_suptitle() or figure.axes[0].get_title()).split("\n")
        assert first and second == "data: phantoms (synthetic)"
    for figure in figures[1:9]:
        assert all(axes.get_ylabel() for axes in figure.axes) and figure.axes[-1].get_xlabel() or len(figure.axes) == 2


def test_gan_losses_are_blue_and_orange_by_step(figures):
    rng = np.random.default_rng(0)
    history = {key: rng.random(40).tolist() for key in ("d_loss", "g_loss", "d_real", "d_fake")}
    FIGURES.gan_losses("x.png", history)
    for axes, keys in zip(figures[0].axes, (("d_loss", "g_loss"), ("d_real", "d_fake")), strict=True):
        by_update = [line for line in axes.lines if line.get_label().startswith("_")]
        for line, key, colour in zip(by_update, keys, (plots.BLUE, plots.ORANGE), strict=True):
            assert to_hex(line.get_color()) == colour
            assert line.get_ydata().tolist() == history[key] and line.get_xdata().tolist() == list(range(1, 41))
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["discriminator", "generator"]


def test_scores_show_every_image_its_subject_the_mean_the_threshold_and_how_many(figures):
    values = [0.7, 0.5, 0.9, 0.7, 0.7]
    FIGURES.scores("x.png", values, [7, 7, 9, 7, 7], 0.6, "T")
    upper, lower = figures[0].axes
    one, other = (part.get_offsets().tolist() for part in upper.collections)
    assert one == [[0, 0.7], [1, 0.5], [3, 0.7], [4, 0.7]] and other == [[2, 0.9]]
    assert [line.get_ydata()[0] for line in upper.lines] == [pytest.approx(0.7), 0.6]
    assert sorted(bar.get_height() for bar in lower.patches)[-3:] == [1, 1, 3]


def test_comparison_shows_both_and_the_absolute_difference(figures):
    x, x_hat = torch.rand(2, 1, 64, 64)
    Figures(Path(), phantoms=True).comparison("x.png", x, x_hat, 0.8765, "T")
    shown = [axes.images[0].get_array() for axes in figures[0].axes[:3]]
    for found, expected in zip(shown, (x, x_hat, (x - x_hat).abs()), strict=True):
        np.testing.assert_array_equal(found, expected[0].numpy())
    assert figures[0].axes[1].get_xlabel() == "reconstruction, SSIM 0.8765"
    assert figures[0].get_suptitle() == "T\ndata: phantoms (synthetic)"


def test_code_map_tells_neighbours_apart_and_ranks_usage(figures):
    codes = torch.zeros(64, 64, dtype=torch.long)
    codes[3, 4], codes[3, 5] = 17, 18
    FIGURES.code_map("x.png", codes, torch.tensor([5, 0, 9, 1]), "T")
    left, right = figures[0].axes
    image = left.images[0].get_array()
    assert image[0, 0, :3].sum() == 0  # the background
    assert len({tuple(image[3, x]) for x in (3, 4, 5)}) == 3
    assert [bar.get_height() for bar in right.patches] == [9, 5, 1, 0]
    assert right.get_title().startswith("3 of 4 codes")


def test_measures_by_epoch_show_each_measure_and_the_floor(figures):
    rows = [{key: n + i for i, key in enumerate(MEASURES)} | {"epoch": n} for n in (1, 2)]
    FIGURES.measures_by_epoch("x.png", rows, {key: 10 + i for i, key in enumerate(MEASURES)})
    for i, (axes, text) in enumerate(zip(figures[0].axes, MEASURES.values(), strict=False)):
        values, floor = axes.lines
        assert list(values.get_ydata()) == [1 + i, 2 + i] and floor.get_ydata()[0] == 10 + i
        assert axes.get_ylabel().replace("\n", " ") == text


def test_measures_have_a_dot_and_a_bar_for_each_side(figures):
    nothing = Interval(float("nan"))
    rows = [Row("A", Interval(1, 0, 2), Interval(3, 2, 4), Interval(5)), Row("B", Interval(6), nothing, nothing)]
    FIGURES.measures("x.png", rows, ("a", "b", "c"), "T")
    first, second = figures[0].axes
    assert [list(line.get_ydata()) for line in first.lines] == [[1], [0, 2], [3], [2, 4], [5]]
    assert len(second.lines) == 3
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["a", "b", "c"]


def test_pairs_stand_side_by_side(figures):
    pairs = [(torch.full((1, 8, 8), 10 * i), torch.full((1, 8, 8), 10 * i + 5), f"pair {i}") for i in range(5)]
    FIGURES.pairs("x.png", pairs, "T")
    assert len(figures[0].axes) == 8
    image = figures[0].axes[4].images[0].get_array()
    assert image.shape == (8, 16) and (image[:, :8] == 40).all() and (image[:, 8:] == 45).all()
    assert figures[0].axes[4].get_title() == "pair 4"


def test_epoch_means_stand_in_the_middle_of_their_updates_and_validation_after_them(figures):
    rows = [dict(updates=2, a=3.0, b=4.0), dict(updates=2, a=1.0, b=2.0)]
    FIGURES.losses("x.png", [4.0, 2.0, 1.0, 1.0], rows, "T", "a", "b")
    each, means, validation = figures[0].axes[0].lines
    assert validation.get_xdata().tolist() == [2, 4] and validation.get_ydata().tolist() == [4.0, 2.0]
    assert each.get_xdata().tolist() == [1, 2, 3, 4]
    assert means.get_xdata().tolist() == [1.5, 3.5] and means.get_ydata().tolist() == [3.0, 1.0]
