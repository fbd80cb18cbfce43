"""The VQ-VAE's training stage."""

import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import OasisDataset, picture_box
from evaluation import reconstruction
from modules import VQVAE
from priors.checkpoints import load_vqvae
from report import page
from report.plots import Figures
from support import distributed, files, seeds
from support.console import UserError, in_batches
from support.device import exact_float32
from support.run import Run
from training import codebook
from training.fit import Stage, batch_sizes, check_finite, rate_factor
from training.recipes import VQVAE as RECIPE

BLACK_EVERY = 8  # one of so many validation images tells what a black image has


class VQVAEStage(Stage):
    """Train the VQ-VAE by eq. 3 of arXiv 1711.00937. vqvae.pth has the EMA of the weights at the highest mean SSIM.

    Args:
        run, train_set, validate_set: all on the run's device.
    """

    name, title = "vqvae", "VQ-VAE"
    columns = ("training_loss", "vq_loss")
    chosen_by = ("ssim_mean", max, "validation SSIM {:.4f}")

    def __init__(self, run: Run, train_set: OasisDataset, validate_set: OasisDataset):
        super().__init__(run)
        options, self.fast_path = run.options, run.fast_path
        self.data = train_set
        self.validate_set = validate_set
        self.labels = validate_set.labels
        self.epochs, self.batch_size, self.lr = options.epochs, options.batch_size, options.lr
        self.average_decay = RECIPE.average_decay
        torch.manual_seed(seeds.derived_seed(options.seed, "vqvae weights"))
        self.vqvae = VQVAE(options.n_embeddings, options.embeddings_dim, options.beta)
        self.vqvae.to(run.device, memory_format=self.fast_path.layout)
        self.average = copy.deepcopy(self.vqvae)
        self.optimizer = self.fast_path.adam(self.vqvae, options.lr)
        self.codebook = codebook.METHODS[options.codebook](self.vqvae.vector_quantizer, self.optimizer)
        self.networks, self.averages = {"vqvae": self.vqvae}, {"vqvae": self.average}
        self.optimizers = {"vqvae": self.optimizer}
        self.kept = ""  # digest of the codebook in vqvae.pth
        self.box = picture_box(train_set.images)
        n_shown = min(32, len(train_set))
        self.shown = train_set.batch([i * len(train_set) // n_shown for i in range(n_shown)])
        self.figures = Figures(run.folder, run.phantoms)

    def start(self) -> None:
        if distributed.is_first():
            self.figures.image_grid("epoch_0.png", self.shown, f"{len(self.shown)} training images")
            self.figures.single_image("epoch_0_single.png", self.shown[0], "A training image")

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """One step on images (B, 1, 256, 256). Returns the reconstruction loss and the vq_loss, inside the box."""
        weight = distributed.weight(n)
        factor = rate_factor(step, self.n_steps, RECIPE.constant_rate, RECIPE.last_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        x = batch[..., *self.box]  # where all is black there is nothing to learn
        with self.fast_path.autocast():
            z_e = self.vqvae.latents(x)
        self.codebook.before_lookup(step, z_e.detach().float(), n, rng)
        with self.fast_path.autocast():
            vq_loss, z_q, codes = self.vqvae.vector_quantizer(z_e)
            x_hat = self.vqvae.decoder(z_q)
        recon_loss = F.mse_loss(x_hat, x)
        loss = recon_loss + vq_loss  # eq. 3; its second and third term are in `modules.VectorQuantizer`
        self.optimizer.zero_grad()
        (loss * weight).backward()
        distributed.sum_gradients(self.vqvae)
        self.optimizer.step()
        if weight:
            self.codebook.after_step(codes)
        return torch.stack([recon_loss, vq_loss]).detach()

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Score the validation split with the averaged weights."""
        among = distributed.rank(), distributed.world_size()
        shares = reconstruction.score(self.average, self.validate_set, self.labels, *among)
        scores = reconstruction.Scores(*(distributed.total(part) for part in shares))
        steps = epoch * len(batch_sizes(len(self.data), self.batch_size))
        check_finite(scores.ssim[None], f"{self.title} epoch {epoch}", steps)
        ssim = {f"ssim_{kind}": getattr(scores.ssim, kind)().item() for kind in ("mean", "min", "max")}
        if self.labels is not None:
            ssim["ssim_brain"] = scores.tissue_ssim[:, 0].nanmean().item()
        ssim["ssim_black"] = self.ssim_of_black
        if self.kept_row([*self.run.rows_of(self.name), ssim]) is ssim:
            self.kept = files.digest(self.average.vector_quantizer.embedding.weight)
        return ssim | {"psnr_mean": scores.psnr.mean().item()} | reconstruction.codebook_usage(scores)

    @cached_property
    def ssim_of_black(self) -> float:
        """The mean SSIM of black images: what a score is worth that is not above it."""
        batches = in_batches(self.validate_set, range(0, len(self.validate_set), BLACK_EVERY), desc="Scoring black")
        return torch.cat([reconstruction.ssim(x, torch.zeros_like(x)) for x in batches]).mean().item()

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        epoch = row["epoch"]
        rows = self.run.rows_of(self.name)
        self._print(row)
        with torch.no_grad():
            x_hat = self.average.eval()(self.shown)[1]
        self.figures.image_grid(f"epoch_{epoch}.png", x_hat, f"Reconstructions after epoch {epoch}")
        self.figures.single_image(f"epoch_{epoch}_single.png", x_hat[0], f"Reconstruction after epoch {epoch}")
        self.figures.ssim_by_epoch("train_ssim_scores.png", rows)
        losses = history["training_loss"]
        title = "Training reconstruction loss"
        self.figures.losses("train_recon_losses.png", losses, rows, title, "training_loss")

    def save_weights(self) -> None:
        files.save(files.cpu_state(self.average), self.run.folder / "vqvae.pth")

    def _print(self, row: dict) -> None:
        print(f"Epoch: {row['epoch']}")
        self.run.say(f"Training loss: {row['training_loss']}")
        self.run.say(f"Validation avg. SSIM loss: {row['ssim_mean']}")
        self.run.say(f"Max SSIM loss: {row['ssim_max']}")
        self.run.say(f"Min SSIM loss: {row['ssim_min']}")
        self.run.say(
            f"Codebook usage: {row['codes_used']} of {self.run.options.n_embeddings} codes, "
            f"perplexity {row['perplexity']:.1f}, in the foreground {row['foreground_perplexity']:.1f}; "
            f"PSNR {row['psnr_mean']:.2f} dB"
            + (f"; SSIM in the brain {row['ssim_brain']:.4f}" if "ssim_brain" in row else "")
        )

    def extra_state(self) -> dict:
        return self.codebook.state_dict() | {"kept": self.kept}

    def load_extra_state(self, state: dict) -> None:
        self.codebook.load_state_dict(state)
        self.kept = state["kept"]

    def best(self) -> VQVAE:
        """The network in vqvae.pth, on the run's device. Says so where a black image would score higher.

        Raises UserError if the file is not the one that was kept.
        """

        def load() -> VQVAE:
            path = self.run.folder / "vqvae.pth"
            vqvae = load_vqvae(path)
            if files.digest(vqvae.vector_quantizer.embedding.weight) != self.kept:
                raise UserError(f"{path}: is not the one that this run kept; put that back, or start a new run")
            return vqvae

        vqvae = distributed.from_first(load).to(self.run.device)
        if distributed.is_first():
            row = self.kept_row(self.run.rows_of(self.name))
            if row["ssim_mean"] < row["ssim_black"]:
                black = f"{row['ssim_black']:.4f}"
                self.run.say(f"That is less than a black image has, {black}; train longer, or with a lower --lr")
        return vqvae

    @exact_float32()
    def draw_codes(self, vqvae: VQVAE) -> None:
        """Draw the codes of the validation split, and add them to the page; on rank 0."""
        if not distributed.is_first():
            return
        x = self.validate_set.batch([0])
        codes = vqvae.encode(x)
        usage = torch.zeros(vqvae.vector_quantizer.embedding.num_embeddings, dtype=torch.long)
        for images in in_batches(self.validate_set, desc="Encoding"):
            usage += torch.bincount(vqvae.encode(images).flatten().cpu(), minlength=len(usage))
        self.figures.single_image("codebook_comparison.png", x[0], "First validation image")
        self.figures.code_map("codebook.png", codes[0], usage, "64×64 codes of the first validation image")
        decoded = vqvae.decode(codes)[0]
        self.figures.single_image("decoded.png", decoded, "First validation image, decoded from its codes")
        page.write_run(self.run.folder)
