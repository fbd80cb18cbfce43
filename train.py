"""Train the VQ-VAE on brain slices, then the DCGAN on its latents.

    python train.py                                      # OASIS in ./keras_png_slices_data, or a demo on phantoms
    python train.py --data DIR                           # OASIS elsewhere; or set OASIS_DIR
    python train.py --resume gen_imgs/<run>              # go on after the last complete epoch
    python train.py --only gan --vqvae PATH/vqvae.pth    # the second stage alone
    torchrun --nproc-per-node=8 train.py --data DIR      # several processes, on a GPU each

Everything goes to a new folder, gen_imgs/<date_time>/: README.md says what is in it.
"""

import copy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import codebook
import gan
import hardware
import metrics
import options
import page
import parallel
import phantom
import plots
import runs
from dataset import (
    SPLITS,
    DataError,
    OasisDataset,
    batches,
    list_scans,
    make_loader,
    refuse_shared_cases,
    say_skipped,
)
from modules import VQVAE, Discriminator, Generator, dcgan_init, load_checked, plain_state
from prior import Latents, LatentScale, Prior, brightness_of, codebook_hash

# At a constant rate the weights wander from update to update, and with them the black background's level, to which
# SSIM is very sensitive. What is scored and kept is an exponential average of them.
AVERAGE_DECAY = 0.99

CHECK_EVERY = 50  # updates between looks at whether the loss is finite, for which a GPU has to wait
MEASURED = 10  # times in a run that generated brains are compared with the validation split


def main(words: list[str] | None = None) -> None:
    given = options.parse(words, __doc__)
    if given.pop("dry_run", False):
        options.print_plan(given)
        return
    runs.stop_at_signals()
    parallel.start()
    run = parallel.from_first(lambda: options.open_run(given))
    try:
        train(run)
    except runs.Stopped:
        print(options.how_to_go_on(run), file=sys.stderr)
        raise
    print(f"Done. Look at {run.folder}")
    parallel.stop()


def train(run: runs.Run) -> None:
    """Both stages of a run, from its options to its figures."""
    o = SimpleNamespace(**run.options)
    device = runs.choose_device(o.device)
    data, note = Path(o.data), phantom.note(o.data)
    counts = {split: len(list_scans(data, split)) for split in SPLITS}
    if not o.allow_shared_cases:
        refuse_shared_cases(data)
    train_set = OasisDataset(data, "train", device, runs.progress, o.skip_bad)
    validate_set = OasisDataset(data, "validate", device, runs.progress, o.skip_bad)
    for split, dataset in (("train", train_set), ("validate", validate_set)):
        say_skipped(dataset, split)
        counts[split] = len(dataset)

    path = parallel.from_first(lambda: options.choose_fast_path(run, device, counts["train"]))
    path.set_up()
    run.options["fast_path"] = path._asdict()
    if parallel.is_first():
        run.begin(device, {"folder": o.data, "phantoms": bool(note), "images": counts})
    n_images = f"{counts['train']} training, {counts['validate']} validation images"
    processes = f"{parallel.world()} processes, " if parallel.world() > 1 else ""
    print(f"Data: {data} ({n_images}){phantom.mark(note)}")
    print(
        f"Device: {device}. Folder: {run.folder}. Interrupted after an epoch, go on by: {options.resume_command(run)}"
    )
    print(f"Fast path: {processes}{path}", flush=True)

    if o.only == "gan":
        vqvae = parallel.from_first(lambda: runs.load(Path(o.vqvae), VQVAE.from_state_dict))
        if parallel.is_first():
            runs.save(plain_state(vqvae), run.folder / "vqvae.pth")  # so that the folder is complete in itself
    else:
        vqvae = train_vqvae(train_set, validate_set, run, device, note)
    if o.only != "vqvae":
        train_gan(vqvae.to(device), train_set, validate_set, run, device, note)


def train_vqvae(train_set: OasisDataset, validate_set: OasisDataset, run: runs.Run, device, note: str = "") -> VQVAE:
    """Train the VQ-VAE by eq. 3 of arXiv 1711.00937 and keep the epoch of highest mean validation SSIM as vqvae.pth.

    Goes on from run.state["vqvae"] where there is one, and writes figures, metrics.csv and resume.pth each epoch.

    Args:
        train_set, validate_set: with batches on `device`.
        run: its options give epochs, batch_size, lr, beta, n_embeddings, embeddings_dim, codebook (a way
            of `codebook.WAYS`), seed and fast_path (the fields of a `hardware.FastPath`).
        note: where the data come from, if they are phantoms; goes into every figure.

    Returns:
        The network kept as vqvae.pth, on the CPU.

    Raises:
        runs.RunError: the loss is not finite.
    """
    o = SimpleNamespace(**run.options)
    path = hardware.FastPath(**run.options["fast_path"])
    torch.manual_seed(runs.derived_seed(o.seed, "vqvae weights"))
    model = VQVAE(o.n_embeddings, o.embeddings_dim, o.beta).to(device, memory_format=path.layout)
    average = copy.deepcopy(model)
    optimizer = path.adam(model, o.lr)
    state = run.state.setdefault("vqvae", {"epoch": 0, "losses": []})
    way = codebook.WAYS[o.codebook](model.vector_quantizer, optimizer)
    if state["epoch"]:
        with runs.restoring(run):
            load_checked(model, state["model"])
            load_checked(average, state["average"])
            path.restore(optimizer, state["optimizer"])
            way.restore(state)
            state["losses"] = [float(loss) for loss in state["losses"]]
    path.compile(model)
    network = parallel.distributed(model)

    n_shown = min(32, len(train_set))
    shown = train_set.__getitems__([i * len(train_set) // n_shown for i in range(n_shown)])
    if state["epoch"] == 0 and parallel.is_first():
        plots.image_grid(run.folder / "epoch_0.png", shown, f"{n_shown} training images", note)
        plots.single_image(run.folder / "epoch_0_single.png", shown[0], "A training image", note)

    for epoch in range(state["epoch"] + 1, o.epochs + 1):
        random = runs.random_generator(o.seed, "vqvae", epoch)
        loader = make_loader(train_set, o.batch_size, random)
        sizes = batch_sizes(len(train_set), o.batch_size)
        update = (epoch - 1) * len(loader)
        started = time.perf_counter()
        seen = []
        model.train()
        with runs.progress(total=len(train_set), desc=f"VQ-VAE epoch {epoch}/{o.epochs}", unit=" images") as bar:
            for x, n in zip(loader, sizes, strict=True):
                weight = parallel.weight(n)
                way.before_update(update, lambda x=x: batch_latents(model, x, path), n, random)
                recon_loss, vq_loss, codes = update_vqvae(network, optimizer, x, path, weight)
                if weight:
                    way.after_update(codes)
                update += 1
                if update % CHECK_EVERY == 0:
                    check_finite(recon_loss[None], f"VQ-VAE epoch {epoch}", update)
                update_average(average, model, update, AVERAGE_DECAY)
                seen.append(torch.stack([recon_loss, vq_loss]) * weight)
                bar.update(n)
        seen = parallel.total(torch.stack(seen))  # (updates, 2)
        check_finite(seen, f"VQ-VAE epoch {epoch}", update)
        check_finite(flat_weights(model), f"VQ-VAE epoch {epoch}", update)  # the last step's loss was before that step
        seconds = time.perf_counter() - started  # a GPU has done all of it now

        scores = metrics.score(average, validate_set, runs.progress, parallel.rank(), parallel.world())
        scores = metrics.Scores(*(parallel.total(part) for part in scores))
        check_finite(scores.ssim[None], f"VQ-VAE epoch {epoch}", update)
        state |= {"epoch": epoch, "losses": state["losses"] + seen[:, 0].tolist()} | way.state()
        state |= {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        if parallel.is_first():
            row = epoch_row("vqvae", epoch, len(seen), len(train_set), seconds)
            losses = means_by_image({"training_loss": seen[:, 0], "vq_loss": seen[:, 1]}, sizes)
            end_vqvae_epoch(average, shown, row | losses, scores, run, note)

    if parallel.is_first():
        best = max(run.rows_of("vqvae"), key=lambda row: row["ssim_mean"])
        print(f"Best epoch: {best['epoch']}, validation SSIM {best['ssim_mean']:.4f}{phantom.mark(note)}", flush=True)
    kept = parallel.from_first(lambda: runs.load(run.folder / "vqvae.pth", VQVAE.from_state_dict))
    if parallel.is_first():
        draw_codes(kept.to(device), validate_set, run, note)
        page.write_run(run.folder)
    return kept.cpu()


@torch.no_grad()
def batch_latents(model: VQVAE, x: Tensor, path: hardware.FastPath) -> Tensor:
    """z_e (B, D, 64, 64) float32 of images x, as training computes them."""
    with path.autocast():
        return model.latents(x).float()


def update_vqvae(
    network: nn.Module, optimizer, x: Tensor, path: hardware.FastPath, weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on images x (B, 1, 256, 256); returns its reconstruction loss, its vq_loss and the codes.

    `weight` is this process's share of the batch.
    """
    with path.autocast():
        vq_loss, x_hat, _, codes = network(x)
    recon_loss = F.mse_loss(x_hat, x)
    optimizer.zero_grad()
    ((recon_loss + vq_loss) * weight * parallel.world()).backward()  # which averages over processes
    optimizer.step()
    return recon_loss.detach(), vq_loss.detach(), codes


def end_vqvae_epoch(model: VQVAE, shown: Tensor, row: dict, scores: metrics.Scores, run: runs.Run, note: str) -> None:
    """Print, draw and save what an epoch gave."""
    row = row | {
        "ssim_mean": scores.ssim.mean().item(),
        "ssim_min": scores.ssim.min().item(),
        "ssim_max": scores.ssim.max().item(),
        "psnr_mean": scores.psnr.mean().item(),
    }
    row |= metrics.codebook_use(scores)
    print_vqvae_epoch(row, scores.usage.shape[1], note)
    best_before = max((r["ssim_mean"] for r in run.rows_of("vqvae")), default=-1.0)
    run.rows.append(row)
    if row["ssim_mean"] > best_before:
        runs.save(plain_state(model), run.folder / "vqvae.pth")
    draw_vqvae_epoch(model, shown, row["epoch"], run, note)
    run.save()
    page.write_run(run.folder)


@torch.no_grad()
def draw_vqvae_epoch(model: VQVAE, shown: Tensor, epoch: int, run: runs.Run, note: str) -> None:
    x_hat = model.eval()(shown)[1]
    plots.image_grid(run.folder / f"epoch_{epoch}.png", x_hat, f"Reconstructions after epoch {epoch}", note)
    plots.single_image(run.folder / f"epoch_{epoch}_single.png", x_hat[0], f"Reconstruction after epoch {epoch}", note)
    rows = run.rows_of("vqvae")
    ssim = [[row[key] for row in rows] for key in ("ssim_mean", "ssim_min", "ssim_max")]
    plots.ssim_by_epoch(run.folder / "train_ssim_scores.png", *ssim, note)
    updates, means = [row["updates"] for row in rows], [row["training_loss"] for row in rows]
    plots.recon_losses(run.folder / "train_recon_losses.png", run.state["vqvae"]["losses"], updates, means, note)
    rows = [row for row in rows if "psnr_mean" in row]  # those of an older version have none
    plots.rate_distortion(run.folder / "rate_distortion.png", rows, note)


def draw_codes(model: VQVAE, validate_set: OasisDataset, run: runs.Run, note: str) -> None:
    x = validate_set.__getitems__([0])
    codes = model.encode(x)
    n = model.vector_quantizer.embedding.num_embeddings
    plots.single_image(run.folder / "codebook_comparison.png", x[0], "First validation image, as it is", note)
    usage = torch.zeros(n, dtype=torch.long)
    for some in batches(validate_set, range(len(validate_set))):
        usage += torch.bincount(model.encode(some).flatten().cpu(), minlength=n)
    plots.code_map(run.folder / "codebook.png", codes[0], usage, "First validation image, its 64×64 codes", note)
    plots.single_image(
        run.folder / "decoded.png", model.decode(codes)[0], "First validation image, decoded from its codes", note
    )


def train_gan(
    vqvae: VQVAE, train_set: OasisDataset, validate_set: OasisDataset, run: runs.Run, device, note: str = ""
) -> Prior:
    """Train the DCGAN on the training split's latents (arXiv 1511.06434), in one of the ways of `gan.WAYS`.

    Samples are drawn with an average of the generator's weights; generated latents are snapped to embeddings and
    decoded. Ten times in a run they are compared with the validation split.

    Goes on from run.state["gan"] where there is one; writes figures, weights, metrics.csv and resume.pth each epoch.

    Args:
        vqvae: the trained network, on `device`.
        train_set, validate_set: with batches on `device`.
        run: its options give gan_epochs, gan_batch_size, gan_lr, gan_betas, gan_training, seed and fast_path.
        note: where the data come from, if they are phantoms; goes into every figure.

    Returns:
        The trained prior.

    Raises:
        runs.RunError: the loss is not finite, or a resumed run's vqvae.pth is not the one that it began with.
    """
    o = SimpleNamespace(**run.options)
    path = hardware.FastPath(**run.options["fast_path"])
    state = run.state.setdefault("gan", {"epoch": 0, "history": {key: [] for key in gan.COLUMNS}})
    codebook_now = codebook_hash(vqvae)
    if state.setdefault("codebook", codebook_now) != codebook_now:
        raise runs.RunError(f"{run.folder / 'vqvae.pth'}: has changed since the DCGAN began; start a new run with it")
    way = gan.WAYS[o.gan_training]
    if not state["epoch"]:
        scale = LatentScale.of_codebook(vqvae) if way.quantized else LatentScale.fit(vqvae, train_set)
        # all processes, and a resumed run, must see the same to the last bit
        state["scale"] = parallel.from_first(lambda: [part.cpu() for part in scale])
    with runs.restoring(run):
        scale = LatentScale(*(part.to(device) for part in state["scale"]))
    latents = Latents(vqvae, train_set, scale, way.quantized, runs.progress, state.get("stored"))
    state["stored"] = latents.stored
    kept = "kept in memory" if latents.stored else "too many for memory, so encoded afresh for each batch"
    print(f"DCGAN: {len(latents)} latents, {kept}", flush=True)
    torch.manual_seed(runs.derived_seed(o.seed, "gan weights"))
    embeddings_dim = vqvae.vector_quantizer.embedding.embedding_dim
    generator = Generator(embeddings_dim=embeddings_dim).apply(dcgan_init).to(device, memory_format=path.layout)
    discriminator = Discriminator(embeddings_dim).apply(dcgan_init).to(device, memory_format=path.layout)
    average = copy.deepcopy(generator)
    prior = Prior(average, scale, vqvae, phantoms=bool(note))
    nets = {"generator": generator, "discriminator": discriminator, "average": average}
    optimizers = {
        "generator_optimizer": path.adam(generator, o.gan_lr, o.gan_betas),
        "discriminator_optimizer": path.adam(discriminator, o.gan_lr, o.gan_betas),
    }
    way = way(generator, discriminator, optimizers.values())
    if state["epoch"]:
        with runs.restoring(run):
            for name, net in nets.items():
                load_checked(net, state[name])
            state["history"] = {key: [float(value) for value in state["history"][key]] for key in gan.COLUMNS}
            for name, optimizer in optimizers.items():
                path.restore(optimizer, state[name])
            way.restore(state)

    def noise(n: int, random: torch.Generator) -> Tensor:
        return torch.randn(n, prior.noise_dim, 1, 1, generator=random)

    shown = noise(64, runs.random_generator(o.seed, "gan samples"))
    if way.calibrated:
        looked_at = range(0, len(train_set), -(-len(train_set) // 128))
        brightness = brightness_of(metrics.reconstruct(vqvae, train_set, looked_at))

    def draw_samples(epoch: int, when: str) -> None:
        images = prior.sample_images(shown.to(device), progress=runs.progress)
        plots.image_grid(run.folder / f"gan_epoch_{epoch}.png", images, f"Decoded from 64 noise vectors, {when}", note)

    if parallel.is_first():
        measured = noise(min(len(validate_set), len(train_set)), runs.random_generator(o.seed, "measures"))
        real_images = validate_set.__getitems__(range(len(measured)))

    def distances(images: Tensor) -> dict[str, float]:
        return metrics.distances(real_images, images, runs.derived_seed(o.seed, "measures"))

    if state["epoch"] == 0 and parallel.is_first():
        draw_samples(0, "before training")
        picked = torch.randperm(len(train_set), generator=runs.random_generator(o.seed, "measured images"))
        state["floor"] = distances(metrics.reconstruct(vqvae, train_set, picked[: len(measured)].tolist()))

    for epoch in range(state["epoch"] + 1, o.gan_epochs + 1):
        random = runs.random_generator(o.seed, "gan", epoch)
        started = time.perf_counter()
        loader = make_loader(latents, o.gan_batch_size, random)
        sizes = batch_sizes(len(latents), o.gan_batch_size)
        update = (epoch - 1) * len(loader)
        seen = []
        generator.train()
        discriminator.train()
        with runs.progress(total=len(latents), desc=f"DCGAN epoch {epoch}/{o.gan_epochs}", unit=" images") as bar:
            for real, n in zip(loader, sizes, strict=True):
                weight = parallel.weight(n)
                values = way.update(real, parallel.part(noise(n, random)).to(device, non_blocking=True), weight)
                seen.append(values * weight)
                update += 1
                if update % CHECK_EVERY == 0:
                    check_finite(values[None], f"DCGAN epoch {epoch}", update)
                update_average(average, generator, update, way.average_decay)
                bar.update(n)
        seen = parallel.total(torch.stack(seen))  # (updates, 4)
        check_finite(seen, f"DCGAN epoch {epoch}", update)
        for net in nets.values():
            check_finite(flat_weights(net), f"DCGAN epoch {epoch}", update)
        seconds = time.perf_counter() - started

        columns = dict(zip(gan.COLUMNS, seen.T, strict=True))
        row = epoch_row("gan", epoch, len(seen), len(latents), seconds) | means_by_image(columns, sizes)
        row |= {key: value.item() for key, value in way.state().items()}
        if way.calibrated:
            prior.calibrate(brightness, scale, noise(32, runs.random_generator(o.seed, "calibration")).to(device))
        if parallel.is_first():  # before the state says that the epoch is complete: a signal may end the program here
            draw_samples(epoch, f"the same for all epochs, after epoch {epoch}")
            if epoch * MEASURED // o.gan_epochs > (epoch - 1) * MEASURED // o.gan_epochs:
                row |= distances(prior.sample_images(measured.to(device), progress=runs.progress))
        state |= (
            {"epoch": epoch} | {name: part.state_dict() for name, part in (nets | optimizers).items()} | way.state()
        )
        for key, values in columns.items():
            state["history"][key] = state["history"][key] + values.tolist()
        if parallel.is_first():
            end_gan_epoch(prior, discriminator, row, run, note)
    return prior


def end_gan_epoch(prior: Prior, discriminator: Discriminator, row: dict, run: runs.Run, note: str) -> None:
    """Print, draw and save what an epoch gave."""
    state = run.state["gan"]
    print_gan_epoch(row, state["floor"], note)
    run.rows.append(row)
    runs.save(prior.checkpoint(), run.folder / "generator.pth")
    runs.save(plain_state(discriminator), run.folder / "discriminator.pth")
    plots.gan_losses(run.folder / "gan_losses.png", state["history"], note)
    measured = [row for row in run.rows_of("gan") if "swd_mean" in row]
    if measured:
        plots.gan_measures(run.folder / "gan_measures.png", measured, state["floor"], note)
    run.save()
    page.write_run(run.folder)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, update: int, decay: float) -> None:
    """Move the averaged weights, and the BatchNorm statistics that belong to them, towards the model's.

    Update 1, 2, … of a run: the average is over about the last quarter of the run, at most 1 / (1 - decay) updates.
    """
    step = 1 - min(decay, (1 + update) / (4 + update))
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, step)
        else:
            kept.copy_(new)


def epoch_row(stage: str, epoch: int, updates: int, n_images: int, seconds: float) -> dict:
    """What the rows of both stages in metrics.csv begin with."""
    speed = {"seconds": round(seconds, 2), "images_per_second": round(n_images / seconds, 2)}
    return {"stage": stage, "epoch": epoch, "updates": updates} | speed


def batch_sizes(n_images: int, batch_size: int) -> list[int]:
    """How many images each update of an epoch sees: the last batch may be smaller."""
    return [min(batch_size, n_images - start) for start in range(0, n_images, batch_size)]


def means_by_image(by_update: dict[str, Tensor], sizes: list[int]) -> dict[str, float]:
    """Means over images of batch means."""
    return {
        key: (values.cpu().double() @ torch.tensor(sizes).double()).item() / sum(sizes)
        for key, values in by_update.items()
    }


def flat_weights(model: nn.Module) -> Tensor:
    """All parameters as one row (1, n), in float32."""
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])[None]


def check_finite(values: Tensor, where: str, update: int) -> None:
    """Raise RunError if one of some values (updates, …), the last of which are those of `update`, is not finite."""
    bad = ~values.isfinite().reshape(len(values), -1).all(1)
    if bad.any():
        first = update - len(values) + 1 + int(bad.nonzero()[0])
        raise runs.RunError(
            f"{where}, update {first}: loss or weights not finite; try a lower learning rate (complete epochs are kept)"
        )


def print_vqvae_epoch(row: dict, n_embeddings: int, note: str) -> None:
    print(f"Epoch: {row['epoch']}")
    print(f"Training loss: {row['training_loss']}{phantom.mark(note)}")
    print(f"Validation avg. SSIM loss: {row['ssim_mean']}{phantom.mark(note)}")
    print(f"Max SSIM loss: {row['ssim_max']}{phantom.mark(note)}")
    print(f"Min SSIM loss: {row['ssim_min']}{phantom.mark(note)}")
    print(
        f"Codebook usage: {row['codes_used']} of {n_embeddings} codes, perplexity {row['perplexity']:.1f}, "
        f"in the foreground {row['foreground_perplexity']:.1f}; PSNR {row['psnr_mean']:.2f} dB{phantom.mark(note)}",
        flush=True,
    )


def print_gan_epoch(row: dict, floor: dict, note: str) -> None:
    mark = phantom.mark(note)
    print(f"Epoch: {row['epoch']}")
    print(f"Discriminator loss: {row['d_loss']:.4f}{mark}")
    print(f"Generator loss: {row['g_loss']:.4f}{mark}")
    print(f"D(x): {row['d_real']:.3f}, D(G(z)): {row['d_fake']:.3f}{mark}", flush=True)
    if "swd_mean" in row:
        print(
            f"Generated brains to validation split: sliced Wasserstein distance {row['swd_mean']:.1f} "
            f"(reconstructions: {floor['swd_mean']:.1f}), grey values {row['grey_values']:.3f} "
            f"({floor['grey_values']:.3f}){mark}",
            flush=True,
        )


if __name__ == "__main__":
    parallel.run(main, "train.py", (DataError, runs.RunError))
