"""Train the VQ-VAE on brain slices, then a prior that generates its codes: the DCGAN or an autoregressive one.

    python train.py                                      # $OASIS_DIR or ./keras_png_slices_data, else a demo
    python train.py --data DIR                           # OASIS elsewhere
    python train.py --resume gen_imgs/RUN              # continue where it was last saved
    python train.py --only dcgan --vqvae PATH/vqvae.pth    # the DCGAN alone
    python train.py --prior autoregressive               # a prior over the codes themselves instead of the DCGAN
    torchrun --nproc-per-node=8 train.py --data DIR      # several processes, one GPU each

Everything is written to a new folder, gen_imgs/<date_time>/. docs/usage.md lists its files.
"""

import sys

from dataset import OasisDataset
from modules import VQVAE
from priors.checkpoints import load_vqvae
from support import console, distributed, files
from support.run import Run
from training import begin, options
from training.autoregressive import AutoregressiveStage
from training.dcgan import DCGANStage
from training.fit import fit
from training.vqvae import VQVAEStage


def main(argv: list[str] | None = None) -> None:
    args = options.parse(argv, __doc__)
    if args.pop("dry_run", False):
        begin.print_plan(args)
        return
    console.install_signal_handlers()
    distributed.start()
    saved = distributed.from_first(lambda: begin.prepare(args))
    run = None
    try:
        with begin.begin(saved) as (run, train_set, validate_set):
            if run.options.vqvae:
                vqvae = copy_vqvae(run)
            else:
                vqvae = train_vqvae(run, train_set, validate_set)
            if run.options.only != "vqvae":
                train_prior = {"dcgan": train_gan, "autoregressive": train_autoregressive}
                train_prior[run.options.prior](run, vqvae, train_set, validate_set)
    except console.Stopped:
        print(begin.how_to_resume(run or saved), file=sys.stderr)
        raise
    print(f"Done. Look at {run.folder / 'index.html'}")
    distributed.stop()


def train_vqvae(run: Run, train_set: OasisDataset, validate_set: OasisDataset) -> VQVAE:
    """Train the VQ-VAE and return the averaged network of the epoch with the highest mean validation SSIM.

    `run` has begun; training resumes from its state. Everything is on the run's device.
    Raises UserError if the loss is not finite.
    """
    stage = VQVAEStage(run, train_set, validate_set)
    fit(stage, run)
    vqvae = stage.best()
    stage.draw_codes(vqvae)
    return vqvae


def train_gan(run: Run, vqvae: VQVAE, train_set: OasisDataset, validate_set: OasisDataset) -> None:
    """Train the DCGAN on the training split's latents. generator.pth is of the epoch with the lowest AUC of texture.

    `run` has begun; training resumes from its state. Everything is on the run's device. Raises UserError if the loss
    is not finite, or if a resumed run's vqvae.pth is not the one that it began with.
    """
    fit(DCGANStage(run, vqvae, train_set, validate_set), run)


def train_autoregressive(run: Run, vqvae: VQVAE, train_set: OasisDataset, validate_set: OasisDataset) -> None:
    """Like `train_gan`, for the prior over codes. autoregressive.pth is of the epoch with the fewest bits."""
    fit(AutoregressiveStage(run, vqvae, train_set, validate_set), run)


def copy_vqvae(run: Run) -> VQVAE:
    """Load the VQ-VAE of `--vqvae` and copy it into the run's folder, so that the folder is self-contained."""
    vqvae = distributed.from_first(lambda: load_vqvae(run.options.vqvae))
    if distributed.is_first():
        files.save(files.cpu_state(vqvae), run.folder / "vqvae.pth")
    return vqvae.to(run.device)


if __name__ == "__main__":
    console.run_program(main, "train.py")
