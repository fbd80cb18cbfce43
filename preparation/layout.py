"""Where files lie in a folder of slices, as the PNG set has them."""

from pathlib import Path

LABEL_STEP = 85  # grey levels between two labels in the files of label maps


def label_map(scan: Path) -> Path:
    """Where the label map of a scan would lie: keras_png_slices_seg_<split>/seg_C_slice_S…."""
    folder = scan.parent.name.replace("slices_", "slices_seg_", 1)
    return scan.parent.with_name(folder) / scan.name.replace("case_", "seg_", 1)
