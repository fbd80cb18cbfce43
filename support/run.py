"""The folder of a run: its record, saving what is complete, and resuming."""

import contextlib
import dataclasses
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from support import distributed, files
from support.console import UserError, is_out_of_memory, one_line
from support.device import FastPath, cpu_capabilities

RESUME_FILE = "resume.pth"


@dataclasses.dataclass
class Saved:
    """The saved state of a run that can be resumed; for a new run, only its options.

    Attributes:
        options: a dataclass.
        folder: where everything is written; None for one that is to be made.
        state: by stage, what resuming needs besides the options: `epoch`, `started`, `history`, `Stage.state_dict`.
        rows: the rows of metrics.csv so far.
        fast_path: how the networks are trained; None if that is to be chosen.
    """

    options: Any
    folder: Path | None = None
    state: dict[str, dict] = dataclasses.field(default_factory=dict)
    rows: list[dict] = dataclasses.field(default_factory=list)
    fast_path: FastPath | None = None

    def rows_of(self, stage: str) -> list[dict]:
        """The rows of one stage."""
        return [row for row in self.rows if row["stage"] == stage]

    def epochs_of(self, stage: str) -> int:
        """The number of complete epochs of a stage."""
        return self.state[stage]["epoch"] if stage in self.state else 0


@dataclasses.dataclass
class Run(Saved):
    """One run of train.py and its folder.

    Attributes:
        device: where the networks are trained.
        phantoms: whether the data are phantoms. Every figure and every printed number says so.
        clock: when the last epoch ended, or this process began.
    """

    device: torch.device = torch.device("cpu")
    phantoms: bool = False
    clock: float = dataclasses.field(default_factory=time.perf_counter)

    def begin(self, data: dict, recipes: dict, outdated: Iterable[Path] = ()) -> None:
        """Write run.json. A resumed run keeps its first environment.

        Args:
            data: the folder, whether it holds phantoms, what it holds in words, the number of images in each split, and
                `OasisDataset.digest` of those that were read.
            recipes: by stage, the settings that are not options (`training.recipes`).
            outdated: files of a prior that begins anew; removed, as temporary files are.

        Raises UserError if a resumed run began with other images.
        """
        here = environment(self.device)
        record = here | {"resumed": []}
        if (self.folder / RESUME_FILE).exists():
            record |= read_record(self.folder)
            began = data | record.get("data", {})
            if began["images"] != data["images"]:
                raise UserError(f"{data['folder']}: has {data['images']} images, the run began with {began['images']}")
            changed = [split for split, digest in data["digests"].items() if began["digests"].get(split) != digest]
            if changed:
                raise UserError(
                    f"{data['folder']}: the images of {' and '.join(changed)} are not those that the run began with; "
                    "name its data with --data, or start a new run"
                )
            record["resumed"] = [*record["resumed"], here]
            self.save()  # so that a higher number of epochs is kept if the run is interrupted
            for path in (*outdated, *self.folder.glob(".*.tmp")):  # temporary files of a killed process
                path.unlink(missing_ok=True)
        options = dataclasses.asdict(self.options)
        record |= {"options": options, "seed": options["seed"], "data": data, "fast_path": self.fast_path._asdict()}
        record.setdefault("recipes", recipes)
        files.write_json(self.folder / "run.json", record)

    def save(self) -> None:
        """Write metrics.csv, if there is an epoch, then resume.pth, which completes an epoch or a stage's start."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        rows = [[row.get(column) for column in columns] for row in self.rows]
        path = self.folder / "metrics.csv"
        if rows:
            files.write_csv(path, columns, rows)
        else:
            path.unlink(missing_ok=True)  # of a process that was killed before it wrote resume.pth
        contents = {"options": dataclasses.asdict(self.options), "state": self.state, "rows": self.rows}
        files.save(contents | {"fast_path": self.fast_path._asdict()}, self.folder / RESUME_FILE)

    def take_seconds(self) -> float:
        """Seconds since `clock`, which is set to now."""
        before = self.clock
        self.clock = time.perf_counter()
        return self.clock - before

    def say(self, line: str) -> None:
        """Print a line, which ends with "(phantoms)" if the data are phantoms."""
        print(line + mark(self.phantoms), flush=True)


@contextlib.contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """A context for reading a run's resume.pth, which raises UserError where it does not fit.

    It may have been edited, or damaged in ways that loading does not show.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{folder / RESUME_FILE}: does not fit this run ({reason}); start a new run") from None


def open_run(path: str | Path, options: type) -> Saved:
    """The run in a folder or of a resume.pth (as given, or under gen_imgs/), as `Run.save` left it last.

    `options` is the dataclass of its options.

    Raises UserError if the folder holds no run to resume.
    """
    folder = files.find(path)
    folder = folder.parent if folder.name == RESUME_FILE and folder.is_file() else folder
    if not (folder / RESUME_FILE).is_file():
        raise UserError(f"{folder}: holds no {RESUME_FILE}, so there is nothing to resume; start a new run")
    with restoring(folder):
        saved = files.load(folder / RESUME_FILE)
        return Saved(options(**saved["options"]), folder, saved["state"], saved["rows"], FastPath(**saved["fast_path"]))


def read_record(folder: Path) -> dict:
    """The record of the run in a folder, run.json; {} if there is none. Raises UserError if it is not train.py's."""
    record = files.read_json(folder / "run.json")
    data = record.get("data", {})
    resumed = record.get("resumed", [])
    kinds = {"folder": str, "content": str, "images": dict, "digests": dict}
    is_valid = isinstance(data, dict) and all(isinstance(data[key], kinds[key]) for key in kinds.keys() & data.keys())
    if not is_valid or not isinstance(resumed, list):
        raise UserError(f"{folder / 'run.json'}: was not written by train.py; repair or remove it")
    return record


def mark(phantoms: bool) -> str:
    """The end of every printed line with a number."""
    return " (phantoms)" if phantoms else ""


def new_folder(out: str | Path, suffix: str = "") -> Path:
    """Make out/<YYYY-MM-DD_HH-MM-SS><suffix>, with _2, _3 … if it exists. Raises UserError if it cannot be made."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S") + suffix
    for number in range(1, 1000):
        folder = Path(out) / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                break
        except OSError as error:
            raise UserError(f"{out}: cannot make a folder there ({error.strerror}); name another with --out") from None
    raise UserError(f"{out}: cannot make a folder there; name another with --out")


def environment(device: torch.device) -> dict:
    """What is needed to reproduce a run: command, commit, versions and machine."""
    packages = ("torchvision", "numpy", "scikit-image", "matplotlib", "pillow")
    return {
        "command": [sys.executable, *sys.argv],
        "version": files.VERSION,
        "commit": _commit() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": cpu_capabilities().get("cpu_name", "unknown"),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def _commit() -> str:
    """The commit of this project, ending in -dirty where files were changed since; "" if it is in no repository."""
    project = Path(__file__).parent.parent
    command = ["git", f"--git-dir={project / '.git'}", f"--work-tree={project}", "describe", "--always", "--dirty"]
    try:
        return subprocess.run([*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""
