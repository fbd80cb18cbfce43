"""Score anyone's generated images beside real ones, and look for copies of training images.

    python -m evaluation REAL FAKE                   # folders of 256x256 grey PNGs
    python -m evaluation REAL FAKE --train TRAIN     # and whether FAKE has copies of what it was trained on
    python -m evaluation DIR/keras_png_slices_test gen_imgs/RUN_predict/samples \\
        --train DIR/keras_png_slices_train --vqvae PATH/vqvae.pth --reconstruct real    # as predict.py --data DIR

REAL are images of subjects that the generator was not trained on. A file named case_C_slice_S… is of subject C; any
other file counts as a subject of its own. Results are written to a new folder, gen_imgs/<date_time>_evaluation/, and
shown by its index.html.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import DataError, ImageFolder, case_and_slice, printable, refuse_equal_images
from evaluation.generation import compare
from priors.checkpoints import load_vqvae
from report import comparison as comparisons
from report import page
from report.plots import Figures
from support import console, files
from support.console import SEED
from support.device import choose_device, keep_freed_memory
from support.run import environment, new_folder

VQVAE_PATH = Path(__file__).resolve().parent.parent / "resources" / "pretrained" / "vqvae.pth"
N_SHOWN = 64  # images of a side, spaced evenly


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = choose_device(options.device)
    keep_freed_memory()
    vqvae = load_vqvae(files.find(options.vqvae)).to(device)
    sides = {"REAL": options.real, "FAKE": options.fake} | ({"--train": options.train} if options.train else {})
    folders = {}
    for side, folder in sides.items():
        folders[side] = ImageFolder(Path(folder), skip_bad=options.skip_bad, place=side)
        folders[side].print_skipped()
        refuse_colour(folders[side])
    refuse_equal_images(folders["REAL"], folders["FAKE"], "REAL and FAKE must have no image in common")
    images = {side: folder.as_images() for side, folder in folders.items()}
    real = images["REAL"]
    fake = images["FAKE"]
    train = images.get("--train")
    if train is not None:
        advice = "REAL and --train must have no image in common"
        refuse_equal_images(folders["REAL"], folders["--train"], advice)
        refuse_shared_subjects(folders["REAL"], folders["--train"])
    folder = new_folder(options.out, "_evaluation")  # first, because it may fail, and measuring is slow
    comparison = compare(real, fake, vqvae, train, options.seed, options.reconstruct)
    comparisons.write(folder, comparison, train, phantoms=False)
    figures = Figures(folder)
    for name, side, text in (("fake.png", fake, options.fake), ("real.png", real, options.real)):
        shown = side.evenly_spaced(N_SHOWN)
        title = f"{len(shown)} of {len(side)} images of {printable(text)}"
        figures.image_grid(name, shown.pixels.float() / 255, title)
    facts = {}
    for side, each in images.items():
        facts[side] = f"{printable(sides[side])}: {len(each)} images of {len(set(each.subjects))} subjects"
    facts["Reconstructed"] = {"none": "nothing", "real": "REAL", "both": "REAL and FAKE"}[options.reconstruct]
    if comparison.copies is not None:
        facts["Copies"] = comparisons.copies_line(comparison)
    facts |= {"Missing": "; ".join(comparison.missing) or "nothing", "VQ-VAE": options.vqvae, "Seed": options.seed}
    facts["Sources of the measures"] = comparisons.SOURCES
    page.write(folder, "Generated images beside real ones", facts | page.environment_facts(environment(device)))
    print(f"Look at {folder / 'index.html'}")


def refuse_colour(folder: ImageFolder) -> None:
    """Raise DataError if an image has colours, which no measure sees."""
    for path in folder.files:
        with Image.open(path) as image:
            if image.mode in ("P", "RGB", "RGBA") and np.ptp(image.convert("RGB"), axis=2).any():
                raise DataError(f"{printable(path)}: is in colour; convert it to grey (preparation.images does)")


def refuse_shared_subjects(real: ImageFolder, train: ImageFolder) -> None:
    """Raise DataError if a subject is in both folders."""
    first, second = ({case_and_slice(path)[0] for path in side.files} for side in (real, train))
    shared = first & second - {None}
    if shared:
        case = min(shared)
        raise DataError(
            f"{printable(real.files[0].parent)}: case {case} is also in --train ({len(shared)} cases are); REAL "
            "must be of subjects that the generator was not trained on"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("real", metavar="REAL", help="folder of real images")
    parser.add_argument("fake", metavar="FAKE", help="folder of generated images")
    parser.add_argument("--train", metavar="TRAIN", help="folder of the images that the generator was trained on")
    parser.add_argument(
        "--vqvae",
        metavar="PATH",
        default=VQVAE_PATH,
        help="vqvae.pth whose encoder gives features (default: the "
        "pretrained one, for T1-weighted transverse slices of heads that lie as OASIS's)",
    )
    parser.add_argument(
        "--reconstruct",
        choices=("none", "real", "both"),
        default="none",
        help="real: reconstruct REAL with --vqvae, if FAKE was decoded by it; "
        "both: reconstruct REAL and FAKE with it (default: none)",
    )
    parser.add_argument("--seed", metavar="S", type=SEED, default=0, help="seed of random choices (default: 0)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, and list them")
    parser.add_argument("--out", metavar="DIR", default="gen_imgs", help="where the folder is made (default: gen_imgs)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    console.run_program(main, "evaluation")
