"""Options and environments in random combinations: each is used, or refused in one line."""

import pytest
from conftest import refused, run_program
from fuzzing import FEW, FUZZ
from hypothesis import given
from hypothesis import strategies as st

ODD = ["", "a b", *"x 0 1 -1 2 1e3 nan inf 99999999999 0.5 cpu dcgan é / .".split()]


def words_of(choices, options: dict[str, list[str]]) -> list[str]:
    """One to five options, in any order, with good and odd values."""
    words = []
    for name in choices.draw(st.lists(st.sampled_from(list(options)), min_size=1, max_size=5)):
        words.append(name)
        values = options[name]
        words += [choices.draw(st.sampled_from(values + values + ODD))] if values else []
    return words


TRAIN = {
    **dict.fromkeys(("--demo", "--skip-bad", "--allow-shared-cases", "--plain"), []),
    **dict.fromkeys(("--epochs", "--batch-size", "--dcgan-epochs", "--dcgan-batch-size"), ["1", "3"]),
    **dict.fromkeys(("--n-embeddings", "--embeddings-dim", "--seed"), ["1", "8"]),
    **dict.fromkeys(("--autoregressive-epochs", "--autoregressive-batch-size"), ["1", "3"]),
    **dict.fromkeys(("--lr", "--dcgan-lr", "--autoregressive-lr", "--beta"), ["0.1", "1e-5"]),
    "--precision": ["auto", "float32", "bfloat16"],
    "--device": ["auto", "cuda", "cuda:7", "mps"],
    "--prior": ["dcgan", "autoregressive"],
    "--only": ["vqvae", "dcgan", "autoregressive"],
    "--codebook": ["kmeans", "paper", "ema"],
    "--dcgan-training": ["balanced", "report"],
    "--vqvae": ["nowhere.pth"],
    "--resume": ["nowhere"],
    "--out": ["out"],
}
PREDICT = {
    **dict.fromkeys(("--skip-bad",), []),
    **dict.fromkeys(("--samples", "--seed"), ["1"]),
    "--prior": ["nowhere.pth"],
    "--slice": ["3", "0-31"],
    "--export-codes": ["codes.npz"],
    "--split": ["train", "validate", "test"],
    "--data": ["nowhere"],
    "--device": ["auto"],
    "--out": ["out"],
}
OASIS = {
    **dict.fromkeys(("--skip-bad", "--preview"), []),
    **dict.fromkeys(("--slices", "--workers", "--seed"), ["1", "32"]),
    "--least-brain": ["0.92", "1"],
    "--plane": ["axial", "coronal", "sagittal"],
    "--split": ["nowhere.csv"],
}


@FUZZ
@given(choices=st.data())
def test_options_in_any_combination_do_what_they_say_or_are_refused(data, heads, tmp_path_factory, choices):
    folder = tmp_path_factory.getbasetemp()
    match choices.draw(st.sampled_from(("train.py", "predict.py", "preparation.oasis"))):
        case "train.py" as program:
            words = (*words_of(choices, TRAIN), "--data", data, "--dry-run")
        case "predict.py" as program:
            words = (choices.draw(st.sampled_from(("nowhere.pth", "", "/"))), *words_of(choices, PREDICT))
        case "preparation.oasis" as program:
            words = (heads, choices.draw(st.sampled_from(("out", "", "/"))), *words_of(choices, OASIS), "--dry-run")
    done = run_program(program, *words, cwd=folder)
    if done.returncode:
        refused(done)
    assert "Traceback" not in done.stderr


@FEW
@given(values=st.dictionaries(st.sampled_from(("OASIS_DIR", "COLUMNS", "HOME", "TMPDIR")), st.sampled_from(ODD)))
def test_programs_work_or_say_why_with_odd_values_in_the_environment(data, tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        for words in (("train.py", "--dry-run"), ("preparation.oasis", data, "nowhere", "--dry-run")):
            done = run_program(*words, cwd=folder)
            if done.returncode:
                refused(done)
