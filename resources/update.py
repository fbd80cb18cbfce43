"""Copy a run's figures to where README.md and docs/ show them, and draw README.md's first picture.

    python resources/update.py RUN PREDICT     # a folder of train.py, and one of predict.py with its weights

A run on phantoms goes to resources/phantoms/ and gives the pictures before and after, and its data the upper rows of
resources/strip.png, whose other rows the pretrained weights draw. A run on real scans goes to resources/oasis/ and
gives only what shows no scan: scores, curves and generated images; and its weights go to resources/pretrained/.
"""

import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dataset import OasisDataset  # noqa: E402
from priors.autoregressive import alone  # noqa: E402
from priors.checkpoints import PRIORS, load_autoregressive, load_vqvae  # noqa: E402
from report.plots import Figures  # noqa: E402
from support import seeds  # noqa: E402
from support.run import read_record  # noqa: E402

OF_PHANTOMS = ("codebook_comparison", "codebook", "decoded")
OF_PHANTOMS_PREDICTED = ("best_recon_before", "best_recon", "worst_recon_before", "worst_recon")
OF_SCANS = ("train_ssim_scores", "train_recon_losses", "test_ssim_scores")
OF_PRIORS = {
    "dcgan": ("gan_losses", "gan_measures", "samples"),
    "autoregressive": ("autoregressive_losses", "autoregressive_measures", "samples", "stack"),
}
WEIGHTS = {"vqvae": "vqvae.pth"} | {name: prior.weights[0] for name, prior in PRIORS.items()}
PLANES = range(2, 32, 4)  # of the brains in the strip


def main(run: Path, predicted: Path) -> None:
    record = read_record(run)
    options, stage = record["options"], record["options"]["only"] or "vqvae"
    if record["data"]["phantoms"]:
        target, names = HERE / "phantoms", {name: name for name in (*OF_PHANTOMS, *OF_PHANTOMS_PREDICTED)}
        for n, name in ((0, "0"), (1, "1"), (options["epochs"], "last")):
            names |= {f"epoch_{n}{kind}": f"epoch_{name}{kind}" for kind in ("", "_single")}
        draw_strip(Path(record["data"]["folder"]))
    else:
        target, names = HERE / "oasis", {name: name for name in OF_SCANS}
        if stage != "vqvae":
            names = {name: f"{stage}_{name}" if name in ("samples", "stack") else name for name in OF_PRIORS[stage]}
        shutil.copy(run / WEIGHTS[stage], HERE / "pretrained")
    for name, new_name in names.items():
        found = [folder / f"{name}.png" for folder in (run, predicted) if (folder / f"{name}.png").exists()]
        if found:
            shutil.copy(found[0], target / f"{new_name}.png")
    print(f"Wrote {target}")


@torch.no_grad()
def draw_strip(data: Path) -> None:
    """Eight validation phantoms, what the pretrained VQ-VAE makes of them, eight brains, and planes of one head."""
    dataset = OasisDataset(data, "validate")
    x = dataset.batch([i * len(dataset) // 8 for i in range(8)])
    vqvae = load_vqvae(HERE / "pretrained" / "vqvae.pth")
    prior = load_autoregressive(HERE / "pretrained" / "autoregressive.pth", vqvae)
    rng = seeds.generator(0, "samples")
    brains = prior.decode(prior.sample(prior.noise(8, rng), alone(torch.tensor(PLANES))))
    stack = prior.sample_stacks(prior.noise(32, rng)[None], range(32))[0, PLANES]
    images = torch.cat([x, vqvae.decode(vqvae.encode(x)), brains, prior.decode(stack)])
    title = "Synthetic slices; decoded from 64×64 codes; new brains; planes of one new head"
    Figures(HERE).image_grid("strip.png", images, title)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
