"""The page of a run: index.html beside its figures, which a browser opens without a network.

It shows what is in the folder, so it can be written again after every epoch: reload it to follow a run.
"""

import csv
import functools
import re
import shlex
from pathlib import Path

import jinja2

from support import console, files
from support.device import FastPath
from support.run import read_record

TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


TIMES = {  # columns of metrics.csv
    "seconds": "steps",
    "evaluation_seconds": "evaluation",
    "other_seconds": "reading, starts, figures and saving",
}


def write(folder: Path, title: str, facts: dict[str, object], phantoms: bool = False) -> None:
    """Write index.html in the folder of a run of train.py or predict.py. If that fails, print a warning instead.

    The page shows the figures and tables in the folder that have a place in page.html, the `facts` by name in their
    order, and whether the data are phantoms.
    """
    path = folder / "index.html"
    with console.warn_on_failure(path):
        text = TEMPLATE.get_template("page.html").render(
            title=f"{title}: {folder.name}",
            facts=facts,
            phantoms=phantoms,
            pages=sorted(page.parent.name for page in folder.glob("*/index.html")),
            pictures=functools.partial(_pictures, sorted(file.name for file in folder.glob("*.png"))),
            tables=lambda file: _tables(folder / file),
        )
        with files.atomically(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # paths may hold bytes that are not text


def write_run(folder: Path) -> None:
    """Write the page of a run of train.py, from its run.json and metrics.csv."""
    with console.warn_on_failure(folder / "index.html"):
        record = read_record(folder)
        write(folder, "Training run", _run_facts(record, _rows(folder / "metrics.csv")), record["data"]["phantoms"])


def _run_facts(record: dict, rows: list[dict[str, str]]) -> dict[str, object]:
    """The facts at the top of a run's page, by name."""
    options, data = record["options"], record["data"]
    epochs = {row["stage"]: row["epoch"] for row in rows}
    facts = {}
    if options["only"] in (None, "vqvae"):
        facts["VQ-VAE"] = f"{epochs.get('vqvae', 0)} of {options['epochs']} epochs"
    scored = [row for row in rows if row.get("ssim_mean")]
    if scored:
        best = max(scored, key=lambda row: float(row["ssim_mean"]))
        facts["Best validation SSIM"] = f"{float(best['ssim_mean']):.4f}, after epoch {best['epoch']}"
        black = float(best["ssim_black"])
        if float(best["ssim_mean"]) < black:
            facts["Warning"] = f"a black image has {black:.4f}; train longer, or with a lower --lr"
    if options["only"] != "vqvae":
        stage = options["prior"]
        facts["Prior"] = f"{stage}, {epochs.get(stage, 0)} of {options[f'{stage}_epochs']} epochs"
    facts["Time"] = _time(rows)
    images = ", ".join(f"{n} {split}" for split, n in data["images"].items())
    facts["Data"] = f"{data['folder']} ({images}): {data['content']}"
    facts["Seed"] = record["seed"]
    facts["Options"] = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    facts |= environment_facts(record)
    facts["Fast path"] = FastPath(**record["fast_path"])
    if record["resumed"]:
        commits = ", ".join(dict.fromkeys(part["commit"] for part in record["resumed"]))
        facts["Resumed"] = f"{len(record['resumed'])} times, at commit {commits}"
    return facts


def _time(rows: list[dict[str, str]]) -> str:
    """Where the time went, in minutes."""
    seconds = {key: sum(float(row.get(key) or 0) for row in rows) for key in TIMES}
    total = max(sum(seconds.values()), 1e-9)
    parts = (f"{name} {seconds[key] / 60:.1f} ({seconds[key] / total:.0%})" for key, name in TIMES.items())
    return f"{total / 60:.1f} minutes: {', '.join(parts)}"


def environment_facts(record: dict) -> dict[str, str]:
    """Command, commit and machine, from `support.run.environment`."""
    more = f", {record['processes']} processes" if record["processes"] > 1 else ""
    return {
        "Command": shlex.join(record["command"]),
        "Commit": record["commit"],
        "Machine": f"{record['device']}, {record['threads']} threads, {record['platform']}{more}",
        "Versions": ", ".join(f"{name} {record[name]}" for name in ("python", "torch", "numpy")),
    }


def _pictures(names: list[str], patterns: list[str]) -> list[tuple[str, str, str, str]]:
    """The files of some patterns, the last epoch of each first: name, stem, stem without the epoch, and epoch."""
    pictures = []
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace("<n>", r"(?P<n>\d+)").replace("<any>", r"\w+"))
        matches = [
            (match.string, match.groupdict().get("n", "")) for match in map(expression.fullmatch, names) if match
        ]
        for name, epoch in sorted(matches, key=lambda each: -int(each[1] or 0)):
            stem = name.removesuffix(".png")
            pictures.append((name, stem, stem.replace(f"_{epoch}", "") if epoch else stem, epoch))
    return pictures


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def _tables(path: Path) -> list[tuple[list[str], list[list[str]]]]:
    """A CSV file as tables of columns and rows, one for each stage if it has stages, without columns that are empty."""
    rows = _rows(path)
    tables = []
    for stage in dict.fromkeys(row.get("stage", "") for row in rows):
        part = [row for row in rows if row.get("stage", "") == stage]
        columns = [key for key in part[0] if any(row[key] for row in part)]
        tables.append((columns, [[_cell(row[key]) for key in columns] for row in part]))
    return tables


def _cell(value: str) -> str:
    """What a table shows: of a number, five digits."""
    try:
        return f"{float(value):.5g}" if value else ""
    except ValueError:
        return value.encode("utf-8", "backslashreplace").decode()
