"""Copy a run's figures to where README.md shows them, and draw its first picture.

    python resources/update.py RUN PREDICT     # a folder of train.py, and one of predict.py for its vqvae.pth

A run on phantoms goes to resources/phantoms/, with images before and after, and resources/strip.png. A run on real
scans goes to resources/oasis/, and of it only what shows no scan: scores, curves and generated images.
"""

import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import plots  # noqa: E402
import runs  # noqa: E402
from dataset import OasisDataset  # noqa: E402
from modules import VQVAE  # noqa: E402

CURVES = ("train_ssim_scores", "train_recon_losses", "gan_losses")
PAIRS = ("best_recon_before", "best_recon", "worst_recon_before", "worst_recon")


def main(run: Path, predicted: Path) -> None:
    record = runs.read_json(run / "run.json")
    last, gan_last = record["options"]["epochs"], record["options"]["gan_epochs"]
    wanted = {f"gan_epoch_{n}": f"gan_epoch_{n}" for n in (0, 1, 2)} | {f"gan_epoch_{gan_last}": "gan_epoch_last"}
    wanted |= {name: name for name in CURVES}
    if record["data"]["phantoms"]:
        for kind in ("", "_single"):
            wanted |= {f"epoch_{n}{kind}": f"epoch_{n}{kind}" for n in (0, 1)} | {
                f"epoch_{last}{kind}": f"epoch_last{kind}"
            }
        wanted |= {name: name for name in ("codebook_comparison", "codebook", "decoded")}
        draw_strip(run, Path(record["data"]["folder"]))
    target = HERE / ("phantoms" if record["data"]["phantoms"] else "oasis")
    target.mkdir(exist_ok=True)
    for name, shown in wanted.items():
        shutil.copy(run / f"{name}.png", target / f"{shown}.png")
    for name in ("test_ssim_scores", *(PAIRS if record["data"]["phantoms"] else ())):
        shutil.copy(predicted / f"{name}.png", target / f"{name}.png")
    print(f"Wrote {target}")


@torch.no_grad()
def draw_strip(run: Path, data: Path) -> None:
    """Eight validation phantoms above their reconstructions."""
    dataset = OasisDataset(data, "validate", progress=runs.progress)
    x = dataset.__getitems__([i * len(dataset) // 8 for i in range(8)])
    vqvae = runs.load(run / "vqvae.pth", VQVAE.from_state_dict)
    images = torch.cat([x, vqvae.decode(vqvae.encode(x))])
    plots.image_grid(HERE / "strip.png", images, "Synthetic slices, and decoded from their 64×64 codes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
