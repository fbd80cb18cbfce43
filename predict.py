"""Score a trained VQ-VAE on a split by SSIM, or decode new brains with a trained generator.

    python predict.py PATH/vqvae.pth                     # the test split of the data it was trained on
    python predict.py PATH/vqvae.pth --data DIR          # of the OASIS folder DIR
    python predict.py PATH/vqvae.pth --export-codes FILE.npz         # a split's codes, for other programs
    python predict.py PATH/vqvae.pth --generator PATH/generator.pth --samples 64     # new brains; needs no data
    python predict.py PATH/vqvae.pth --generator PATH/generator.pth --data DIR       # and measures of them

Everything goes to a new folder, gen_imgs/<date_time>_predict/: README.md says what is in it.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

import hardware
import metrics
import page
import parallel
import phantom
import plots
import runs
from dataset import SPLITS, DataError, OasisDataset, batches, find_data, say_skipped
from modules import VQVAE
from prior import Prior, walk

N_WALKS = 4
THRESHOLD = 0.6  # the report counts the images at or above it


def main(words: list[str] | None = None) -> None:
    o = parse(words)
    device = runs.choose_device(o.device)
    hardware.keep_freed_memory()
    path = runs.find(o.path)
    vqvae = runs.load(path, VQVAE.from_state_dict).to(device)
    if o.export_codes:
        dataset = load_split(o, path, device)
        export_codes(vqvae, dataset, Path(o.export_codes))
        print(f"Wrote the codes of the {len(dataset)} {o.split} images to {o.export_codes}")
        return
    if o.generator:
        prior = runs.load(runs.find(o.generator), lambda contents: Prior.from_checkpoint(contents, vqvae))
        splits = []
        if o.data is not None:
            for split in (o.split, "train"):
                splits.append(OasisDataset(find_data(o.data), split, device, runs.progress, o.skip_bad))
                say_skipped(splits[-1], split)
        seed, n = o.seed or 0, o.samples or 64
        on_phantoms = prior.phantoms or any(phantom.note(split.root) for split in splits)
        note = phantom.NOTE if on_phantoms else ""
        folder = draw_samples(prior, n, seed, o.out)
        facts = {"Brains": n, "Seed": seed, "VQ-VAE": path, "Generator": o.generator}
        if splits:
            measure_samples(prior, *splits, seed, folder, note)
            facts["Measured against"] = f"{o.split} split of {splits[0].root}"
        title = "New brains"
    else:
        dataset = load_split(o, path, device)
        note = phantom.note(dataset.root)
        folder, scores = score_split(vqvae, dataset, o.split, o.out, note)
        facts = {"SSIM, mean": f"{scores.mean():.4f}", "SSIM, range": f"{scores.min():.4f} to {scores.max():.4f}"}
        facts |= {"Split": f"{o.split}, {len(dataset)} images", "VQ-VAE": path, "Data": dataset.root}
        title = "Reconstructions scored"
    page.write(folder, title, facts | page.environment_facts(runs.environment(device)), note)
    if (folder.parent / "run.json").is_file():
        page.write_run(folder.parent)  # which names this page, too
    print(f"Look at {folder / 'index.html'}")


def load_split(o: argparse.Namespace, path: Path, device: torch.device) -> OasisDataset:
    record = runs.read_json(path.parent / "run.json")  # what train.py wrote beside the checkpoint
    dataset = OasisDataset(data_folder(o.data, record), o.split, device, runs.progress, o.skip_bad)
    say_skipped(dataset, o.split)
    return dataset


def data_folder(named: str | None, record: dict) -> Path:
    """--data, else the folder that the run recorded, else where train.py looks; never phantoms unasked."""
    recorded = record.get("data", {}).get("folder")
    if named is not None or not recorded:
        data = find_data(named)
        if data is None:
            raise DataError("no data: name the OASIS folder with --data (no run.json beside the checkpoint records it)")
        return data
    if not Path(recorded).is_dir():
        raise DataError(f"{recorded}: the folder that run.json records is not there; name the data with --data")
    return Path(recorded)


def score_split(vqvae: VQVAE, dataset: OasisDataset, split: str, out: str, note: str = "") -> tuple[Path, torch.Tensor]:
    """Print the report's four lines and draw the split's scores, its best and its worst image.

    Returns the folder, and SSIM of each image (N,).
    """
    scores = metrics.score(vqvae, dataset, runs.progress)
    ssim = scores.ssim
    folder = runs.new_folder(out, "_predict")
    with runs.atomically(folder / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "case", "slice", "ssim"])
        for i, value in enumerate(ssim.tolist()):
            writer.writerow([dataset.name(i), *dataset.case_and_slice(i), value])

    for name, i in (("best", int(ssim.argmax())), ("worst", int(ssim.argmin()))):
        x = dataset.__getitems__([i])
        with torch.no_grad():
            x_hat = vqvae(x)[1]
        title = f"{name.capitalize()} {split} image, {dataset.name(i)}"
        plots.single_image(folder / f"{name}_recon_before.png", x[0], title, note)
        plots.single_image(folder / f"{name}_recon.png", x_hat[0], f"Its reconstruction, SSIM {ssim[i]:.4f}", note)
        plots.comparison(folder / f"{name}_comparison.png", x[0], x_hat[0], ssim[i].item(), title, note)
    cases = [dataset.case_and_slice(i)[0] for i in range(len(dataset))]
    plots.scores(folder / f"{split}_ssim_scores.png", ssim, cases, THRESHOLD, f"SSIM of the {split} split", note)

    mark = phantom.mark(note)
    above = int((ssim >= THRESHOLD).sum())
    use = metrics.codebook_use(scores)
    print(f"PSNR mean: {scores.psnr.mean():.2f} dB, from {scores.psnr.min():.2f} to {scores.psnr.max():.2f} dB{mark}")
    print(
        f"Codes used: {use['codes_used']} of {scores.usage.shape[1]}, {use['codes_used_10_times']} of them 10 times or "
        f"more; perplexity {use['perplexity']:.1f}, in the foreground {use['foreground_perplexity']:.1f}{mark}"
    )
    print(
        f"Bits an image: {use['bits_raw']:.0f} for the codes as they are, entropy {use['bits_entropy']:.0f}; "
        f"by position {use['bits_adaptive']:.0f} adaptively, entropy {use['bits_entropy_by_position']:.0f}{mark}"
    )
    print(f"SSIM mean: {ssim.mean():.4f}{mark}")
    print(f"Min SSIM score: {ssim.min():.4f}{mark}")
    print(f"Max SSIM score: {ssim.max():.4f}{mark}")
    print(f"Number of images with SSIM >= {THRESHOLD}: {above}, {above / len(ssim):.2%}.{mark}")
    return folder, ssim


@torch.no_grad()
def export_codes(vqvae: VQVAE, dataset: OasisDataset, path: Path) -> None:
    """Write a split's codes for other programs, as a compressed .npz.

    Its arrays: codes (N, 64, 64) uint16; name (N,) of files; case and slice (N,) int64, -1 where a name has none;
    codebook (n_embeddings, D) float32.
    """
    codes = [vqvae.encode(x).cpu() for x in batches(dataset, range(len(dataset)))]
    numbers = np.array([[-1 if n is None else n for n in dataset.case_and_slice(i)] for i in range(len(dataset))])
    with runs.atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            codes=torch.cat(codes).numpy().astype(np.uint16),
            name=np.array([dataset.name(i) for i in range(len(dataset))]),
            case=numbers[:, 0].astype(np.int64),
            slice=numbers[:, 1].astype(np.int64),
            codebook=vqvae.vector_quantizer.embedding.weight.detach().cpu().numpy(),
        )


def draw_samples(prior: Prior, n: int, seed: int, out: str) -> Path:
    """Decode n new brains as a grid, samples.png, and one file each, and walks between others; returns the folder."""
    images = prior.sample_images(noise_vectors(prior, n, seed, "samples"), progress=runs.progress)
    note = phantom.NOTE if prior.phantoms else ""
    folder = runs.new_folder(out, "_predict")
    plots.image_grid(folder / "samples.png", images, f"{n} generated brains (seed {seed})", note)
    ends = noise_vectors(prior, 2 * N_WALKS, seed, "walks")
    path = torch.cat([walk(start, end, 8) for start, end in zip(ends[::2], ends[1::2], strict=True)])
    title = f"{N_WALKS} walks, each from one noise vector (left) to another (right)"
    plots.image_grid(folder / "walk.png", prior.sample_images(path, progress=runs.progress), title, note)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", f"generated, {note}" if note else "generated")
    for i, image in enumerate((images[:, 0] * 255).round().byte().cpu().numpy()):
        with runs.atomically(folder / f"sample_{i:03d}.png") as temporary:
            Image.fromarray(image).save(temporary, format="PNG", pnginfo=comment)
    print(f"Decoded {n} new brains.{phantom.mark(note)}")
    return folder


def noise_vectors(prior: Prior, n: int, seed: int, stream: str) -> torch.Tensor:
    noise = torch.randn(n, prior.noise_dim, 1, 1, generator=runs.random_generator(seed, stream))
    return noise.to(prior.scale.shift.device)


@torch.no_grad()
def measure_samples(prior: Prior, held_out, train, seed: int, folder: Path, note: str = "") -> None:
    """Print how far generated brains are from held-out images, and write it to measures.csv.

    As many brains are generated as there are held-out images. Beside each value stands what it is to be compared with;
    for distances that is the same of reconstructed training images, which pass the same decoder.
    """
    n = min(len(held_out), len(train))
    generated = prior.sample_images(noise_vectors(prior, n, seed, "measures"), progress=runs.progress)
    real = held_out.__getitems__(range(n))
    random = runs.random_generator(seed, "measured images")
    picked = torch.randperm(len(train), generator=random)[:n].tolist()
    floor = metrics.reconstruct(prior.vqvae, train, picked)
    independent = decode_independent_codes(prior.vqvae, train, picked, runs.random_generator(seed, "independent codes"))
    # the same patches and directions for all, and for train.py
    sides = [
        metrics.distances(real, side, runs.derived_seed(seed, "measures")) for side in (generated, floor, independent)
    ]
    cases = [held_out.case_and_slice(i)[0] for i in range(n)]
    # the training images pass once
    images = torch.cat([generated, metrics.reconstruct(prior.vqvae, held_out, range(n)), independent])
    nearest = metrics.nearest_distances(images, batches(train, range(len(train)), 512)).split(n)
    names = {f"swd_{256 >> level}": f"sliced Wasserstein distance, {256 >> level} pixels" for level in range(5)}
    names |= {"swd_mean": "sliced Wasserstein distance, mean", "grey_values": "distance of grey values"}
    rows = [(text, *(side[name] for side in sides), "reconstructed training images") for name, text in names.items()]
    groups = (generated, range(n)), (real, cases), (independent, range(n))
    alike = [metrics.diversity(side, belongs, random) for side, belongs in groups]
    rows.append(("MS-SSIM of pairs", *alike, "held-out pairs of different cases"))
    near = [part.quantile(0.05).item() for part in nearest]
    text = "distance to the nearest training image, 5th percentile"
    rows.append((text, *near, "reconstructed held-out images"))
    with runs.atomically(folder / "measures.csv") as temporary, open(temporary, "w", newline="") as file:
        head = ("measure", "generated", "beside", "independent codes", "what stands beside")
        csv.writer(file).writerows([head, *rows])
    for name, value, other, worst, what in rows:
        print(f"{name}: {value:.4f} ({what}: {other:.4f}; independent codes: {worst:.4f}){phantom.mark(note)}")


def decode_independent_codes(vqvae: VQVAE, dataset: OasisDataset, picked: list[int], random) -> torch.Tensor:
    """As many images as are picked, their codes drawn at each position from those that the picked have there.

    A prior that knows every position's codes and nothing about their neighbours: what it reaches, a measure gives away.
    """
    codes = torch.cat([vqvae.encode(x) for x in batches(dataset, picked)])
    drawn = torch.randint(len(codes), codes.shape, generator=random).to(codes.device)
    return torch.cat([vqvae.decode(part).clamp(0, 1) for part in codes.gather(0, drawn).split(32)])


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="vqvae.pth of a run, as given or under gen_imgs/")
    parser.add_argument("--out", metavar="DIR", default="gen_imgs", help="where the folder is made (default: gen_imgs)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group = parser.add_argument_group("scans")
    group.add_argument("--data", metavar="DIR", help="OASIS folder (default: what run.json beside PATH records)")
    group.add_argument("--split", choices=SPLITS, default="test", help="which images (default: test)")
    group.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, and say so")
    text = "write the split's codes to this .npz file, instead of scores"
    group.add_argument("--export-codes", metavar="FILE", help=text)
    group = parser.add_argument_group("new brains, instead of scores")
    group.add_argument("--generator", metavar="PATH", help="generator.pth that was trained with this vqvae.pth")
    count = runs.number(int, 1, "a whole number from 1 to 1000000", below=1_000_001)
    seed = runs.number(int, 0, "a whole number from 0 to 2147483647", below=2**31)
    group.add_argument("--samples", metavar="N", type=count, help="how many (default: 64)")
    group.add_argument("--seed", metavar="S", type=seed, help="of the noise (default: 0)")
    o = parser.parse_args(words)
    if o.export_codes and (Path(o.export_codes).is_dir() or not Path(o.export_codes).parent.is_dir()):
        parser.error(f"argument --export-codes: {o.export_codes}: is a folder, or in one that is not there")
    if o.export_codes and o.generator:
        parser.error("--export-codes and --generator contradict each other; give one of them")
    for name, value in (("--samples", o.samples), ("--seed", o.seed)):
        if value is not None and not o.generator:
            parser.error(f"{name} is for new brains; name the generator.pth with --generator, or leave it out")
    if o.generator and o.data is None and (o.split != "test" or o.skip_bad):
        parser.error("--split and --skip-bad are for scans; name those with --data, or leave them out")
    if o.generator and o.split == "train":
        parser.error("--split train: brains of a generator are measured against images that it was not trained on")
    return o


if __name__ == "__main__":
    parallel.run(main, "predict.py", (DataError, runs.RunError))
