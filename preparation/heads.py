"""Draws slices of synthetic heads and their label maps, for phantoms.py."""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

# Where the planes of OASIS-1, 176 x 208 pixels of 1 mm, stand in the image. X and Y are pixels from the middle of the
# brain: the front of the head is at positive X, row 0 at negative Y.
PLANE = np.s_[40:216, 24:232]
Y, X = np.mgrid[-88.5:87.5, -103:105].astype(np.float32)
RADIUS = np.hypot(X, Y)
TURN = np.arctan2(Y, X) / np.float32(2 * np.pi) + np.float32(0.5)  # 0 and 1 at the back, 0.5 at the front
CORE = np.s_[36:140, 40:176]  # holds ventricles and deep grey matter
MEDIAL = np.s_[62:116]  # rows that lie less than 27 pixels from the midline

# Functions of the direction are tables of 1440 values, here of cosines and sines of 0 to 12 waves, (2, 13, 1440).
BIN = np.minimum((TURN * 1440).astype(int), 1439)
DEGREES = np.arange(1440) / 4 - 180  # from the front
WAVES = np.arange(13)[:, None] * np.radians(DEGREES)
WAVES = np.stack([np.cos(WAVES), np.sin(WAVES)]).astype(np.float32)
TEMPLES = np.exp(-(((np.abs(DEGREES) - 62) / 14) ** 2))  # where the brain is narrower in low slices
MUSCLES = np.clip((34 - np.abs(np.abs(DEGREES) - 64)) / 6, 0, 1)  # where the temporal muscles are

# Cosine series of the direction, in pixels: mean radius of the set's label maps and of its heads, in slices 0 and 31 of
# the validation split, and thickness of the scalp.
BRAIN = np.float32([[77.0, -1.3, 10.2, 2.4, -0.1, -1.7, -1.6], [73.0, 0.3, 6.9, 3.2, -0.3, 0.2, -0.5]])
HEAD = np.float32([[90.4, 0.4, 10.5, 1.6, -0.4, 0.0, -0.4], [86.6, 1.5, 8.2, 2.8, 0.0, 0.3, -0.1]])
SCALP = np.float32([6.3, -1.3, -0.4, 0.8])

# Grey levels where white matter is 1, as measured in the validation split. Where there is no signal, noise in magnitude
# images has a mean above 0, the floor, and is weaker. NOISE is its standard deviation in white matter.
GREY, FLUID, SKULL, MUSCLE, FLOOR, NOISE = 0.62, 0.20, 0.20, 0.62, 0.088, 0.0235
BLUR, SPREAD = 0.6, 0.496  # by how many pixels resampling blurs noise, and what it leaves of the standard deviation

# Deep grey matter: from which height it closes, grey level, a capsule in X and distance from the midline.
DEEP = (
    (0.55, 0.88, (-5, 11), (7, 9), 9, 8),  # thalamus
    (0.55, 0.80, (4, 26), (27, 19), 2.5, 5.5),  # putamen
    (0.80, 0.74, (24, 8), (40, 16), 4.5, 3),  # caudate nucleus
)


def draw(rng: np.random.Generator, own: np.random.Generator, height: float) -> tuple[np.ndarray, np.ndarray]:
    """A slice and its label map, (256, 256) uint8, at a height from 0 to 1.

    `rng` gives the same numbers for every slice of a subject, `own` those of this slice alone.
    """
    atrophy = rng.uniform()
    noise = rng.normal(NOISE, 0.15 * NOISE)
    floor = rng.normal(FLOOR, 0.1 * FLOOR)
    field = _field_of_view(rng)
    depth, skin = _outlines(rng, height)
    brain = _brain(rng, height, depth, atrophy)
    labels = np.select([depth < 0, brain < (FLUID + GREY) / 2, brain < (GREY + 1) / 2], [0, 85, 170], 255)
    head = _wrap(rng, height, depth, skin, brain) * (1 + 0.05 * _slow_noise(rng, height))

    texture, grain = (gaussian_filter(own.standard_normal(X.shape, np.float32), blur) for blur in (1.6, BLUR))
    head = head * (1 + texture * (0.13 + 0.35 * _inside(-7 - depth, 1)))  # tissue is mottled, above all the scalp
    head = gaussian_filter(head, 0.35)
    signal = np.hypot(head, floor) + noise / SPREAD * grain * np.clip(0.55 + head, 0.55, 1)
    signal = np.maximum(signal * field, 0)
    image, label_map = np.zeros((2, 256, 256), np.uint8)
    image[PLANE] = (signal * (255 / signal.max())).round()
    label_map[PLANE] = labels
    return image, label_map


def _spline_weights(n: int, spacing: float) -> np.ndarray:
    """(n, knots) weights of a cubic B-spline whose knots lie `spacing` pixels apart."""
    t = np.abs(np.arange(n)[:, None] / spacing - np.arange(-1, int(n / spacing) + 3)[None, :])
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0)).astype(np.float32)


ROWS, COLUMNS = _spline_weights(X.shape[0], 40), _spline_weights(X.shape[1], 40)


def _knots(rng: np.random.Generator, height: float, *shape: int) -> np.ndarray:
    """Random values that change smoothly with height in [0, 1], at constant variance."""
    planes = rng.standard_normal((5, *shape), np.float32)
    k = min(int(height * 4), 3)
    turn = (height * 4 - k) * np.pi / 2
    return np.float32(np.cos(turn)) * planes[k] + np.float32(np.sin(turn)) * planes[k + 1]


def _slow_noise(rng: np.random.Generator, height: float) -> np.ndarray:
    """Noise that varies over 40 pixels, of standard deviation 0.5, (176, 208)."""
    return ROWS @ _knots(rng, height, ROWS.shape[1], COLUMNS.shape[1]) @ COLUMNS.T


def _ring_noise(rng: np.random.Generator, height: float, waves: int) -> np.ndarray:
    """Noise around the head, a sum of so many waves, of standard deviation 1, (1440,)."""
    return np.tensordot(_knots(rng, height, 2, waves), WAVES[:, 1 : waves + 1], 2) / np.float32(waves**0.5)


def _inside(distance: np.ndarray, width: float = 0.6) -> np.ndarray:
    """1 where the signed distance in pixels is positive, 0 where it is negative, with a soft edge."""
    t = np.clip(distance / (4 * width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _at(height: float, heights: list[float], values: list[float]) -> float:
    """Linear interpolation of a value that changes with height."""
    return float(np.interp(height, heights, values))


def _capsule(x: np.ndarray, y: np.ndarray, start: tuple, end: tuple, r_start: float, r_end: float) -> np.ndarray:
    """Signed distance in pixels, positive inside, to a rounded line whose radius runs from r_start to r_end."""
    (x0, y0), (x1, y1) = start, end
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
    along = np.clip(along, 0, 1)
    return r_start + along * (r_end - r_start) - np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))


def _outlines(rng: np.random.Generator, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Depth in pixels below the outline of the label map and below the skin, negative outside, both (176, 208)."""
    brain, head = ((low + height**2 * (high - low)) @ WAVES[0, :7] for low, high in (BRAIN, HEAD))
    brain = brain - 3.5 * max(0, 1 - 1.2 * height) * TEMPLES.astype(np.float32)
    head = head + rng.normal(0.8, 2.4) + 1.2 * _ring_noise(rng, height, 4)
    return brain[BIN] - RADIUS, np.maximum(head, brain + 9.5)[BIN] - RADIUS


def _field_of_view(rng: np.random.Generator) -> np.ndarray:
    """1 in an octagon, 0 outside it; its upper and lower edge have the steps that resampling left, (176, 208)."""
    turn, x, y = rng.normal(0, 0.03), rng.normal(0, 2), rng.normal(0, 2)
    along = np.abs(X - x + turn * (Y - y))
    across = np.abs(Y - y - turn * (X - x))
    steps = 5 * np.mod(-((along / rng.uniform(26, 36)) ** 2), 1)
    edges = rng.normal(80, 1.5) + steps - across, rng.normal(102.5, 1.5) - along, rng.normal(146.5, 2) - along - across
    return _inside(np.minimum(np.minimum(edges[0], edges[1]), edges[2]), 0.35)


def _wrap(
    rng: np.random.Generator, height: float, depth: np.ndarray, skin: np.ndarray, brain: np.ndarray
) -> np.ndarray:
    """The brain in its head, (176, 208): skull with marrow, temporal muscles, scalp, and often a fiducial beside it."""
    thickness = SCALP @ WAVES[0, :4] + rng.normal(0, 0.4) + 0.7 * _ring_noise(rng, height, 5)
    level = rng.normal(1.74, 0.1) * (1 - 0.08 * WAVES[0, 3] + 0.13 * _ring_noise(rng, height, 6))
    marrow = np.maximum(rng.normal(0.5, 0.1) + 0.2 * _ring_noise(rng, height, 12), SKULL)
    marrow = (marrow + (MUSCLE - marrow) * MUSCLES).astype(np.float32)[BIN]
    layers = 0.85 + 0.25 * np.cos(1.1 * depth + 4 * _slow_noise(rng, height))
    thickness = thickness[BIN]
    image = SKULL + (marrow * layers - SKULL) * _inside(np.minimum(skin - thickness - 1.2, -depth - 2.5), 0.7)
    fat = level[BIN] * np.clip(skin / thickness + 0.1, 0, 1)  # brightest at its inner edge
    image = image + (fat - image) * _inside(thickness - skin, 0.8)
    image = image * _inside(skin, 0.5)
    image = image + (brain - image) * _inside(depth + 1.5, 0.8)
    x, y, z = rng.normal(68, 2), rng.normal(-70, 3), rng.normal(0.5, 0.25)  # of the fiducial
    squared = rng.uniform(3.5, 5) ** 2 - (31 * (height - z)) ** 2  # the radius of a sphere where this plane cuts it
    bead = rng.uniform(0.4, 1.5)
    shown = rng.uniform() < 0.6
    if shown and squared > 1:
        image = np.maximum(image, bead * _inside(np.minimum(squared**0.5 - np.hypot(X - x, Y - y), -skin - 1)))
    return image


def _brain(rng: np.random.Generator, height: float, depth: np.ndarray, atrophy: float) -> np.ndarray:
    """Grey levels of the brain without noise, (176, 208); what they are outside the label map does not matter."""
    x = X + 4 * _slow_noise(rng, height)
    y = Y + 3 * _slow_noise(rng, height) + rng.normal(0, 0.7)
    surface = _surface(rng, height, depth, x, y)
    gap = 0.9 + 1.6 * atrophy + 1.6 * _slow_noise(rng, height) - np.minimum(depth, np.abs(y)) / 9  # wide at the surface
    gap = np.clip(gap, -1, 3)
    brain = GREY + (1 - GREY) * _inside(surface - np.maximum(gap, 0) - rng.normal(4.4, 0.2), 1.7)
    core = brain[CORE]
    for closes, level, *shape in DEEP:
        structure = _capsule(x[CORE], np.abs(y[CORE]), *shape) - 25 * max(0.0, height - closes)
        core += (np.minimum(level, core) - core) * _inside(structure, 0.9)
    fluid = gap - surface
    fluid[CORE] = np.maximum(fluid[CORE], _ventricles(rng, height, x[CORE], y[CORE], atrophy))
    return brain + (FLUID - brain) * _inside(fluid, 0.7)


def _surface(rng: np.random.Generator, height: float, depth: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pixels to the nearest sulcus, fissure or outline, (176, 208).

    Sulci are zero crossings of noise that varies faster along the surface of a hemisphere than inwards, so that most
    of them run inwards.
    """
    level = height + rng.normal(0, 0.04)
    front = _at(level, [0, 0.25, 0.5, 0.8, 1], [26, 44, 50, 40, 12]) + rng.normal(0, 1.5)
    back = _at(level, [0, 0.25, 0.5, 0.8, 1], [-20, -30, -27, -30, -10]) + rng.normal(0, 1.5)
    lateral = np.abs(y)
    bridge = np.maximum(np.minimum(x - back, front - x), 0)  # deep in the corpus callosum, which the fissure spares
    slow = [_slow_noise(rng, height) for _ in range(3)]
    sulcus = _folds(rng, height, depth / 8, TURN * 76 + 2.2 * slow[0], 0.35)
    sulcus += 0.7 * np.maximum(depth - 20 - 8 * slow[1], 0)
    surface = np.minimum(np.minimum(sulcus, lateral + 0.5 + 1.5 * bridge), depth + 0.2 - 1.5 * slow[2])
    medial = _folds(rng, height, y[MEDIAL] / 9, x[MEDIAL] / 7 + 4 * slow[0][MEDIAL], 0)
    medial += 0.7 * np.maximum((lateral + 3 * bridge)[MEDIAL] - 12 - 8 * slow[1][MEDIAL], 0)
    surface[MEDIAL] = np.minimum(surface[MEDIAL], medial)
    if level < 0.7:  # the lateral fissure, with the insula on its floor
        closing = 8 * max(0.0, level - 0.3)
        lateral = lateral + 1.2 * np.sin(x / 2.5)
        floor = _capsule(x, lateral, (-2, 40), (30, 36), -closing, -closing)
        opening = _capsule(x, lateral, (16, 39), (34, 66), -closing, -closing)
        surface = np.minimum(surface, -np.maximum(floor, opening))
    return surface


def _folds(rng: np.random.Generator, height: float, inwards: np.ndarray, along: np.ndarray, wave: float) -> np.ndarray:
    """Pixels to the nearest zero crossing of noise and a wave; `inwards` and `along` are in knots of the noise."""
    knots = _knots(rng, height, 12, 76)
    folds = map_coordinates(knots, [inwards, along], order=3, mode="grid-wrap", prefilter=False)
    folds += wave * np.cos(along * np.float32(17 * 2 * np.pi / 76))  # so that no stretch is without a sulcus
    return np.abs(folds) / (np.hypot(*np.gradient(folds)) + 0.004)


def _ventricles(rng: np.random.Generator, height: float, x: np.ndarray, y: np.ndarray, atrophy: float) -> np.ndarray:
    """Signed distance in pixels, positive inside: on each side a front horn, a body and a back horn; the third one.

    Below the bodies is the cistern behind the brain stem, with the vermis of the cerebellum.
    """
    level = height + rng.normal(0, 0.03)
    size = float(np.exp(rng.normal(-0.15, 0.2) + 1.1 * atrophy**2))
    heights = [0, 0.2, 0.45, 0.7, 0.9, 1.05]
    r_front = 3.5 * (size - 1) + _at(level, heights, [-1.0, 2.0, 4.0, 4.0, 2.5, 0])
    r_body = 4.5 * (size - 1) + _at(level, heights, [-8, -7, -2, 1.5, 2.6, 0.3])
    r_back = 2.5 * (size - 1) + _at(level, heights, [2.2, 3.2, 3.6, 3.2, 2.0, 0])
    heights = [0, 0.15, 0.3, 0.5, 0.65, 0.8, 1]
    front = _at(level, heights, [42, 43, 44, 45, 36, 28, 16]), _at(level, heights, [15, 16, 16, 17, 18, 18, 17])
    inner = 13, _at(level, heights, [2.5, 2.5, 2.5, 2.5, 4, 9, 15]) + r_front
    body = 0, _at(level, heights, [9, 9, 9, 9, 9, 9, 15]) + r_body
    outer = -15, _at(level, heights, [26, 22, 17, 14, 13.5, 13, 17])
    back = _at(level, heights, [-24, -29, -34, -29, -26, -24, -14]), _at(level, heights, [29, 27, 25, 22, 21, 21, 18])
    lateral = np.abs(y)
    third = 1.0 + 0.8 * size - lateral - 0.5 * np.maximum(np.abs(x - 3) - 12, 0) - 25 * max(0.0, level - 0.5)
    cistern = _capsule(x, y, (-28, 0), (-19, 0), 4 + 2 * size, 4 + size) - np.cos(0.7 * y)
    vermis = np.minimum(_capsule(x, y, (-42, 0), (-31, 0), 4, 6), 0.6 * np.cos(1.5 * x + y / 6))  # fluid between folia
    cistern = np.maximum(cistern, vermis) - 40 * max(0.0, level - 0.2)
    ventricles = np.maximum(third, cistern)
    lateral = lateral / np.where(y < 0, np.float32(np.exp(rng.normal(0.03, 0.04))), 1)  # one side is mostly larger
    for start, end, r_start, r_end in (
        (inner, front, r_front, 0.3 * r_front),
        (outer, back, 1.2 * r_back, 0.7 * r_back),
        (outer, body, 0.9 * r_back, r_body),
        (body, inner, r_body, r_front),
    ):
        ventricles = np.maximum(ventricles, _capsule(x, lateral, start, end, r_start, r_end))
    return ventricles
