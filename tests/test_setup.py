"""The lines that set the project up, and what git keeps out."""

import hashlib
import re
import subprocess

from conftest import PROJECT


def test_environment_yml_installs_the_one_list_of_packages():
    lines = (PROJECT / "environment.yml").read_text().splitlines()
    assert lines[0] == "name: conda-torch"
    assert "  - python>=3.11" in lines and lines[-2:] == ["  - pip:", "      - -r requirements.txt"]
    wanted = [line for line in (PROJECT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in wanted)
    packages = [line.split(">=")[0] for line in wanted]
    assert packages == [
        "torch",
        "torchvision",
        "numpy",
        "matplotlib",
        "scikit-image",
        "tqdm",
    ]


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (PROJECT / ".ci" / "run").read_text()
    readme = (PROJECT / "README.md").read_text()
    assert all(f"make {target}" in readme for target in ("brains", "demo", "test"))


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


def test_every_file_that_the_readme_names_is_there():
    for page in (PROJECT / "README.md", PROJECT / "resources" / "pretrained" / "README.md"):
        text = page.read_text()
        names = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)|src=\"([\w./-]+)\"", text)
        assert names and "@@" not in text
        for name in {a or b for a, b in names}:
            assert (page.parent / name).exists(), name


def test_the_pretrained_weights_are_those_that_their_page_describes():
    folder = PROJECT / "resources" / "pretrained"
    for name, size in (("vqvae.pth", 1_000_000), ("generator.pth", 10_000_000)):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert f"| SHA-256 | `{digest}` |" in (folder / "README.md").read_text()
        assert (folder / name).stat().st_size < size
