"""README.md's examples, run as they stand there."""

import os
import re
import subprocess
import sys

import pytest
from conftest import PROJECT, run_program

EXAMPLES = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)


def test_there_are_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("i", range(3))
def test_the_examples_run(i, data, tmp_path):
    pretrained = PROJECT / "resources" / "pretrained"
    words = (pretrained / "vqvae.pth", "--data", data, "--split", "validate", "--export-codes", "codes.npz")
    assert run_program("predict.py", *words, cwd=tmp_path).returncode == 0
    code = EXAMPLES[i].replace('"DIR"', repr(str(data))).replace("resources/pretrained", str(pretrained))
    path = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", EXAMPLES[i])
