"""Which measures of generated images can be trusted to order them: a table.

    python benchmarks/measures.py PATH/vqvae.pth --data DIR --priors PATH/generator.pth …

A measure should put reconstructions of other subjects before the priors, and these before independent codes, with
confidence intervals apart. All are compared with reconstructions of the validation split.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataset import OasisDataset
from evaluation.generation import MEASURES, MOST_MEASURED, Images, Reference, of_arrays, reconstructed, to_bytes
from evaluation.two_sample import Interval
from modules import VQVAE
from priors.checkpoints import load_prior, load_vqvae
from support import console, seeds
from support.device import exact_float32


@exact_float32()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vqvae", metavar="PATH", help="vqvae.pth")
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--priors", metavar="PATH", nargs="+", required=True, help="files of priors")
    parser.add_argument("--seed", type=console.SEED, default=0, help="of the noise and of what is drawn (default: 0)")
    o = parser.parse_args()
    vqvae = load_vqvae(o.vqvae)
    priors = {path: load_prior(path, vqvae) for path in o.priors}
    train, validate = (OasisDataset(o.data, split).as_images() for split in ("train", "validate"))
    n = min(MOST_MEASURED, len(train), len(validate))
    real = Reference(vqvae, reconstructed(vqvae, validate.evenly_spaced(n)), o.seed)
    picked = train.random_subset(n, o.seed)
    sides = {"other subjects": reconstructed(vqvae, picked)}
    for path, prior in priors.items():
        noise = prior.noise(n, seeds.generator(o.seed, "measures"))
        sides[path] = of_arrays(to_bytes(prior.sample_images(noise)))
    rng = seeds.generator(o.seed, "independent codes")
    sides["independent codes"] = of_arrays(decode_independent_codes(vqvae, picked, rng))
    print_table({name: real.measure(images) for name, images in sides.items()})


@torch.no_grad()
def decode_independent_codes(vqvae: VQVAE, images: Images, rng: torch.Generator) -> torch.Tensor:
    """As many images (N, 1, 256, 256) uint8; codes are drawn from those that the images have at a position.

    This prior knows the codes of every position and nothing about their neighbours: a measure that it does well on says
    little.
    """
    codes = torch.cat([vqvae.encode(part.float() / 255) for part in images.pixels.split(32)])
    new_codes = codes.gather(0, torch.randint(len(codes), codes.shape, generator=rng))
    return torch.cat([to_bytes(vqvae.decode(part)) for part in new_codes.split(32)])


def print_table(measured: dict[str, dict[str, Interval]]) -> None:
    """Markdown: a row for each measure, with 95 % confidence intervals."""
    print("| measure | " + " | ".join(measured) + " |\n|---|" + "---:|" * len(measured))
    for name, text in MEASURES.items():
        print(f"| {text} | " + " | ".join(str(column[name]) for column in measured.values()) + " |")


if __name__ == "__main__":
    console.run_program(main, "measures.py")
