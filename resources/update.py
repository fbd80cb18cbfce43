"""Copy a run's figures to where README.md and docs/ show them, and draw README.md's first picture.

    python resources/update.py RUN PREDICT     # a folder of train.py, and one of predict.py with its weights

The data of a run on phantoms give the upper rows of resources/strip.png and of resources/way.png, whose other rows the
pretrained weights draw. Of a run on real scans resources/oasis/ gets what shows no scan: scores, curves and generated
images; and resources/pretrained/ gets its weights.
"""

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dataset import OasisDataset
from priors.autoregressive import plane_condition
from priors.checkpoints import PRIORS, load_prior, load_vqvae
from report.plots import Figures
from support import console, seeds
from support.console import UserError
from support.run import read_record

OF_SCANS = ("train_ssim_scores", "test_ssim_scores")
OF_PRIORS = {
    "dcgan": ("gan_losses", "gan_measures", "samples"),
    "autoregressive": ("autoregressive_losses", "autoregressive_measures", "samples", "stack"),
}
WEIGHTS = {"vqvae": "vqvae.pth"} | {name: prior.weights[0] for name, prior in PRIORS.items()}
PLANES = range(2, 32, 4)  # of the brains in the strip


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, predicted = map(Path, sys.argv[1:])
    record = read_record(run)
    if not record:
        raise UserError(f"{run}: holds no run.json; name a folder of train.py")
    stage = record["options"]["only"] or "vqvae"
    if record["data"]["phantoms"]:
        draw_strip(Path(record["data"]["folder"]))
        draw_way(Path(record["data"]["folder"]))
        return
    shutil.copy(run / WEIGHTS[stage], HERE / "pretrained")
    for name in OF_PRIORS.get(stage, OF_SCANS):
        new_name = f"{stage}_{name}" if name in ("samples", "stack") else name
        for folder in (run, predicted):
            if (folder / f"{name}.png").exists():
                shutil.copy(folder / f"{name}.png", HERE / "oasis" / f"{new_name}.png")


@torch.no_grad()
def draw_strip(data: Path) -> None:
    """Eight validation phantoms, what the pretrained VQ-VAE makes of them, eight brains, and planes of one head."""
    dataset = OasisDataset(data, "validate")
    x = dataset.batch([i * len(dataset) // 8 for i in range(8)])
    vqvae = load_vqvae(HERE / "pretrained" / "vqvae.pth")
    prior = load_prior(HERE / "pretrained" / "autoregressive.pth", vqvae)
    rng = seeds.generator(0, "samples")
    brains = prior.decode(prior.sample(prior.noise(8, rng), plane_condition(torch.tensor(PLANES))))
    stack = prior.sample_stacks(prior.noise(32, rng)[None], range(32))[0, PLANES]
    images = torch.cat([x, vqvae.decode(vqvae.encode(x)), brains, prior.decode(stack)])
    title = "Synthetic slices; decoded from 64×64 codes; new brains; planes of one new head"
    Figures(HERE).image_grid("strip.png", images, title)


@torch.no_grad()
def draw_way(data: Path) -> None:
    """A validation phantom to its codes and back; and noise by the DCGAN to codes and a new slice."""
    vqvae = load_vqvae(HERE / "pretrained" / "vqvae.pth")
    prior = load_prior(HERE / "pretrained" / "generator.pth", vqvae)
    dataset = OasisDataset(data, "validate")
    x = dataset.batch([len(dataset) // 2])
    noise = prior.noise(1, seeds.generator(0, "samples"))
    z_e = vqvae.latents(x)
    codes = vqvae.encode(x)
    new_codes = prior.sample(noise)

    def shown(z: Tensor) -> Tensor:
        """What latents (1, D, 64, 64) are along the first direction of the prior's space, (64, 64)."""
        return ((z - prior.space.shift) * prior.space.directions[:, 0, None, None]).sum(1)[0]

    def embedded(codes: Tensor) -> Tensor:
        return shown(vqvae.vector_quantizer.look_up(codes))

    def decoded(codes: Tensor) -> Tensor:
        return vqvae.decode(codes)[0, 0].clamp(0, 1)

    coefficients = prior.coefficients(noise)
    panels = {
        "slice x, 256×256": x[0, 0],
        "encoder: z_e, 64×64×64": shown(z_e),
        "nearest embeddings: 64×64 codes": embedded(codes),
        "decoder: x̂, 256×256": decoded(codes),
        "noise z, 128": noise.view(8, 16),
        f"generator: coefficients, 64×64×{coefficients.shape[1]}": coefficients[0, 0],
        "latents, nearest embeddings: codes": embedded(new_codes),
        "decoder: a new slice": decoded(new_codes),
    }
    title = "Above: a slice to its codes and back. Below: noise to the codes of a new slice"
    Figures(HERE).panels("way.png", panels, title)


if __name__ == "__main__":
    console.run_program(main, "update.py")
