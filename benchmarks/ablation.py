"""Trainings that differ in one part, compared: the tables of choices in docs/results.md.

    python benchmarks/ablation.py vqvae --data DIR --out OUT                        # trains what OUT lacks, then prints
    python benchmarks/ablation.py dcgan --data DIR --out OUT --vqvae PATH/vqvae.pth --rows balanced "no R1" --seeds 0

A row is a recipe of the DCGAN (training/recipes.py), or an option, beside the default's. Runs go one after the other;
one that was stopped is resumed. Nothing is of the test split.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.generation import MEASURES
from support import console
from support.console import SEED, UserError
from support.device import choose_device, choose_fast_path
from support.run import RESUME_FILE, open_run, read_record
from train import copy_vqvae
from training import begin, options
from training.dcgan import DCGANStage
from training.fit import fit
from training.options import COUNT, Options
from training.recipes import BALANCED, REPORT, VQVAE
from training.vqvae import VQVAEStage


class Table(NamedTuple):
    """Of a stage.

    Attributes:
        rows: by name the recipe, and the options beside the default's.
        columns: of metrics.csv, with the format of each.
    """

    rows: dict[str, tuple[Any, dict]]
    columns: dict[str, str]


TABLES = {
    "vqvae": Table(
        {
            "kmeans": (VQVAE, {}),
            "paper": (VQVAE, {"codebook": "paper"}),
            "ema": (VQVAE, {"codebook": "ema"}),
        },
        {
            "ssim_mean": ".4f",
            "ssim_min": ".4f",
            "psnr_mean": ".2f",
            "codes_used": ".0f",
            "foreground_perplexity": ".0f",
        },
    ),
    "dcgan": Table(
        {
            "report": (REPORT, {}),
            "balanced": (BALANCED, {}),
            "last weights": (replace(BALANCED, average_decay=0.0), {}),
            "not calibrated": (replace(BALANCED, calibrated=False), {}),
            "embeddings": (replace(BALANCED, quantized=True), {}),
            "no start from data": (replace(BALANCED, start_lr=0.0), {}),
            "6 directions": (replace(BALANCED, directions=6), {}),
            "no R1": (replace(BALANCED, r1=0.0), {}),
            "spectrum not flattened": (replace(BALANCED, emphasis=0.0), {}),
        },
        {"d_real": ".2f", "d_validate": ".2f"} | dict.fromkeys(MEASURES, ".3g"),
    ),
}


def main() -> None:
    o = parse()
    console.install_signal_handlers()
    for name in o.rows:
        for seed in o.seeds:
            train(o, name, seed)
    print_table(o)


def train(o: argparse.Namespace, name: str, seed: int) -> None:
    """Train a row to its last epoch, unless OUT holds it."""
    table = TABLES[o.stage]
    out = folder_of(o, name, seed)
    recipe, changed = table.rows[name]
    assert o.vqvae or recipe is VQVAE  # its stage has no other
    runs = [path.parent for path in sorted(out.glob(f"*/{RESUME_FILE}"))]
    if runs:
        record = read_record(runs[-1])
        same = record["recipes"][o.stage] == json.loads(json.dumps(asdict(recipe)))
        fast_path = choose_fast_path(choose_device(Options.device), o.precision, plain=False)
        if not same or record["fast_path"]["bfloat16"] != fast_path.bfloat16:
            raise UserError(f"{runs[-1]}: was trained by another recipe, or in another precision; name another --out")
        if open_run(runs[-1], Options).epochs_of(o.stage) >= o.epochs:
            return
    print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
    args = {"data": o.data, "out": str(out), "only": o.stage, "seed": seed, "precision": o.precision}
    args[options.stage_option(o.stage, "epochs")] = o.epochs
    vqvae = {"vqvae": o.vqvae} if o.vqvae else {}
    saved = begin.prepare({"resume": runs[-1]} if runs else args | changed | vqvae)
    with begin.begin(saved, **{o.stage: asdict(recipe)}) as (run, *splits):
        stage = DCGANStage(run, copy_vqvae(run), *splits, recipe) if o.vqvae else VQVAEStage(run, *splits)
        fit(stage, run)


def folder_of(o: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(o.out) / f"{o.stage} {name} {seed} of {o.epochs}".replace(" ", "-")


def print_table(o: argparse.Namespace) -> None:
    """Markdown; the seeds of a row side by side, after the last epoch."""
    table = TABLES[o.stage]
    print(f"Validation split, seeds {' and '.join(map(str, o.seeds))}, {o.epochs} epochs.\n")
    print("| | " + " | ".join(table.columns) + " |\n|---|" + "---:|" * len(table.columns))
    for name in o.rows:
        last = []
        for seed in o.seeds:
            path = next(folder_of(o, name, seed).glob(f"*/{RESUME_FILE}")).parent
            last.append(open_run(path, Options).rows_of(o.stage)[-1])
        cells = [" ".join(format(row[key], form) for row in last) for key, form in table.columns.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=TABLES)
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the runs are kept")
    parser.add_argument("--vqvae", metavar="PATH", help="vqvae.pth whose latents the DCGAN learns")
    parser.add_argument("--rows", metavar="ROW", nargs="+", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=SEED, metavar="S", default=[0, 1], help="default: 0 1")
    parser.add_argument("--epochs", type=COUNT, metavar="N", required=True, help="that a row is trained for")
    parser.add_argument("--precision", choices=options.PRECISIONS, default="auto", help="default: auto")
    o = parser.parse_args()
    rows = TABLES[o.stage].rows
    o.rows = o.rows or list(rows)
    if unknown := set(o.rows) - rows.keys():
        raise UserError(f"--rows {min(unknown)}: is none of {', '.join(rows)}")
    if (o.stage == "vqvae") == bool(o.vqvae):
        raise UserError("--vqvae PATH is needed for the DCGAN, and only then used")
    return o


if __name__ == "__main__":
    console.run_program(main, "ablation.py")
