"""Which measures of generated images can be trusted to order them: a table.

    python benchmarks/measures.py PATH/vqvae.pth --data DIR --priors PATH/generator.pth …

A measure is admitted if it orders reconstructions of training images, slices of the first prior and independent codes,
in this sequence, with confidence intervals apart, and finds two halves of the training subjects equal. All are compared
with reconstructions of the validation split.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from dataset import OasisDataset  # noqa: E402
from evaluation.generation import (  # noqa: E402
    MEASURES,
    MOST_MEASURED,
    Images,
    Reference,
    of_arrays,
    reconstructed,
    to_bytes,
)
from evaluation.two_sample import Interval  # noqa: E402
from modules import VQVAE  # noqa: E402
from priors.checkpoints import load_prior, load_vqvae  # noqa: E402
from support import console, seeds  # noqa: E402
from support.device import exact_float32  # noqa: E402

EQUAL = {"coverage": 1 - 0.5**5, "texture_auc": 0.5, "anatomy_auc": 0.5}  # of one distribution


@exact_float32()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vqvae", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--priors", metavar="PATH", nargs="+", required=True, help="files of priors")
    parser.add_argument("--seed", type=console.SEED, default=0, help="of the noise and of what is drawn (default: 0)")
    o = parser.parse_args()
    vqvae = load_vqvae(o.vqvae)
    train, validate = (OasisDataset(o.data, split).as_images() for split in ("train", "validate"))
    n = min(MOST_MEASURED, len(train), len(validate))
    real = Reference(vqvae, reconstructed(vqvae, validate.spaced(n)), o.seed)
    picked = train.drawn(n, o.seed)
    sides = {"other subjects": reconstructed(vqvae, picked)}
    for path in o.priors:
        prior = load_prior(path, vqvae)
        noise = prior.noise(n, seeds.generator(o.seed, "measures"))
        sides[path] = of_arrays(to_bytes(prior.sample_images(noise)))
    rng = seeds.generator(o.seed, "independent codes")
    sides["independent codes"] = of_arrays(decode_independent_codes(vqvae, picked, rng))
    measured = {name: real.measure(images) for name, images in sides.items()}

    first, second = (reconstructed(vqvae, half.spaced(n)) for half in train.halves())
    beside = Reference(vqvae, first, o.seed)
    print_table(measured, beside.measure(second), {"coherence": beside.coherence()})


@torch.no_grad()
def decode_independent_codes(vqvae: VQVAE, images: Images, rng: torch.Generator) -> torch.Tensor:
    """As many images (N, 1, 256, 256) uint8; codes are drawn from those that the images have at a position.

    This prior knows the codes of every position and nothing about their neighbours: a measure that it does well on says
    little.
    """
    codes = torch.cat([vqvae.encode(part.float() / 255) for part in images.pixels.split(32)])
    drawn = codes.gather(0, torch.randint(len(codes), codes.shape, generator=rng))
    return torch.cat([to_bytes(vqvae.decode(part)) for part in drawn.split(32)])


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
        equal = half.low <= EQUAL[name] <= half.high
    return (rising or falling) and equal


def print_table(measured: dict[str, dict], half: dict[str, Interval], beside: dict[str, Interval]) -> None:
    """Markdown: a row for each measure, with 95 % confidence intervals."""
    print("| measure | " + " | ".join(measured) + " | two halves of the training subjects | admitted |")
    print("|---|" + "---:|" * (len(measured) + 1) + "---|")
    columns = list(measured.values())
    for name, text in MEASURES.items():
        cells = [str(column[name]) for column in columns]
        cells.append(f"{beside[name]}, {half[name]}" if name in beside else str(half[name]))
        judged = admitted(name, [columns[0][name], columns[1][name], columns[-1][name]], half[name], beside)
        print(f"| {text} | " + " | ".join(cells) + f" | {'yes' if judged else 'no'} |")


if __name__ == "__main__":
    console.run_program(main, "measures.py")
