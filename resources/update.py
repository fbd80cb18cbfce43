"""Copy a run's figures to where README.md and docs/ show them, and draw its first picture.

    python resources/update.py RUN PREDICT     # a folder of train.py, and one of predict.py for its vqvae.pth
    python resources/update.py RUN             # of --dcgan-training report, whose curves are all there is to show

A run on phantoms goes to resources/phantoms/ and gives the pictures before and after, and its data the upper row of
resources/strip.png, whose other rows the pretrained weights draw. A run on real scans goes to resources/oasis/ and
gives only what shows no scan: scores and curves. A run of --only dcgan or --only flow, with a folder of predict.py
--prior, gives curves, generated images, and the prior of resources/pretrained/.
"""

import csv
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dataset import OasisDataset  # noqa: E402
from priors.checkpoints import load_vqvae  # noqa: E402
from report.plots import Figures  # noqa: E402
from support import files, seeds  # noqa: E402
from support.run import read_record  # noqa: E402
from training.prior import load_prior  # noqa: E402

OF_PHANTOMS = ("codebook_comparison", "codebook", "decoded")
OF_PHANTOMS_PREDICTED = ("best_recon_before", "best_recon", "worst_recon_before", "worst_recon")
OF_SCANS = ("train_ssim_scores", "train_recon_losses")
OF_SCANS_FLOW = ("flow_losses", "flow_texture")
OF_SCANS_GAN = ("gan_losses", "gan_measures", "gan_texture", "gan_epoch_0", "gan_epoch_1")


def main(run: Path, predicted: Path | None = None) -> None:
    record = read_record(run)
    options = record["options"]
    target = HERE / ("phantoms" if record["data"]["phantoms"] else "oasis")
    target.mkdir(exist_ok=True)
    generator = None
    if record["data"]["phantoms"]:
        shown = {run / f"{name}.png": name for name in OF_PHANTOMS}
        shown |= {predicted / f"{name}.png": name for name in OF_PHANTOMS_PREDICTED}
        for n, name in ((0, "0"), (1, "1"), (options["epochs"], "last")):
            shown |= {run / f"epoch_{n}{kind}.png": f"epoch_{name}{kind}" for kind in ("", "_single")}
        draw_strip(Path(record["data"]["folder"]))
    elif options.get("dcgan_training") == "report":
        shown = {run / "gan_losses.png": "gan_losses_report"}
    elif options["only"] == "dcgan":
        shown = {run / f"{name}.png": name for name in OF_SCANS_GAN}
        with open(run / "metrics.csv", newline="") as file:
            last = len(list(csv.DictReader(file)))  # of a run that may have been stopped
        shown |= {run / f"gan_epoch_{n}.png": f"gan_epoch_{n}" for n in (10, 33) if n <= last}
        shown[run / f"gan_epoch_{last}.png"] = "gan_epoch_last"
        shown[predicted / "walk.png"] = "walk"
        generator = run / "generator.pth"
    elif options["only"] == "flow":
        shown = {run / f"{name}.png": name for name in OF_SCANS_FLOW}
        shown[predicted / "samples.png"] = "flow_samples"
        shutil.copy(run / "flow.pth", HERE / "pretrained")  # in half precision already
    else:
        shown = {predicted / "test_ssim_scores.png": "test_ssim_scores"}
        shown |= {run / f"{name}.png": name for name in OF_SCANS}
        with open(run / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.pop("stage") == "vqvae"]
        numbers = [{key: float(value) for key, value in row.items() if value} for row in rows]
        Figures(target).rate_distortion("rate_distortion.png", [n | {"epoch": int(n["epoch"])} for n in numbers])
    for path, name in shown.items():
        shutil.copy(path, target / f"{name}.png")
    if generator:
        save_generator(generator)
    print(f"Wrote {target}")


def save_generator(path: Path) -> None:
    """In half precision, where a page of its own describes it."""
    contents = files.load(path)
    weights = contents["state_dict"]
    contents["state_dict"] = {key: w.half() if w.is_floating_point() else w for key, w in weights.items()}
    files.save(contents, HERE / "pretrained" / "generator.pth")


@torch.no_grad()
def draw_strip(data: Path) -> None:
    """Eight validation phantoms, what the pretrained VQ-VAE makes of them, and eight brains of each prior."""
    dataset = OasisDataset(data, "validate")
    x = dataset.batch([i * len(dataset) // 8 for i in range(8)])
    vqvae = load_vqvae(HERE / "pretrained" / "vqvae.pth")
    rows = [x, vqvae.decode(vqvae.encode(x))]
    for name in ("generator.pth", "flow.pth"):
        prior = load_prior(HERE / "pretrained" / name, vqvae)
        rows.append(prior.sample_images(prior.noise(8, seeds.generator(0, "samples"))))
    images = torch.cat(rows)
    title = "Synthetic slices; decoded from their 64×64 codes; new brains of the DCGAN; of the flow"
    Figures(HERE).image_grid("strip.png", images, title)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
