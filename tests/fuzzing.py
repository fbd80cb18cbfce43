"""How tests damage what a program reads, and how long and how large reading may get."""

import contextlib
import copy
import os
import re
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", 200)), deadline=None, suppress_health_check=list(HealthCheck), database=None
)
FEW = settings(FUZZ, max_examples=FUZZ.max_examples // 4)
SECONDS, MEGABYTES = 5, 100  # for one file


@st.composite
def damaged(draw, originals: list[bytes]) -> bytes:
    """One of the originals, cut, overwritten, doubled or filled at random places."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        # damage near the start and the end, where headers and tables are, is as likely as anywhere else
        place = st.one_of(st.integers(0, 200), st.integers(0, len(content)), st.integers(-200, -1))
        at = draw(place) % (len(content) + 1)
        length = draw(st.one_of(st.integers(0, 8), st.integers(0, len(content))))
        match draw(st.sampled_from(("overwrite", "insert", "cut", "end", "double", "zero"))):
            case "overwrite":
                new = draw(st.binary(max_size=16))
                content[at : at + len(new)] = new
            case "insert":
                content[at:at] = draw(st.binary(max_size=64))
            case "cut":
                del content[at : at + length]
            case "end":
                del content[at:]
            case "double":
                content[at:at] = content[at : at + length]
            case "zero":
                content[at : at + length] = bytes(len(content[at : at + length]))
    return bytes(content)


def memory(line: str) -> float:
    """Megabytes that a line of Linux's /proc/self/status names."""
    (found,) = re.findall(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


@contextlib.contextmanager
def bounded():
    """What is done here takes little time and little memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is used now
    before, started = memory("VmRSS"), time.process_time()  # others may be at work
    yield
    seconds, megabytes = time.process_time() - started, memory("VmHWM") - before
    assert seconds < SECONDS and megabytes < MEGABYTES


JSON_VALUES = [None, True, -1, 0, 1.5, 10**20, float("nan"), "", "x\n", "\udc80", [], {}, ["a"], {"a": 1}]


@st.composite
def changed(draw, contents):
    """`contents` with one to three of its parts, at any depth, replaced, left out or added."""
    contents = copy.deepcopy(contents)
    for _ in range(draw(st.integers(1, 3))):
        at = contents
        while isinstance(at, dict | list) and len(at):
            key = draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], dict | list) or not len(at[key]) or draw(st.integers(0, 3)) == 0:
                break
            at = at[key]
        if not isinstance(at, dict | list) or not len(at):
            continue
        match draw(st.sampled_from(("replace", "replace", "leave out", "add"))):
            case "replace":
                at[key] = copy.deepcopy(draw(st.sampled_from(JSON_VALUES)))  # it may be changed, too
            case "leave out":
                del at[key]
            case "add" if isinstance(at, dict):
                at[draw(st.sampled_from(("x", "")))] = copy.deepcopy(draw(st.sampled_from(JSON_VALUES)))
    return contents
