"""Score a trained VQ-VAE on a split by SSIM, decode new brains with a trained generator, or export codes.

    python predict.py PATH/vqvae.pth                     # the test split of the data that it was trained on
    python predict.py PATH/vqvae.pth --data DIR          # that of the OASIS folder DIR
    python predict.py PATH/vqvae.pth --export-codes FILE.npz                         # a split's codes
    python predict.py PATH/vqvae.pth --prior PATH/generator.pth --samples 64     # new brains; needs no data
    python predict.py PATH/vqvae.pth --prior PATH/generator.pth --data DIR       # and measures of them
    python predict.py PATH/vqvae.pth --prior PATH/autoregressive.pth --slice 0-31    # stacks of slices

Everything is written to a new folder, gen_imgs/<date_time>_predict/. docs/usage.md says what is in it.
"""

import argparse
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from dataset import SPLITS, TISSUES, DataError, OasisDataset, describe, find_data
from evaluation import Images, compare, reconstruction
from evaluation.generation import MOST_MEASURED, to_bytes
from evaluation.reconstruction import SCORE_BATCH
from modules import N_PLANES, VQVAE
from priors.autoregressive import AutoregressivePrior, likelihoods, plane_condition
from priors.checkpoints import PRIOR_NAMES, Prior, load_prior, load_vqvae
from priors.code_cache import CodeCache
from priors.dcgan import DCGANPrior, walk
from report import comparison as comparisons
from report import page
from report.plots import NOTE, Figures
from support import console, files, seeds
from support.console import SEED, Number, UserError, in_batches
from support.device import choose_device, exact_float32, keep_freed_memory
from support.run import environment, mark, new_folder, read_record

N_WALKS = 4
N_STACKS = 4  # heads with --slice 0-31, unless --samples gives a number
MOST_SHOWN, MOST_STACKS = 64, 8  # slices, or stacks, in the figure
AT_ONCE = 32  # samples in a batch; an autoregressive prior takes its planes in turn within a batch
THRESHOLD = 0.6  # of SSIM; images at or above it are counted, as in the report


@exact_float32()
def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    device = choose_device(o.device)
    keep_freed_memory()
    o.path = files.find(o.path)
    vqvae = load_vqvae(o.path).to(device)
    if o.export_codes:
        export_codes(o, vqvae)
    elif o.prior:
        generate(o, vqvae)
    else:
        score(o, vqvae)


@torch.no_grad()
def score(o: argparse.Namespace, vqvae: VQVAE) -> None:
    """Print the report's four lines, and draw the split's scores, its best and its worst image."""
    dataset = open_split(o, vqvae)
    labels = dataset.labels
    folder = new_folder(o.out, "_predict")  # first, because it may fail, and scoring is slow
    scores = reconstruction.score(vqvae, dataset, labels)
    ssim = scores.ssim
    columns = file_columns(dataset)
    columns["ssim"] = ssim.tolist()
    if labels is not None:
        for k, tissue in enumerate(TISSUES):
            for name, values in (("ssim", scores.tissue_ssim), ("psnr", scores.tissue_psnr)):
                column = [None if math.isnan(value) else value for value in values[:, k].tolist()]
                columns[f"{name}_{tissue.replace(' ', '_').lower()}"] = column
    files.write_csv(folder / "scores.csv", list(columns), list(zip(*columns.values(), strict=True)))
    figures = Figures(folder, dataset.phantoms)
    for name, i in (("best", int(ssim.argmax())), ("worst", int(ssim.argmin()))):
        x = dataset.batch([i])
        x_hat = vqvae(x)[1]
        title = f"{name.capitalize()} {o.split} image, {dataset.name(i)}"
        figures.single_image(f"{name}_recon_before.png", x[0], title)
        figures.single_image(f"{name}_recon.png", x_hat[0], f"Its reconstruction, SSIM {ssim[i]:.4f}")
        figures.comparison(f"{name}_comparison.png", x[0], x_hat[0], ssim[i].item(), title)
    figures.scores(f"{o.split}_ssim_scores.png", ssim, columns["case"], THRESHOLD, f"SSIM of the {o.split} split")
    print_scores(scores, mark(dataset.phantoms))
    facts = {"SSIM, mean": f"{ssim.mean():.4f}", "SSIM, range": f"{ssim.min():.4f} to {ssim.max():.4f}"}
    if labels is not None:
        facts["SSIM in the brain"] = f"{scores.tissue_ssim[:, 0].nanmean():.4f}"
    facts |= {"Split": f"{o.split}, {len(dataset)} images", "VQ-VAE": o.path}
    facts["Data"] = f"{dataset.root}: {describe(dataset)}"
    write_page(folder, "Reconstructions", facts, vqvae, dataset.phantoms)


def file_columns(dataset: OasisDataset) -> dict[str, Sequence]:
    """The first columns of a table with a row for each image."""
    cases, slices = zip(*map(dataset.case_and_slice, range(len(dataset))), strict=True)
    return {"file": [dataset.name(i) for i in range(len(dataset))], "case": cases, "slice": slices}


def print_scores(scores: reconstruction.Scores, end: str) -> None:
    """Print a line for each measure, with `end` after it."""
    psnr = scores.psnr
    ssim = scores.ssim
    n_embeddings = scores.usage.shape[1]
    usage = reconstruction.codebook_usage(scores)
    above = int((ssim >= THRESHOLD).sum())
    for tissue, tissue_ssim, tissue_psnr in zip(TISSUES, scores.tissue_ssim.T, scores.tissue_psnr.T, strict=True):
        if not tissue_ssim.isnan().all():
            print(f"In the {tissue}: SSIM {tissue_ssim.nanmean():.4f}, PSNR {tissue_psnr.nanmean():.2f} dB{end}")
    print(f"PSNR mean: {psnr.mean():.2f} dB, from {psnr.min():.2f} to {psnr.max():.2f} dB{end}")
    print(
        f"Codes used: {usage['codes_used']} of {n_embeddings} ({usage['codes_used_10_times']} at least 10 times); "
        f"perplexity {usage['perplexity']:.1f}, in the foreground {usage['foreground_perplexity']:.1f}{end}"
    )
    print(
        f"Bits per image: {usage['bits_raw']:.0f} uncompressed, entropy {usage['bits_entropy']:.0f}; "
        f"by position {usage['bits_adaptive']:.0f} adaptive, entropy {usage['bits_entropy_by_position']:.0f}{end}"
    )
    print(f"SSIM mean: {ssim.mean():.4f}{end}")
    print(f"Min SSIM score: {ssim.min():.4f}{end}")
    print(f"Max SSIM score: {ssim.max():.4f}{end}")
    print(f"Number of images with SSIM >= {THRESHOLD}: {above}, {above / len(ssim):.2%}.{end}")


def generate(o: argparse.Namespace, vqvae: VQVAE) -> None:
    """Decode new brains and walks between others. With --data, measure them against a split."""
    prior = load_prior(files.find(o.prior), vqvae)
    splits = []
    if o.slice and not isinstance(prior, AutoregressivePrior):
        raise UserError(f"--slice needs an autoregressive prior, and {o.prior} is not one; leave --slice out")
    if o.slice and (unknown := sorted(set(o.slice) - set(prior.planes))):
        raise UserError(f"--slice: {o.prior} was not trained on plane {unknown[0]}; leave it out, or name others")
    if o.data is not None:
        splits = [open_folder(find_data(o.data), split, o, vqvae) for split in (o.split, "train")]
    planes = o.slice or []
    seed = o.seed or 0
    n = o.samples or (N_STACKS if len(planes) > 1 else MOST_MEASURED if splits else 64)
    folder, fake = draw_samples(prior, n, seed, o.out, planes, keep=bool(splits))
    facts = {"Brains": n, "Seed": seed, "VQ-VAE": o.path, "Prior": o.prior}
    phantoms = prior.phantoms
    if splits:
        held_out, train = splits
        phantoms = phantoms or held_out.phantoms
        facts["Measured against"] = f"reconstructions of the {o.split} split of {held_out.root}"
        train_images = train.as_images()
        comparison = compare(held_out.as_images(), fake, vqvae, train_images, seed, "real")
        comparisons.write(folder, comparison, train_images, phantoms)
        facts |= {"Copies": comparisons.copies_line(comparison), "Sources of the measures": comparisons.SOURCES}
        if isinstance(prior, AutoregressivePrior):
            write_likelihood(folder, prior, held_out, phantoms)
    write_page(folder, "New brains", facts, vqvae, phantoms)


def draw_samples(
    prior: Prior, n: int, seed: int, out: str, planes: Sequence[int], keep: bool
) -> tuple[Path, Images | None]:
    """Write n generated slices to samples/, a figure of the first ones, and for the DCGAN a figure of walks.

    With one plane all slices are of it; with several, n heads have a slice of each. Each batch is written at once, so
    memory does not grow with n unless `keep`. Returns the folder, and with `keep` the slices.
    """
    started = time.perf_counter()
    stacked = len(planes) > 1
    folder = new_folder(out, "_predict")
    (folder / "samples").mkdir()
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", f"generated, {NOTE}" if prior.phantoms else "generated")
    n_shown = MOST_STACKS * len(planes) if stacked else MOST_SHOWN
    shown = []
    kept = []
    count = 0
    for names, images in new_slices(prior, n, seeds.generator(seed, "samples"), planes):
        pixels = to_bytes(images)
        for name, image in zip(names, pixels[:, 0].numpy(), strict=True):
            with files.atomically(folder / "samples" / name) as temporary:
                Image.fromarray(image).save(temporary, format="PNG", pnginfo=comment)
        shown += list(images[: max(0, n_shown - count)])
        kept += [(pixels, names)] if keep else []
        count += len(images)
    seconds = time.perf_counter() - started

    figures = Figures(folder, prior.phantoms)
    of = f" of {n}" if count > len(shown) else ""
    if stacked:
        title = f"Planes {planes[0]} to {planes[-1]}, one generated head in each row{of} (seed {seed})"
        figures.image_grid("stack.png", torch.stack(shown), title, planes)
    else:
        plane = f" at plane {planes[0]}" if planes else ""
        title = f"{len(shown)}{of} generated brains{plane} (seed {seed})"
        figures.image_grid("samples.png", torch.stack(shown), title)
    if isinstance(prior, DCGANPrior):
        draw_walks(prior, seed, figures)
    print(f"Decoded {count} new slices in {seconds:.1f} s.{mark(prior.phantoms)}")
    if not keep:
        return folder, None
    pixels, names = zip(*kept, strict=True)
    names = [name for part in names for name in part]
    return folder, Images(torch.cat(pixels), names, names)


def new_slices(prior: Prior, n: int, rng: torch.Generator, planes: Sequence[int]) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the file names and the slices (B, 1, 256, 256) of n samples or stacks, AT_ONCE at a time."""
    width = max(3, len(str(n - 1)))
    with console.progress(total=n, desc="Sampling", unit=" brains", disable=n <= AT_ONCE) as bar:
        for start in range(0, n, AT_ONCE):
            heads = range(start, min(n, start + AT_ONCE))
            names = [f"sample_{i:0{width}d}" for i in heads]
            noise = prior.noise(len(heads) * max(1, len(planes)), rng)
            if len(planes) > 1:
                codes = prior.sample_stacks(noise.unflatten(0, (len(heads), -1)), planes).flatten(0, 1)
                images = torch.cat([prior.decode(part) for part in codes.to(prior.device).split(SCORE_BATCH)])
                names = [f"{name}_slice_{plane:02d}" for name in names for plane in planes]
            else:
                images = prior.sample_images(noise, *planes)
            yield [f"{name}.png" for name in names], images
            bar.update(len(heads))


def draw_walks(prior: DCGANPrior, seed: int, figures: Figures) -> None:
    """Draw what a prior makes on walks from one noise vector to another."""
    ends = prior.noise(2 * N_WALKS, seeds.generator(seed, "walks"))
    walks = torch.cat([walk(start, end, 8) for start, end in zip(ends[::2], ends[1::2], strict=True)])
    title = f"{N_WALKS} walks, each from one noise vector (left) to another (right)"
    figures.image_grid("walk.png", prior.sample_images(walks), title)


def write_likelihood(folder: Path, prior: AutoregressivePrior, dataset: OasisDataset, phantoms: bool) -> None:
    """Write likelihood.csv, the bits of each slice, and print their mean, minimum and maximum.

    Slices are conditioned on their plane alone, and then also on the neighbours that come before them in the order of
    `halving`. Two figures show where the bits of the most and of the least likely slice are.
    """
    cache = CodeCache(prior.vqvae, dataset)
    figures = Figures(folder, phantoms)
    columns = file_columns(dataset)
    by_condition = likelihoods(prior, cache, torch.arange(len(cache)))
    for name, bits in by_condition.items():
        columns[f"bits_{name.replace(' ', '_')}"] = bits.tolist()
        numbers = f"mean {bits.mean():.0f}, from {bits.min():.0f} to {bits.max():.0f}"
        print(f"Bits per image, {name}: {numbers}{mark(phantoms)}")
    bits = by_condition["alone"]
    for kind, i in (("most", int(bits.argmin())), ("least", int(bits.argmax()))):
        title = f"The {kind} likely image, {dataset.name(i)}: {bits[i]:.0f} bits"
        bits_by_position = prior.bits(cache.batch([i]), plane_condition(cache.plane[[i]]))[0]
        figures.likelihood(f"{kind}_likely.png", dataset.batch([i])[0], bits_by_position, title)
    files.write_csv(folder / "likelihood.csv", list(columns), list(zip(*columns.values(), strict=True)))


@torch.no_grad()
def export_codes(o: argparse.Namespace, vqvae: VQVAE) -> None:
    """Write a split's codes for other programs, as a compressed .npz.

    Its arrays: codes (N, 64, 64) uint16; name (N,), of files; case and slice (N,) int64, -1 if a name has none;
    codebook (n_embeddings, D) float32.
    """
    dataset = open_split(o, vqvae)
    codes = torch.cat([vqvae.encode(x).cpu() for x in in_batches(dataset, desc="Encoding")])
    numbers = np.array([[-1 if n is None else n for n in dataset.case_and_slice(i)] for i in range(len(dataset))])
    with files.atomically(o.export_codes) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            codes=codes.numpy().astype(np.uint16),
            name=np.array([dataset.name(i) for i in range(len(dataset))]),
            case=numbers[:, 0].astype(np.int64),
            slice=numbers[:, 1].astype(np.int64),
            codebook=vqvae.vector_quantizer.embedding.weight.detach().cpu().numpy(),
        )
    print(f"Wrote the codes of the {len(dataset)} {o.split} images to {o.export_codes}")


def open_split(o: argparse.Namespace, vqvae: VQVAE) -> OasisDataset:
    """The split from --data, else from the folder in run.json, else from where train.py looks, but no demo data.

    Raises DataError if there is no such folder.
    """
    # what train.py wrote beside the checkpoint
    recorded = None if o.data is not None else read_record(o.path.parent).get("data", {}).get("folder")
    data = Path(recorded) if recorded else find_data(o.data)
    if data is None:
        raise DataError("no data: name its folder with --data; python -m preparation.phantoms DIR makes one")
    if not data.is_dir():
        raise DataError(f"{recorded}: the folder that run.json records is not there; name the data with --data")
    return open_folder(data, o.split, o, vqvae)


def open_folder(data: Path, split: str, o: argparse.Namespace, vqvae: VQVAE) -> OasisDataset:
    """A split with batches on the network's device."""
    with_labels = not (o.export_codes or o.prior)  # which scores need
    dataset = OasisDataset(data, split, vqvae.conv1.weight.device, o.skip_bad, with_labels)
    dataset.print_skipped()
    print(f"Data: {data}, {split} split: {describe(dataset)}")
    return dataset


def write_page(folder: Path, title: str, facts: dict[str, object], vqvae: VQVAE, phantoms: bool) -> None:
    """Write the folder's index.html, and that of the run around it, which links it."""
    facts = facts | page.environment_facts(environment(vqvae.conv1.weight.device))
    page.write(folder, title, facts, phantoms)
    if (folder.parent / "run.json").is_file():
        page.write_run(folder.parent)
    print(f"Look at {folder / 'index.html'}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, where they go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="vqvae.pth of a run, as given or under gen_imgs/")
    parser.add_argument("--out", metavar="DIR", default="gen_imgs", help="where the folder is made (default: gen_imgs)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group = parser.add_argument_group("scans")
    group.add_argument("--data", metavar="DIR", help="OASIS folder (default: the one in run.json beside PATH)")
    group.add_argument("--split", choices=SPLITS, help="which images (default: test; with --prior validate)")
    group.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, and list them")
    group.add_argument("--export-codes", metavar="FILE", help="write the split's codes to this .npz file; no scores")
    count = Number(int, 1, "a whole number from 1 to 1000000", below=1_000_001)
    group = parser.add_argument_group("new brains, instead of scores")
    group.add_argument("--prior", metavar="PATH", help=f"{PRIOR_NAMES} trained with this vqvae.pth")
    text = f"how many (default: 64; with --data {MOST_MEASURED}; stacks: {N_STACKS})"
    group.add_argument("--samples", metavar="N", type=count, help=text)
    group.add_argument("--seed", metavar="S", type=SEED, help="seed of the noise (default: 0)")
    text = f"only with an autoregressive prior: a plane, or the first and last plane of a stack, as in 0-{N_PLANES - 1}"
    group.add_argument("--slice", metavar="PLANES", type=parse_planes, help=text)
    o = parser.parse_args(argv)
    if o.export_codes:
        codes = Path(o.export_codes)
        if codes.suffix != ".npz" or codes.exists() and not codes.is_file() or not codes.parent.is_dir():
            parser.error(f"argument --export-codes: {codes}: must be an .npz file, in a folder that is there")
    if o.export_codes and o.prior:
        parser.error("--export-codes and --prior contradict each other; give one of them")
    of_priors = (("--samples", o.samples), ("--seed", o.seed), ("--slice", o.slice))
    for name, value in of_priors:
        if value is not None and not o.prior:
            parser.error(f"{name} is for generating; name a prior's file with --prior, or leave {name} out")
    if o.prior and o.data is None and (o.split or o.skip_bad):
        parser.error("--split and --skip-bad are for scans; name those with --data, or leave them out")
    if o.slice and o.data is not None:
        parser.error("--slice and --data contradict each other: slices of all planes are measured; give one of them")
    if o.prior and o.split == "train":
        parser.error("--split train: generated slices are compared with images that the prior was not trained on")
    o.split = o.split or ("validate" if o.prior else "test")  # the test split is for a model that is final
    return o


def parse_planes(word: str) -> list[int]:
    """The planes of --slice, such as "17" or "0-31"."""
    numbers = re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", word)
    planes = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1) if numbers else []
    if not planes or planes[-1] >= N_PLANES:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {N_PLANES - 1}, or two as 0-{N_PLANES - 1}")
    return list(planes)


if __name__ == "__main__":
    console.run_program(main, "predict.py")
