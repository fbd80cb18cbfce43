"""The examples of README.md and docs/, run as they stand there; their links and anchors."""

import contextlib
import io
import re

import nbformat
import pytest
from conftest import PRETRAINED, PROJECT, run_program
from nbclient import NotebookClient

TOUR = PROJECT / "docs" / "tour.ipynb"
PAGES = (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", PRETRAINED / "README.md", *(PROJECT / "docs").glob("*.md"))
EXAMPLES = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Where the examples run: with codes.npz, as docs/usage.md makes it, and the table of a run."""
    folder = tmp_path_factory.mktemp("docs")
    words = (PRETRAINED / "vqvae.pth", "--data", data, "--split", "validate", "--export-codes", "codes.npz")
    assert run_program("predict.py", *words, cwd=folder).returncode == 0
    (folder / "RUN").mkdir()
    (folder / "RUN" / "metrics.csv").write_text("stage,epoch,ssim_mean,d_loss\nvqvae,1,0.5,\ndcgan,1,,2.5\n")
    return folder


def test_there_are_examples():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("i", range(4))
def test_the_examples_print_what_they_say(i, data, folder, monkeypatch):
    code = EXAMPLES[i].replace('"DIR"', repr(str(data))).replace("resources/pretrained", str(PRETRAINED))
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "example", "exec"), {})
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", EXAMPLES[i])
    assert "SummaryWriter" not in code or list((folder / "RUN" / "tensorboard").iterdir())


def test_the_tour_runs_and_is_kept_without_outputs(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures, as a reader sees them
    tour = nbformat.read(TOUR, as_version=4)
    assert not any(cell.get("outputs") for cell in tour.cells)
    NotebookClient(tour, timeout=300, resources={"metadata": {"path": TOUR.parent}}).execute()
    outputs = [output for cell in tour.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    assert "AUC of texture" in "".join(output.get("text", "") for output in outputs)


def anchors(text: str) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_and_anchors_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for link in {a or b for a, b in links}:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_is_one_page_and_every_line_fits():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 180
    for page in PAGES:
        assert [line for line in page.read_text().splitlines() if len(line) > 120] == [], page


def test_every_code_file_that_a_page_names_is_there():
    for page in PAGES:
        for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", page.read_text()):
            assert (PROJECT / name).exists() or list(PROJECT.glob(f"*/{name}")), (page, name)
