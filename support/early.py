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
    elif (package := _imported(trace)) is not None:  # such as of a variable in the environment that it cannot read
        text = " ".join(str(error).split())[:300]
        print(f"error: {package} cannot be imported ({kind.__name__}: {text})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _imported(trace) -> str | None:
    """The one of PACKAGES in whose import the error arose."""
    package = None
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if trace.tb_frame.f_code.co_name == "<module>" and name in PACKAGES:
            package = name
        trace = trace.tb_next
    return package


PACKAGES = ("torch", "torchvision", "numpy", "matplotlib", "skimage", "tqdm", "PIL", "scipy", "jinja2", "nibabel")
sys.excepthook = _say
