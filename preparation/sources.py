"""Where brain volumes lie in what their publishers hand out.

Three sources are told apart by the names in them (`find`):

- neurite-OASIS v1.0 (github.com/adalca/medical-datasets, neurite-oasis.md): folders OASIS_OAS1_<nnnn>_MR1 with the
  files of NEURITE_CHOICE, in a folder or in the tar as it is downloaded. The first of these that is there is taken:
  like the PNG set it has a skull, and is registered to an atlas.
- OASIS-1's discs (oasis-brains.org): OAS1_<nnnn>_MR<k>/PROCESSED/MPRAGE/T88_111/…_t88_gfc.hdr and .img, of which the
  PNG set was made; label maps are in OAS1_<nnnn>_MR<k>/FSL_SEG.
- Any folder of NIfTI volumes, named as in BIDS, ADNI, OASIS-3 or IXI, or by subject; or FreeSurfer's SUBJECTS_DIR,
  <subject>/mri/<file>.mgz, of which the first of FREESURFER_CHOICE is taken.
"""

import collections
import itertools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from preparation.folder import SHARES, walk
from preparation.volumes import Volume
from support.console import UserError
from support.files import natural

NEURITE_CHOICE = ("aligned_orig", "orig", "aligned_norm", "norm")
FREESURFER_CHOICE = ("T1", "orig", "norm", "brain")  # those with a skull first
FREESURFER = re.compile(r"(?:.*/)?(?P<subject>[^/]+)/mri/(?P<file>[^/]+)\.mg[zh]")
NEURITE_FILE = re.compile(
    r"(?:.*/)?(?P<subject>OASIS_OAS1_(?P<case>\d{4})_MR(?P<session>\d))/(?:aligned_)?(?:orig|norm)\.nii\.gz"
)
DISCS_FILE = re.compile(
    r"(?:.*/)?(?P<subject>OAS1_(?P<case>\d{4})_MR(?P<session>\d))/PROCESSED/MPRAGE/T88_111/"
    r"(?P=subject)_mpr_n\d+_anon_111_t88_gfc\.(?:hdr|img)"
)
ANY = re.compile(r"(?:.*/)?(?P<subject>[^/]+?)\.(?:nii(?:\.gz)?|mg[zh])", re.IGNORECASE)
LABELS = re.compile(  # not scans: by a part of the name, or by a folder
    r"(?:^|[/_.-])(?:d?seg\d*|aseg|aparc|probseg|labels?)(?=[/_.+-])|(?:^|/)(?:labels|masks)t[rs]/", re.IGNORECASE
)
# Where there is nothing else these may be scans that a mask was applied to; a mask has two values.
MASKS = re.compile(r"(?:^|[/_.-])[a-z]*masks?(?=[/_.+-])", re.IGNORECASE)
# How publishers name a person, wherever it stands in a path: BIDS, ADNI, OASIS-3, OASIS-1, IXI
BIDS = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)")
PERSONS = [BIDS] + [
    re.compile(rf"(?:^|[/_])({name})(?![0-9])")
    for name in (r"\d{3}_S_\d{4,5}", r"OAS3\d{4}", r"OAS1_\d{4}", r"IXI\d{3}")
]
SESSION = re.compile(r"[/_](ses-[A-Za-z0-9]+|d\d{4}|MR\d)(?=[/_.])")
CHOICES = re.compile(r"_(?:run|space|acq|rec|desc|res)-[A-Za-z0-9]+")  # parts of a name in BIDS, of one scan
CONTRASTS = re.compile(  # not T1-weighted: by a part of the name, or by a folder
    r"(?:^|[/_.-])(?:T2w?|T2star|PDw?|FLAIR|DWI|DTI|MRA|bold|asl|swi)(?=[/_.-])", re.IGNORECASE
)
TWO_DIMENSIONAL = re.compile(r"(?:.*/)?slice_(?:norm|orig)\.nii\.gz")  # of neurite-OASIS
ATLAS = "OASIS-1 discs"  # whose volumes are in the atlas of the PNG set
NEURITE = "neurite-OASIS v1.0"
KINDS = {  # how they are found, and what a file is called that should have been
    NEURITE: (NEURITE_FILE, re.compile(r"(?:.*/)?(?:aligned_)?(?:orig|norm)\.nii\.gz")),
    ATLAS: (DISCS_FILE, re.compile(r".*_t88_gfc\.(?:hdr|img)")),
}
LAST_CASES = {"train": 401, "validate": 440, "test": 9999}  # of OASIS-1's numbers, in the PNG set
NIFTI = "NIfTI volumes"
SUFFIXES = (".gz", ".nii", ".hdr", ".img", ".mgz", ".mgh")


def find(source: Path) -> tuple[str, list[Volume], list[str]]:
    """The volumes of a source in the order of their cases and sessions.

    Returns:
        The kind of source, its volumes, and the names of files that look like volumes of that kind but are elsewhere.

    Raises:
        UserError: the source cannot be read, or holds no volume.
    """
    files = sorted(_in_tar(source) if source.is_file() else _in_folder(source))
    names = {name for name, *_ in files}
    for kind, (pattern, file_name) in KINDS.items():
        matches = [(pattern.fullmatch(name), name, *place) for name, *place in files]
        volumes = [
            Volume(name, match["subject"], int(match["case"]), int(match["session"]), *place)
            for match, name, *place in matches
            if match and not _is_second_choice(name, names)
        ]
        if volumes:
            strange = [name for match, name, *_ in matches if not match and file_name.fullmatch(name)]
            return kind, sorted(volumes, key=_order), strange
    if any(map(TWO_DIMENSIONAL.fullmatch, names)):
        raise UserError(f"{source}: is the 2-D edition of neurite-OASIS, one slice a subject; download the 3-D edition")
    volumes = _any_nifti(files)
    if not volumes:
        raise UserError(
            f"{source}: holds no volumes. neurite-OASIS has OASIS_OAS1_<nnnn>_MR1/norm.nii.gz, OASIS-1's discs have "
            "OAS1_<nnnn>_MR1/PROCESSED/MPRAGE/T88_111/…, other volumes end in .nii, .nii.gz, .mgz or .mgh, and are no "
            "label maps by their names; dcm2niix makes .nii of DICOM"
        )
    used = {volume.name for volume in volumes}
    return NIFTI, sorted(volumes, key=_order), [name for name in sorted(names - used) if ANY.fullmatch(name)]


def _order(volume: Volume) -> tuple:
    return volume.case, volume.session, volume.name


def _is_second_choice(name: str, names: set[str]) -> bool:
    """Whether a better file of the same scan is there: of a list of choices, or the header, which names both of a pair.

    Of FreeSurfer's files only those of FREESURFER_CHOICE are scans.
    """
    folder, _, file = name.rpartition("/")
    suffix = "nii.gz" if file.endswith(".nii.gz") else file.rpartition(".")[2]
    stem = file.removesuffix(f".{suffix}")
    if suffix == "img":
        return f"{folder}/{stem}.hdr" in names
    if FREESURFER.fullmatch(name):
        choices = FREESURFER_CHOICE
    elif NEURITE_FILE.fullmatch(name):
        choices = NEURITE_CHOICE
    else:
        return False
    return stem != next((choice for choice in choices if f"{folder}/{choice}.{suffix}" in names), None)


def _in_folder(source: Path) -> Iterator[tuple[str, Path]]:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or tar; name the download")
    return ((name, path) for name, path in walk(source) if path.suffix.lower() in SUFFIXES)


def _in_tar(source: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Nothing is ever unpacked: a volume is read from its place in the tar."""
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./").encode("utf-8", "backslashreplace").decode()
                if name.startswith("/") or ".." in Path(name).parts:
                    raise UserError(f"{source}: its member {member.name!r} points outside; download it again")
                if member.isdir() or any(part.startswith(".") for part in Path(name).parts):
                    continue
                if not member.isreg() or member.issparse():  # a link, or packed in a way of its own
                    raise UserError(f"{source}: {name!r} in it is a link or sparse; unpack it, and name the folder")
                yield name, source, member.offset_data, member.size
            end = tar.offset
        with open(source, "rb") as file:  # tarfile stops at a damaged header as if it were the end
            file.seek(end)
            if file.read(512) != bytes(512):
                raise UserError(f"{source}: ends early, or is damaged; download it again")
    except tarfile.ReadError as error:
        if str(error) == "unexpected end of data":
            raise UserError(f"{source}: ends early; download it again") from None
        raise UserError(f"{source}: is neither a folder nor an uncompressed tar; name a folder") from None


def _any_nifti(files: list[tuple]) -> list[Volume]:
    """NIfTI files by subject: a publisher's name of a person, else the file's name.

    Label maps and other contrasts than T1 are left out, and so are further runs of a scan, and copies of it in another
    space. Numeric labels are the cases, others are counted.
    """
    names = {name for name, *_ in files}
    scans = [file for file in files if ANY.fullmatch(file[0]) and not LABELS.search(file[0])]
    scans = [file for file in scans if not MASKS.search(file[0])] or scans
    scans = [file for file in scans if not _is_second_choice(file[0], names)]
    scans = [file for file in scans if not CONTRASTS.search(file[0])] or scans
    persons = _persons([name for name, *_ in scans])
    chosen = {}
    for (label, session), (name, *place) in zip(persons, scans, strict=True):
        file = name.rpartition("/")[2]
        alike = label, session, CHOICES.sub("", file)
        rank = "_space-" in file, "_desc-" in file, natural(file), name  # the native space first, then the lowest run
        if alike not in chosen or rank < chosen[alike][0]:
            chosen[alike] = rank, name, place
    labelled = [(label, session, name, *place) for (label, session, _), (_, name, place) in chosen.items()]

    labels = sorted({label for label, *_ in labelled}, key=natural)
    numbers = [int(digits[1]) if (digits := re.fullmatch(r"\D*(\d{1,6})", label)) else 0 for label in labels]
    if len(set(numbers)) < len(labels) or 0 in numbers:
        numbers = range(1, len(labels) + 1)
    cases = dict(zip(labels, numbers, strict=True))
    sessions = {label: sorted({each[1] for each in labelled if each[0] == label}, key=natural) for label in labels}
    return [
        Volume(name, label, cases[label], sessions[label].index(session) + 1, *place)
        for label, session, name, *place in labelled
    ]


def _persons(names: list[str]) -> list[tuple[str, str]]:
    """The subject and the session of each file.

    In BIDS, equal labels below two folders, such as siteA and siteB, are two subjects, but not below derivatives.
    Where a publisher's names tell the person, but no session, each folder has a session of its own.
    """
    stems = collections.Counter((FREESURFER.fullmatch(name) or ANY.fullmatch(name))["subject"] for name in names)
    sites = collections.defaultdict(set)
    labelled = []
    for name in names:
        pattern = next((pattern for pattern in PERSONS if pattern.search(name)), None)
        session = SESSION.findall(name)
        if pattern is None:
            stem = (FREESURFER.fullmatch(name) or ANY.fullmatch(name))["subject"]
            label = stem if stems[stem] == 1 else re.sub(r"(?i)\.(nii(\.gz)?|mg[zh])$", "", name)
            labelled.append((label, session[-1] if session else "", ""))
            continue
        match = list(pattern.finditer(name))[-1]
        if pattern is BIDS:
            site = re.sub(r"(?:^|/)(?:derivatives/[^/]+|rawdata|sourcedata)(?=/|$)", "", name[: name.index(match[1])])
            site = site.strip("/")
            sites[match[1]].add(site)
            labelled.append((match[1], session[-1] if session else "", site))
        else:
            folder = name.rpartition("/")[0]
            labelled.append((match[1], session[-1] if session else folder, ""))
    return [
        (f"{site}/{label}" if site and len(sites[label]) > 1 else label, session) for label, session, site in labelled
    ]


def without_copies(volumes: list[Volume]) -> tuple[list[Volume], list[str]]:
    """The first volume of each scan, and an error for each of the others."""
    kept, errors = [], []
    for _, same in itertools.groupby(volumes, key=lambda volume: volume[2:4]):
        first, *others = same
        kept.append(first)
        for other in others:
            names = f"{first.name} and {other.name}"
            errors.append(f"{names}: both are scan {first.session} of {first.subject}; remove one")
    return kept, errors


def label_volume(volume: Volume) -> Volume | None:
    """The label map of a volume of OASIS-1's discs, FSL's segmentation, if it is there."""
    name = volume.file.with_suffix("").name.replace("_t88_gfc", "_t88_masked_gfc_fseg")
    path = volume.file.parents[3] / "FSL_SEG" / f"{name}.hdr"
    return volume._replace(name=path.name, file=path) if path.is_file() else None


def sets_own_split(volumes: list[Volume]) -> dict[int, str]:
    """The split that the PNG set has, by OASIS-1's numbers of subjects. {} if it leaves a split without any."""
    splits = {v.case: next(split for split, last in LAST_CASES.items() if v.case <= last) for v in volumes}
    return splits if set(splits.values()) == set(SHARES) else {}


def sizes_and_times(volume: Volume) -> list[list[int]]:
    """The sizes of a volume's files and when they were written: its own, the other one of a pair, its label map's."""
    paths = [volume.file, volume.file.with_suffix(".img")] if volume.file.suffix == ".hdr" else [volume.file]
    if volume.file.suffix == ".hdr" and (labels := label_volume(volume)):
        paths += [labels.file, labels.file.with_suffix(".img")]
    stats = [path.stat() for path in paths if path.is_file()]  # what is missing is said when it is read
    return [[volume.size or each.st_size for each in stats], [each.st_mtime_ns for each in stats]]
