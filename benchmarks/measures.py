"""Which measures of generated images can be trusted to order them, and what the AUC of texture sees: two tables.

    python benchmarks/measures.py PATH/vqvae.pth --data DIR --generators PATH/generator.pth …

A measure is admitted if it orders reconstructions of training images, brains of the first generator and independent
codes, in this sequence, with confidence intervals apart, and finds two halves of the training subjects equal. All are
compared with reconstructions of the validation split.

The second table has the AUC of texture with a part of its features alone, and with the leading principal components of
all of them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from dataset import OasisDataset  # noqa: E402
from evaluation.generation import COMPARISONS, INDICES, HeldOut, decode_independent_codes  # noqa: E402
from evaluation.reconstruction import reconstruct  # noqa: E402
from evaluation.texture import BANDS, Features, features  # noqa: E402
from evaluation.two_sample import Interval, compare, mean_indices, numbered, texture_auc  # noqa: E402
from support import console, seeds  # noqa: E402
from support.device import exact_float32  # noqa: E402
from training.prior import load_prior  # noqa: E402
from training.vqvae import load_vqvae  # noqa: E402

LEADING = (8, 16, 32, 64)  # principal components of the features of windows


@exact_float32()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vqvae", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--generators", metavar="PATH", nargs="+", required=True, help="generator.pth, flow.pth")
    parser.add_argument("--seed", type=console.SEED, default=0, help="of the noise and of what is drawn (default: 0)")
    o = parser.parse_args()
    vqvae = load_vqvae(o.vqvae)
    train, validate = (OasisDataset(o.data, split) for split in ("train", "validate"))
    real = HeldOut(vqvae, validate, train, o.seed)
    n, rng = len(real.subjects), seeds.generator(o.seed, "independent codes")

    def reconstructed(numbers: list[int]) -> Features:
        return features(vqvae, reconstruct(vqvae, train, numbers), [train.subject(i) for i in numbers])

    sides = {"reconstructed training images": reconstructed(real.picked)}
    for path in o.generators:
        prior = load_prior(path, vqvae)
        images = prior.sample_images(prior.noise(n, seeds.generator(o.seed, "measures")))
        sides[path] = features(vqvae, images)
    sides["independent codes"] = features(vqvae, decode_independent_codes(vqvae, train, real.picked, rng))
    measured = {name: measure(real.features, side, o.seed) for name, side in sides.items()}
    first, second = (reconstructed(numbers) for numbers in halves(train, n))
    found, beside = measure(first, second, o.seed), mean_indices(first, seeds.generator(o.seed, "resampling"))
    print_table(measured, found, beside)
    print()
    print_parts({name: texture_by_part(real.features, side, o.seed) for name, side in sides.items()})


def halves(dataset: OasisDataset, n: int) -> list[list[int]]:
    """The numbers of up to n images of every other subject, and of the others, spaced evenly."""
    half = numbered([dataset.subject(i) for i in range(len(dataset))]) % 2
    sides = [(half == side).nonzero()[:, 0].tolist() for side in (0, 1)]
    return [[side[i * len(side) // k] for i in range(k)] for side in sides for k in (min(n, len(side)),)]


def measure(real: Features, fake: Features, seed: int) -> dict[str, Interval]:
    rng = seeds.generator(seed, "resampling")
    return mean_indices(fake, rng) | compare(real, fake, rng)


def admitted(name: str, sides: list[Interval], half: Interval, beside: dict[str, Interval]) -> bool:
    """Whether a measure orders three sides with intervals apart, and finds two halves equal.

    Never without an interval: there are too few subjects.
    """
    if any(side.low is None for side in (*sides, half)):
        return False
    rising, falling = (
        all(a.high < b.low for a, b in zip(part, part[1:], strict=False)) for part in (sides, sides[::-1])
    )
    if name in beside:
        equal = half.low <= beside[name].high and beside[name].low <= half.high
    else:
        equal = half.low <= {"density": 1, "coverage": 1 - 0.5**5, "kernel_distance": 0}.get(name, 0.5) <= half.high
    return (rising or falling) and equal


def texture_by_part(real: Features, fake: Features, seed: int) -> dict[str, Interval]:
    """The AUC of texture with some features of the windows alone, and with the real windows' principal components."""
    mean, std = real.windows.mean(0), real.windows.std(0, correction=0).clamp(min=1e-6)
    x, y = ((side.windows - mean) / std for side in (real, fake))
    variance, directions = (part.flip(-1) for part in torch.linalg.eigh(x.T @ x / len(x)))
    n_powers = len(BANDS) - 1
    n_channels = (x.shape[1] - n_powers - 1) // 2
    names = "all features", "powers", "coherence", "means of channels", "their standard deviations"
    groups = (side.split([n_powers, 1, n_channels, n_channels], 1) for side in (x, y))
    parts = dict(zip(names, [(x, y), *zip(*groups, strict=True)], strict=True))
    for k in LEADING:
        share = 100 * variance[:k].sum() / variance.sum()
        parts[f"{k} components, {share:.2f} % of the variance"] = x @ directions[:, :k], y @ directions[:, :k]
    pairs = {name: (real._replace(windows=a), fake._replace(windows=b)) for name, (a, b) in parts.items()}
    return {name: texture_auc(*pair, seeds.generator(seed, "resampling")) for name, pair in pairs.items()}


def print_parts(found: dict[str, dict[str, Interval]]) -> None:
    """Markdown: a row for each part of the features, with 95 % confidence intervals."""
    print("| AUC of texture | " + " | ".join(found) + " |\n|---|" + "---:|" * len(found))
    for name in next(iter(found.values())):
        print(f"| {name} | " + " | ".join(str(parts[name]) for parts in found.values()) + " |")


def print_table(measured: dict[str, dict], half: dict[str, Interval], beside: dict[str, Interval]) -> None:
    """Markdown: a row for each measure, with 95 % confidence intervals."""
    print("| measure | " + " | ".join(measured) + " | two halves of the training subjects | admitted |")
    print("|---|" + "---:|" * (len(measured) + 1) + "---|")
    columns = list(measured.values())
    for name, text in (INDICES | COMPARISONS).items():
        cells = [str(column[name]) for column in columns]
        cells.append(f"{beside[name]}, {half[name]}" if name in beside else str(half[name]))
        judged = admitted(name, [columns[0][name], columns[1][name], columns[-1][name]], half[name], beside)
        print(f"| {text} | " + " | ".join(cells) + f" | {'yes' if judged else 'no'} |")


if __name__ == "__main__":
    console.run_program(main, "measures.py")
