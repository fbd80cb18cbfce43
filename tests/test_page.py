"""The page of a run: what it shows, that names are escaped, and that a browser is content with it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from report import page
from report.plots import Figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STRANGE = '<b>&"case_001_slice_0".png'


@pytest.fixture
def folder(tmp_path):
    """A folder as predict.py and train.py leave it, with strange names."""
    image = torch.rand(1, 256, 256)
    for name in ("best_comparison", "worst_comparison"):
        Figures(tmp_path).comparison(f"{name}.png", image, image, 0.5, "T")
    for epoch in (0, 2, 10):
        Figures(tmp_path).single_image(f"epoch_{epoch}_single.png", image, "T")
        Figures(tmp_path).image_grid(f"gan_epoch_{epoch}.png", image[None], "T")
    (tmp_path / "scores.csv").write_text(
        'file,case,slice,ssim\n"' + STRANGE.replace('"', '""') + '",1,0,0.25\nb.png,2,,0.125\na.png,10,3,0.75\n'
    )
    page.write(tmp_path, "Reconstructions <scored>", {"Data": "/some/<folder>"}, phantoms=True)
    return tmp_path


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.cells, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        attributes = dict(attributes)
        if tag == "img":
            assert attributes["alt"]
            self.sources.append(attributes["src"])
        assert not attributes.get("src", "").startswith(("http", "//")) and tag not in ("link", "b")

    def handle_data(self, data):
        if self.inside == "td":
            self.cells.append(data)


def test_pictures_stand_in_the_order_of_epochs_and_names_are_escaped(folder):
    text = (folder / "index.html").read_text()
    reader = Reader(text)
    assert [name for name in reader.sources if name.startswith("gan")] == [f"gan_epoch_{n}.png" for n in (10, 2, 0)]
    assert sorted(reader.sources) == sorted(path.name for path in folder.glob("*.png"))
    assert STRANGE in reader.cells and "0.125" in reader.cells
    assert "/some/&lt;folder&gt;" in text and "phantoms" in text and "http" not in text


def test_long_facts_are_folded_and_pages_below_are_linked(tmp_path):
    below = tmp_path / "a b<_predict"
    below.mkdir()
    page.write(below, "New brains", {"Brains": 64})
    page.write(tmp_path, "T", {"Options": "x" * 300, "Seed": 0})
    text = (tmp_path / "index.html").read_text()
    assert '<a href="a%20b%3C_predict/index.html">a b&lt;_predict</a>' in text
    assert text.count("<details>") == 1 and "<dd>0</dd>" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_a_browser_shows_every_picture_without_errors(folder, tmp_path_factory):
    check = """<script>
      addEventListener("load", async () => {
        const seen = [];
        for (const image of document.images) image.loading = "eager";
        await Promise.all([...document.images].map(image => image.complete || new Promise(go => image.onload = go)));
        seen.push([...document.images].filter(image => image.naturalWidth > 0).length);
        seen.push(document.documentElement.scrollWidth <= innerWidth);
        document.title = JSON.stringify(seen);
      });
    </script>"""
    text = (folder / "index.html").read_text()
    (folder / "checked.html").write_text(text.replace("</body>", check + "</body>"))
    profile = tmp_path_factory.mktemp("profile")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    words += ["--allow-file-access-from-files", "--window-size=500,900", "--virtual-time-budget=20000"]
    words += ["--enable-logging=stderr", "--dump-dom", f"file://{folder}/checked.html"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    (title,) = re.findall("<title>(.*)</title>", done.stdout)
    assert title == "[8,true]"
