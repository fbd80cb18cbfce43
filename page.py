"""The page of a run: index.html beside its figures, which a browser opens without a network.

It shows what lies in the folder, so that it can be written again after every epoch; a reload follows a run.
"""

import contextlib
import csv
import html
import re
import sys
from pathlib import Path
from urllib.parse import quote

import runs

# Which pictures a section shows, as patterns of file names; those with an epoch in their name become a strip.
SECTIONS = (
    ("Generated brains", ("samples.png", "walk.png", "gan_epoch_<n>.png")),
    ("Reconstructions", ("best_comparison.png", "worst_comparison.png", "epoch_<n>.png", "epoch_<n>_single.png")),
    ("Scores and curves", ("<any>_ssim_scores.png", "train_recon_losses.png", "rate_distortion.png")),
    ("The DCGAN's training", ("gan_losses.png", "gan_measures.png")),
    ("Codes", ("codebook_comparison.png", "codebook.png", "decoded.png")),
)
CAPTIONS = {
    "samples": "New brains, decoded from noise",
    "walk": "Walks between noise vectors",
    "gan_epoch": "The same 64 noise vectors, decoded after epoch {}",
    "best_comparison": "The image of the highest SSIM",
    "worst_comparison": "The image of the lowest SSIM",
    "epoch": "Reconstructions after epoch {}",
    "epoch_0": "Training images",
    "epoch_single": "One reconstruction after epoch {}",
    "epoch_0_single": "One training image",
    "train_ssim_scores": "Validation SSIM by epoch",
    "validate_ssim_scores": "SSIM of the validation images",
    "test_ssim_scores": "SSIM of the test images",
    "train_recon_losses": "Reconstruction loss by update",
    "rate_distortion": "Bits of an image's codes against PSNR and SSIM",
    "gan_losses": "Losses, and how sure the discriminator is",
    "gan_measures": "Distance of generated brains from the validation split",
    "codebook_comparison": "The first validation image",
    "codebook": "Its codes, and how often each code is used",
    "decoded": "Decoded from these codes",
}
TABLES = {
    "metrics.csv": "Every epoch",
    "scores.csv": "Every image",
    "measures.csv": "Generated brains, measured",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfc; --faint: #6b6b6b; --line: #d5d5d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececea; --paper: #17181a; --faint: #a2a2a0; --line: #3b3c3f; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.notice { padding: .5rem 1rem; border: 2px solid #e69f00; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.strip { display: flex; gap: 1rem; overflow-x: auto; }
figure { margin: 0; flex: 0 1 34rem; max-width: 100%; } .strip figure { flex: 0 0 min(20rem, 80%); }
img { width: 100%; height: auto; background: #fff; } figcaption { color: var(--faint); font-size: .9rem; }
.table { overflow-x: auto; max-height: 32rem; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.text { text-align: left; } th { position: sticky; top: 0; background: var(--paper); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
:focus-visible { outline: 2px solid #0072b2; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { .strip { flex-wrap: wrap; } .strip figure:nth-child(n+5) { display: none; }
  figure { break-inside: avoid; }
  .table { max-height: none; overflow: visible; } table { font-size: .45rem; } th, td { padding: 0 .2rem; }
  th { position: static; } }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, table = head.closest("table");
  const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
  const number = (a, b) => (value(a) === "" ? Infinity : +value(a)) - (value(b) === "" ? Infinity : +value(b));
  const compare = table.querySelector(`td.text:nth-child(${column + 1})`) ? order : number;
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => down * compare(a, b)));
});
"""


@contextlib.contextmanager
def _never_fatal(folder: Path):
    try:
        yield
    except Exception as error:
        print(f"warning: {folder / 'index.html'}: could not be written, and is left out ({error})", file=sys.stderr)


def write(folder: Path, title: str, facts: dict[str, object], note: str = "") -> None:
    """Write folder/index.html; a page that cannot be written is worth a warning.

    Args:
        folder: of a run of train.py or predict.py; figures and tables in it that have a place above are shown.
        title: of the page.
        facts: what was run, by name, in the order shown.
        note: where the data come from, if they are phantoms.
    """
    with _never_fatal(folder), runs.atomically(folder / "index.html") as temporary:
        Path(temporary).write_text(_page(folder, title, facts, note), encoding="utf-8")


def write_run(folder: Path) -> None:
    """The page of a run of train.py, from its run.json and metrics.csv."""
    with _never_fatal(folder):
        write(folder, "Training run", *_run_facts(folder))


def _run_facts(folder: Path) -> tuple[dict[str, object], str]:
    """What a run was, and the note about its data."""
    record = runs.read_json(folder / "run.json")
    options, data = record["options"], record["data"]
    epochs = {"vqvae": 0, "gan": 0}
    best, seconds = None, 0.0
    if (folder / "metrics.csv").is_file():
        with open(folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                epochs[row["stage"]] = int(row["epoch"])
                seconds += float(row["seconds"])
                if row.get("ssim_mean") and (best is None or float(row["ssim_mean"]) > best[0]):
                    best = float(row["ssim_mean"]), row["epoch"]
    facts = {}
    if options["only"] != "gan":
        facts["VQ-VAE"] = f"{epochs['vqvae']} of {options['epochs']} epochs"
    if best:
        facts["Best validation SSIM"] = f"{best[0]:.4f}, after epoch {best[1]}"
    if options["only"] != "vqvae":
        facts["DCGAN"] = f"{epochs['gan']} of {options['gan_epochs']} epochs"
    facts["Time in updates"] = f"{seconds / 60:.1f} minutes"
    images = ", ".join(f"{n} {split}" for split, n in data["images"].items())
    facts["Data"] = f"{data['folder']} ({images})"
    facts["Seed"] = record["seed"]
    facts["Options"] = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    facts |= environment_facts(record)
    if record.get("resumed"):
        commits = ", ".join(dict.fromkeys(part["commit"] for part in record["resumed"]))
        facts["Resumed"] = f"{len(record['resumed'])} times, at commit {commits}"
    return facts, "Data: phantoms (synthetic)" if data["phantoms"] else ""


def environment_facts(record: dict) -> dict[str, str]:
    """What a page says about command, commit and machine, from `runs.environment`."""
    more = f", {record['processes']} processes" if record.get("processes", 1) > 1 else ""
    return {
        "Command": " ".join(record["command"]),
        "Commit": record["commit"],
        "Machine": f"{record['device']}, {record['threads']} threads, {record['platform']}{more}",
        "Versions": ", ".join(f"{name} {record[name]}" for name in ("python", "torch", "numpy")),
    }


def _page(folder: Path, title: str, facts: dict[str, object], note: str) -> str:
    name = html.escape(f"{title}: {folder.name}")
    parts = [f"<h1>{name}</h1>"]
    if note:
        parts.append(f'<p class="notice">{html.escape(note)}: no figure here is a result.</p>')
    parts.append(f"<dl>{''.join(_fact(key, str(value)) for key, value in facts.items())}</dl>")
    pages = sorted(path.parent.name for path in folder.glob("*/index.html"))
    links = (f'<li><a href="{html.escape(quote(name))}/index.html">{html.escape(name)}</a></li>' for name in pages)
    if pages:
        parts.append(f"<section><h2>Predicted with it</h2><ul>{''.join(links)}</ul></section>")
    files = sorted(path.name for path in folder.glob("*.png"))
    for heading, patterns in SECTIONS:
        strips, pictures = ["".join(_pictures(files, p)) for p in patterns if "<n>" in p], []
        for pattern in patterns:
            pictures += _pictures(files, pattern) if "<n>" not in pattern else []
        shown = [f'<div class="pictures">{"".join(pictures)}</div>'] if pictures else []
        shown += [f'<div class="strip" tabindex="0" role="group" aria-label="By epoch">{s}</div>' for s in strips if s]
        if shown:
            parts.append(f"<section><h2>{heading}</h2>{''.join(shown)}</section>")
    for file, heading in TABLES.items():
        if (folder / file).is_file():
            parts.append(f"<section><h2>{heading}</h2>{_tables(folder / file)}</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _fact(key: str, value: str) -> str:
    value = html.escape(value)
    if len(value) > 200:
        value = f"<details><summary>all of them</summary>{value}</details>"
    return f"<dt>{html.escape(key)}</dt><dd>{value}</dd>"


def _pictures(files: list[str], pattern: str) -> list[str]:
    """The files of a pattern as figures, those of the last epoch first."""
    expression = re.escape(pattern).replace("<n>", r"(?P<n>\d+)").replace("<any>", r"\w+")
    found = [match for match in map(re.compile(expression).fullmatch, files) if match]
    figures = []
    for match in sorted(found, key=lambda match: -int(match.groupdict().get("n") or 0)):
        epoch = match.groupdict().get("n")
        kind = match.string.removesuffix(".png").replace(f"_{epoch}", "")
        text = CAPTIONS.get(match.string.removesuffix(".png")) or CAPTIONS.get(kind, kind.replace("_", " "))
        caption = html.escape(text.format(epoch))
        source = html.escape(match.string)
        figures.append(
            f'<figure><a href="{source}"><img src="{source}" alt="{caption}" loading="lazy"></a>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return figures


def _tables(path: Path) -> str:
    """A CSV file as a table whose columns sort; one table for each stage where it has stages."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    stages = dict.fromkeys(row.get("stage", "") for row in rows)
    return "".join(_table([row for row in rows if row.get("stage", "") == stage]) for stage in stages)


def _table(rows: list[dict[str, str]]) -> str:
    columns = [key for key in rows[0] if any(row[key] for row in rows)]
    head = "".join(f'<th scope="col"><button type="button">{html.escape(key)}</button></th>' for key in columns)
    body = "".join(f"<tr>{''.join(_cell(row[key]) for key in columns)}</tr>" for row in rows)
    return (
        f'<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: str) -> str:
    """Numbers are shown with five digits and sorted by all of them."""
    try:
        shown = f"{float(value):.5g}" if value else ""
    except ValueError:
        printable = value.encode("utf-8", "backslashreplace").decode()
        return f'<td class="text">{html.escape(printable)}</td>'
    return f'<td data-value="{html.escape(value)}">{shown}</td>'
