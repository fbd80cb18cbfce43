"""Errors as one line before a program's `main` begins. Imported first, for importing PyTorch takes seconds."""

import sys


def _say(kind: type[BaseException], error: BaseException, trace) -> None:
    if kind is KeyboardInterrupt:
        print("Stopped before anything was done.", file=sys.stderr)
    elif kind is ModuleNotFoundError and error.name and error.name.partition(".")[0] in PACKAGES:
        print(
            f"error: the package {error.name} is not installed for {sys.executable}; run '. .venv/bin/activate' after "
            "make, or 'pip install -r requirements.txt'",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


PACKAGES = ("torch", "torchvision", "numpy", "matplotlib", "skimage", "tqdm", "PIL", "jinja2", "nibabel")
sys.excepthook = _say
