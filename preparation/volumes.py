"""One brain volume: read from NIfTI, FreeSurfer's MGH or Analyze, turned to RAS, at 1 mm, and cut into slices."""

import gzip
import io
import logging
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.fileholders import FileHolder
from nibabel.processing import resample_from_to
from scipy import ndimage

from preparation.folder import LABEL_STEP, SIZE
from support.console import UserError, one_line

# An Analyze header does not tell left from right. OASIS-1's files in T88_111 are taken for LAS at 1 mm, as nibabel and
# braindataprep take them: the first axis runs to the patient's left, the second to the front, the third upwards.
ANALYZE = np.diag([-1.0, 1.0, 1.0, 1.0])

WHITE = 0.995  # quantile
EDGE = 0.02  # share of white: what is brighter than that counts as foreground
DARKER = 0.02  # share of the voxels that may be darker than the background: splines undershoot in up to 0.8 %
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}  # axes: across slices, rows, columns

FEWEST_VALUES = 50  # different ones in a scan: label maps have fewer, and whole numbers

MOST_VOXELS = 512**3
GZIP, MGH = b"\x1f\x8b", b"\0\0\0\1"  # how these files begin
MOST_BYTES = 2**30 * 2  # of a file

# nibabel reports what it mends in headers; what cannot be used is said here.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


class VolumeError(UserError):
    """A volume cannot be used. The message names it and says what to do."""


class Volume(NamedTuple):
    """Where a volume lies.

    Attributes:
        name: its path in the source.
        subject: as the source names it.
        case, session: number of the subject, and which of its scans it is, from 1.
        file: the file itself, or the tar that holds it.
        offset, size: where it is in the tar, in bytes; offset is None outside of one.
    """

    name: str
    subject: str
    case: int
    session: int
    file: Path
    offset: int | None = None
    size: int = 0


class Scan(NamedTuple):
    """A volume that was read: `voxels` (x, y, z) float32 at 1 mm, running right, to the front and up (RAS).

    `notes` is what a user should know about it.
    """

    voxels: np.ndarray
    notes: list[str]


def _contents(volume: Volume) -> list[bytes]:
    """The bytes of a NIfTI file, or of an Analyze header and its image."""
    try:
        pair = volume.file.suffix in (".hdr", ".img")
        if volume.offset is not None:
            if volume.name.endswith((".hdr", ".img")):
                raise VolumeError(f"{volume.file}: unpack it; only .nii and .nii.gz are read from within a tar")
            if volume.size > MOST_BYTES:
                raise VolumeError(f"{volume.name}: is larger than {MOST_BYTES >> 30} GiB")
            with open(volume.file, "rb") as file:
                file.seek(volume.offset)
                contents = file.read(volume.size)
            if len(contents) < volume.size:
                raise VolumeError(f"{volume.file}: ends within {volume.name}; download it again")
            return [contents]
        paths = [volume.file.with_suffix(suffix) for suffix in (".hdr", ".img")] if pair else [volume.file]
        for path in paths:
            if path.is_symlink() and not path.exists():
                raise VolumeError(f"{volume.name}: is a link to contents that are not there; fetch it (datalad get)")
            if pair and not path.is_file():
                raise VolumeError(f"{volume.name}: {path.name} is missing beside it; an Analyze volume has both files")
            if path.is_fifo():  # which would be waited for
                raise VolumeError(f"{volume.name}: is a pipe, not a file")
            if path.stat().st_size > MOST_BYTES:
                raise VolumeError(f"{volume.name}: is larger than {MOST_BYTES >> 30} GiB")
        return [path.read_bytes() for path in paths]
    except OSError as error:
        raise VolumeError(f"{volume.name}: cannot be read ({error.strerror})") from None


def read(volume: Volume, labels: bool = False) -> Scan:
    """Read a volume, turn it to RAS, and resample it linearly where its voxels are not of 1 mm.

    Raises VolumeError if it is damaged, is not one three-dimensional volume, has values that are not finite, or so few
    that it is a label map; unless it is to be one, by `labels`.
    """
    try:
        image, notes = _open(volume)
        shape = tuple(image.shape)
        if len(shape) < 3 or any(n != 1 for n in shape[3:]):
            raise VolumeError(f"{volume.name}: is {'×'.join(map(str, shape))}, not one volume")
        if min(shape[:3]) < 16:
            raise VolumeError(f"{volume.name}: has {min(shape[:3])} planes in one direction; 16 are needed")
        if image.get_data_dtype().kind not in "biuf":
            raise VolumeError(f"{volume.name}: has voxels of type {image.get_data_dtype()}, not numbers")
        zooms = tuple(round(float(zoom), 4) for zoom in voxel_sizes(image.affine))  # a header may hold others beside
        if not all(0.2 <= zoom <= 5 for zoom in zooms):
            raise VolumeError(f"{volume.name}: has voxels of {zooms} mm; those of 0.2 to 5 mm can be used")
        image = nib.as_closest_canonical(nib.squeeze_image(image))
        values = np.unique(image.dataobj[::2, ::2, ::2])
        if 1 < len(values) < FEWEST_VALUES and (values == np.rint(values)).all() and not labels:
            what = f"has {len(values)} different values, as label maps and masks"
            raise VolumeError(f"{volume.name}: {what}; leave it out with --skip-bad")
        if any(abs(zoom - 1) > 0.01 for zoom in zooms):
            along = voxel_sizes(image.affine)
            target = tuple(math.ceil((n - 1) * zoom) + 1 for n, zoom in zip(image.shape, along, strict=True))
            if math.prod(target) > MOST_VOXELS:
                raise VolumeError(f"{volume.name}: would have {math.prod(target)} voxels of 1 mm; correct its header")
            # along the axes of its own grid, as volumes of 1 mm are cut, however the grid lies in the scanner
            image = resample_from_to(image, (target, image.affine @ np.diag([*1 / along, 1])), order=1)
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except VolumeError:
        raise
    except MemoryError:
        raise VolumeError(f"{volume.name}: does not fit into memory; give fewer --workers") from None
    except Exception as error:  # nibabel has many; numpy and zlib have others
        reason = one_line(error) or type(error).__name__
        raise VolumeError(f"{volume.name}: cannot be read ({reason}); download it again") from None
    strange = ~np.isfinite(voxels)
    if strange.any():
        voxels = _without_nan(volume, voxels, strange)
    return Scan(voxels, notes)


def _without_nan(volume: Volume, voxels: np.ndarray, strange: np.ndarray) -> np.ndarray:
    """Voxels whose NaN outside the head, as SPM writes them, are the darkest value. Raises VolumeError if in the head.

    Outside are those that are connected with the border by others of their kind.
    """
    enclosed = strange & ndimage.binary_fill_holes(~strange)
    if np.isinf(voxels).any() or enclosed.any() or strange.all():
        raise VolumeError(f"{volume.name}: has values in the head that are not finite")
    return np.where(strange, voxels[~strange].min(), voxels)


def _open(volume: Volume) -> tuple[nib.spatialimages.SpatialImage, list[str]]:
    """The image, whose voxels are in memory but not yet decoded, and notes about it."""
    contents = _contents(volume)
    if len(contents) == 2:
        names = ("header", "image")
        holders = {name: FileHolder(fileobj=io.BytesIO(part)) for name, part in zip(names, contents, strict=True)}
        image = nib.AnalyzeImage.from_file_map(holders)
    else:
        packed = contents[0].startswith(GZIP)  # whatever the name says
        data = _decompress(volume, contents[0]) if packed else contents[0]
        format = _format(volume, data)
        data = data if format is nib.MGHImage else _with_intercept(format, data)
        image = format.from_bytes(data)
        contents = [data]
    voxels = math.prod(map(int, image.shape))
    if not 0 < voxels <= MOST_VOXELS:
        raise VolumeError(f"{volume.name}: announces {voxels} voxels")
    size = voxels * image.get_data_dtype().itemsize
    if size > len(contents[-1]) - image.dataobj.offset:  # nibabel would ask for the memory first
        raise VolumeError(f"{volume.name}: is damaged or ends early; download it again")
    if len(contents) == 2:
        notes = [] if image.header.get_zooms()[:3] == (1, 1, 1) else ["its header has other voxels than 1 mm; ignored"]
        return nib.Nifti1Image(np.asanyarray(image.dataobj), ANALYZE), notes
    if isinstance(image, nib.MGHImage):
        return image, [] if image.header["goodRASFlag"] else [
            "its header gives no orientation; FreeSurfer's was assumed"
        ]
    codes = image.header["sform_code"], image.header["qform_code"]
    if codes[1] and not np.linalg.det(image.header.get_sform()[:3, :3]):  # an sform of zeros
        image = type(image)(image.dataobj, image.header.get_qform(), image.header)
    return image, [] if any(codes) else ["its header gives no orientation; LAS was assumed"]


def _format(volume: Volume, start: bytes) -> type[nib.spatialimages.SpatialImage]:
    """NIfTI 1 or 2, or MGH, by the start of the file."""
    for format in (nib.Nifti1Image, nib.Nifti2Image):
        if format.header_class.may_contain_header(start):
            return format
    if start.startswith(MGH):
        return nib.MGHImage
    raise VolumeError(f"{volume.name}: is not NIfTI and not MGH; download it again")


def _with_intercept(format: type[nib.Nifti1Image], data: bytes | bytearray) -> bytes | bytearray:
    """A file whose intercept is 0 if it was NaN, which nibabel refuses."""
    kind, start = format.header_class.template_dtype.fields["scl_inter"][:2]
    header = format.header_class.from_fileobj(io.BytesIO(data), check=False)
    if not np.isnan(header["scl_inter"]):
        return data
    return data[:start] + bytes(kind.itemsize) + data[start + kind.itemsize :]


def _decompress(volume: Volume, contents: bytes) -> bytearray:
    """What a .gz holds, with its checksum verified."""
    data = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(contents)) as file:
            while part := file.read(2**22):  # a larger size would be allocated at once
                data += part
                if len(data) > MOST_BYTES:
                    raise VolumeError(f"{volume.name}: is larger than {MOST_BYTES >> 30} GiB")
    except (EOFError, OSError, zlib.error):
        raise VolumeError(f"{volume.name}: is damaged or ends early; download it again") from None
    return data


def cut(
    voxels: np.ndarray, plane: str, n_slices: int, least_brain: float, highest: bool = False
) -> tuple[np.ndarray, list[int]]:
    """Slices of a volume (x, y, z) in RAS at 1 mm, of any unit, as the report's set has them.

    Slices are 1 mm apart, in the middle or the highest of those with `least_brain` of the largest one's foreground, and
    padded or cropped about its centre. In the set the highest slices have 0.89 of the largest one's brain, and 0.93
    to 0.95 of its head. Rows and columns are the remaining axes in their order: axial slices have the front to the
    right and the patient's left at the top. Black is the background, the median of the border; what is darker is cut to
    it. Each slice is scaled by its own maximum.

    Returns:
        images: (n_slices, 256, 256) uint8.
        positions: the index of each along the axis across.

    Raises:
        ValueError: nothing is brighter than the background, much is darker, or too few slices have enough brain.
    """
    faces = [voxels.take(end, axis) for axis in range(3) for end in (0, -1)]
    black = float(np.median(np.concatenate([face.ravel() for face in faces])))
    above = voxels[voxels > black]
    if above.size == 0:
        raise ValueError("is empty: nothing is brighter than its border")
    white = float(np.quantile(above, WHITE))
    if (voxels < black - EDGE * (white - black)).mean() > DARKER:
        raise ValueError(
            "has many voxels that are darker than its border; shift them so that the background is darkest"
        )
    brain = voxels > black + EDGE * (white - black)
    across, *inside = PLANES[plane]
    area = brain.sum(tuple(inside))
    enough = np.flatnonzero(area >= least_brain * area.max())
    low = int(enough[0])
    high = int(enough[-1])
    if high - low + 1 < n_slices:
        raise ValueError(f"has {high - low + 1} slices with enough brain, not {n_slices}; lower --least-brain")
    start = high + 1 - n_slices if highest else (low + high + 1 - n_slices) // 2
    between = brain.take(range(low, high + 1), across)
    middles = []
    for axis in inside:
        filled = np.flatnonzero(between.any(tuple(other for other in range(3) if other != axis)))
        middles.append((int(filled[0]) + int(filled[-1]) + 1) // 2)
    positions = list(range(start, start + n_slices))
    return _grey(_placed(voxels - np.float32(black), plane, positions, middles)), positions


def cut_atlas(voxels: np.ndarray, first: int, n_slices: int) -> tuple[np.ndarray, list[int]]:
    """The planes of a volume (x, y, z) in OASIS-1's atlas, T88_111, that the report's set has: nothing is fitted.

    `first` counts from 1. Returns what `cut` does. Raises ValueError if the volume lacks a plane.
    """
    positions = list(range(first - 1, first - 1 + n_slices))
    if positions[-1] >= voxels.shape[2]:
        raise ValueError(f"has {voxels.shape[2]} planes, not {positions[-1] + 1}; give another --first-plane")
    middles = [voxels.shape[0] // 2, voxels.shape[1] // 2]
    return _grey(_placed(voxels, "axial", positions, middles)), positions


def cut_labels(labels: np.ndarray, positions: list[int]) -> np.ndarray:
    """Label maps (n, 256, 256) uint8 of a volume of 0 to 3 (x, y, z) beside slices of `cut_atlas`, in steps of 85."""
    planes = _placed(labels, "axial", positions, [labels.shape[0] // 2, labels.shape[1] // 2])
    return (np.rint(planes).clip(0, 3) * LABEL_STEP).astype(np.uint8)


def _placed(voxels: np.ndarray, plane: str, positions: list[int], middles: list[int]) -> np.ndarray:
    """Slices (n, SIZE, SIZE) float32 whose middle is at index `middles` of rows and columns; 0 outside the volume."""
    across, *inside = PLANES[plane]
    images = np.zeros((len(positions), SIZE, SIZE), np.float32)
    target = []
    source = []
    for axis, middle in zip(inside, middles, strict=True):
        start = middle - SIZE // 2
        stop = min(start + SIZE, voxels.shape[axis])
        target.append(slice(max(-start, 0), stop - start))
        source.append(slice(max(start, 0), stop))
    chosen = np.moveaxis(voxels.take(positions, across), across, 0)
    images[:, *target] = chosen[:, *source]
    return images


def _grey(images: np.ndarray) -> np.ndarray:
    """Slices as uint8, each scaled by its own maximum, negative values cut."""
    images = images.clip(0)
    return np.rint(images * (255 / images.max((1, 2), keepdims=True).clip(1e-30))).astype(np.uint8)
