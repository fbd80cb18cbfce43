"""The lines that set the project up, what git keeps out, and the rules of the house."""

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest
from conftest import PROJECT
from huggingface_hub import DatasetCard, ModelCard

from support import files


def test_environment_yml_installs_the_one_list_of_packages():
    lines = (PROJECT / "environment.yml").read_text().splitlines()
    assert lines[0] == "name: conda-torch"
    assert "  - python>=3.11" in lines and lines[-2:] == ["  - pip:", "      - -r requirements.txt"]
    wanted = [line for line in (PROJECT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+>=[\d.]+", line) for line in wanted)
    names = {"PIL": "pillow", "skimage": "scikit-image"}  # of packages that are imported by another
    imported = {module.split(".")[0] for path in CODE for module in imports(ast.parse(path.read_text()))}
    imported -= {*sys.stdlib_module_names, *MAY_IMPORT}
    assert sorted(line.split(">=")[0] for line in wanted) == sorted(names.get(name, name) for name in imported)


def imports(tree: ast.AST) -> list[str]:
    """The modules that a file imports, or imports from."""
    froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return froms + [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]


def test_the_version_and_the_packages_are_said_once():
    version, pyproject = files.VERSION, tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    dynamic = pyproject["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"version": {"file": "VERSION"}, "dependencies": {"file": "requirements.txt"}}
    (date,) = re.findall(rf"(?m)^## \[{version}\] - (\S+)$", (PROJECT / "CHANGELOG.md").read_text())
    assert f"version: {version}\ndate-released: {date}\n" in (PROJECT / "CITATION.cff").read_text()
    text = "".join((PROJECT / f"requirements{kind}.txt").read_text() for kind in ("", "-dev"))
    wanted = dict(re.findall(r"(?m)^([a-z_0-9-]+)>=([\d.]+)$", text))
    pinned = dict(re.findall(r"(?m)^([A-Za-z_0-9-]+)==([\d.]+)$", (PROJECT / "constraints.txt").read_text()))
    pinned = {name.lower(): version for name, version in pinned.items()}
    assert pinned.keys() == wanted.keys()
    assert all(numbers(pinned[name]) >= numbers(least) for name, least in wanted.items())


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.parametrize(
    "folder, kind, task",
    [("pretrained", ModelCard, "unconditional-image-generation"), ("phantoms", DatasetCard, None)],
)
def test_cards_are_those_of_the_hub(folder, kind, task):
    """Whoever owns the weights can publish the folder as it is."""
    card = kind.load(PROJECT / "resources" / folder / "README.md")
    assert card.data.license == "mit" and card.data.get("pipeline_tag") == task
    if task:  # the hub's package reads and checks the model index
        values = [result.metric_value for result in card.data.eval_results]
        assert len(values) == 5 and all(f"{value:,}" in card.text for value in values)


def test_what_runs_write_is_ignored_by_git():
    paths = [
        "gen_imgs/x/vqvae.pth",
        "phantoms/x.png",
        "keras_png_slices_data/x.png",
        ".venv/x",
        "keras_png_slices_test/x",
    ]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.split() == paths


def test_no_scan_is_tracked():
    done = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    assert "train.py" in done.stdout.splitlines()
    assert not [name for name in done.stdout.splitlines() if re.search(r"case_\d+|\.nii|\.xz$|\.npz$", name)]


def test_the_pretrained_weights_are_those_that_their_page_describes():
    folder = PROJECT / "resources" / "pretrained"
    for name, size in (("vqvae.pth", 1_000_000), ("generator.pth", 17_000_000), ("autoregressive.pth", 8_000_000)):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert f"| SHA-256 | `{digest}` |" in (folder / "README.md").read_text()
        assert (folder / name).stat().st_size < size


FOLDERS = ("training", "priors", "dataset", "report", "preparation", "evaluation", "modules", "support")
MAY_IMPORT = {  # imports point downwards only
    "train": {*FOLDERS},
    "predict": {*FOLDERS},
    "training": {"training", "priors", "dataset", "report", "preparation", "evaluation", "modules", "support"},
    "priors": {"priors", "dataset", "modules", "support"},
    "dataset": {"preparation", "evaluation", "support"},
    "report": {"report", "evaluation", "support"},
    "preparation": {"preparation", "support"},
    "evaluation": {"evaluation", "modules", "support"},
    "modules": set(),
    "support": {"support"},
}
CODE = [path for top in MAY_IMPORT for path in (*PROJECT.glob(f"{top}.py"), *PROJECT.glob(f"{top}/*.py"))]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(PROJECT)))
def test_the_house(path):
    """Who may import whom, no import inside a function, and functions of one screen."""
    text = path.read_text()
    tree = ast.parse(text)
    ours = {name.split(".")[0] for name in imports(tree)} & MAY_IMPORT.keys()
    program = path.stem == "__main__"
    assert ours <= MAY_IMPORT["predict" if program else path.relative_to(PROJECT).parts[0].removesuffix(".py")]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            assert not imports(function), function.name
            assert function.end_lineno - function.lineno < 60, function.name


def test_no_circles():
    """A file never imports itself by way of others."""

    def module(path):
        return ".".join(path.relative_to(PROJECT).with_suffix("").parts)

    known = {module(path) for path in CODE}
    graph = {}
    for path in CODE:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)} & known
            elif isinstance(node, ast.Import):
                found |= {name.name for name in node.names} & known
        graph[module(path)] = found
    assert list(TopologicalSorter(graph).static_order())


def test_only_the_reports_four_files_are_python_at_the_top():
    assert {path.name for path in PROJECT.glob("*.py")} == {"train.py", "predict.py", "dataset.py", "modules.py"}
