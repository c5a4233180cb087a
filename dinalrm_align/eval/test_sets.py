"""Read public test sets as published: images, prompts, and raters' preferences between two images.

`open_test_set` finds the files of a test set, and `data.formats` reads them. The two images of a pair keep their
published order, which can reveal the label: in HPDv3 the preferred image is always first. Rewards therefore score
single images, in an order that does not depend on pairs (`ImageSet.order`).

`leaked` finds the pairs that a reward was trained on (HPDv3's official splits are reported to overlap). It compares
digests of stripped prompts, digests of published image paths and, if the training images are available, the SHA-256 of
the image files.
"""

import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dinalrm_align.data.formats import find_layout, read_preferences
from dinalrm_align.data.formats.record import INVALID, Cell, Dropped, ImageRef
from dinalrm_align.data.formats.rows import image_source, row_group_starts
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets_config import TEST_SETS, PublicSet
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import HUB_ID, file_digest, write_atomically


@dataclass(frozen=True)
class Image:
    """An image and its prompt. `name`: published path. `place`: position on disk, for reading in order."""

    name: str
    prompt: str
    source: Path | Cell = field(compare=False)
    place: int = field(default=0, compare=False)

    def read(self) -> bytes:
        """Return the bytes of the image file. Raises OSError or ValueError if the file cannot be read."""
        cell = isinstance(self.source, Cell)
        source = image_source(self.source, Path(self.source.file).parent) if cell else self.source
        return source.read_bytes() if isinstance(source, Path) else source


@dataclass(frozen=True)
class ImageSet:
    """A test set of N pairs of images. No two of the M images share both prompt and name.

    chosen, rejected: (N,) int, indices in `images` of the first and second image of each pair, in published order.
    label: (N,) float32, probability that a rater prefers the first image; 0.5 is a tie.
    group: (N,) int, index of the published record that contains the pair.
    dropped: records that were left out.
    """

    name: str
    images: tuple[Image, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    label: np.ndarray
    group: np.ndarray
    dropped: Dropped

    @property
    def order(self) -> list[int]:
        """Indices of `images` in scoring order: by position on disk, then by digest of the prompt and of the name."""
        digests = [(text_digest(image.prompt), text_digest(f"{image.prompt}\0{image.name}")) for image in self.images]
        return sorted(range(len(digests)), key=lambda row: (self.images[row].place, *digests[row]))

    def digest(self) -> str:
        """Return a digest of the prompts, image names, pairs and labels. Pixels are not included."""
        names = "\0".join(f"{image.name}\0{image.prompt}" for image in self.images)
        columns = (self.chosen, self.rejected, self.label, self.group)
        return text_digest(names + "".join(repr(column.tolist()) for column in columns))

    def missing(self) -> list[str]:
        """Return the names of image files that do not exist."""
        files = ((image.name, image.source) for image in self.images if isinstance(image.source, Path))
        return [name for name, file in files if not file.is_file()]


def open_test_set(name: str, where: str | Path, *, unpack_to: Path | None = None, on_bad: str = "refuse") -> ImageSet:
    """Open a public test set if `name` is in `TEST_SETS`, otherwise a jsonl of (prompt, chosen, rejected[, label]).

    where: folder or annotation file of the test set. For a public test set, "hub" or a hub id downloads the files and
    unpacks archives to `unpack_to`. on_bad: "refuse" raises ValueError for an invalid record; "skip" leaves it out.
    Raises FileNotFoundError, with download instructions, for missing files, and ValueError for files in an unexpected
    layout.
    """
    if name not in TEST_SETS:
        path = Path(where)
        return _image_set(name, path, "jsonl", _Finder([path.parent]), Dropped(on_bad))
    entry = TEST_SETS[name]
    if str(where) == "hub" or (not Path(where).exists() and HUB_ID.fullmatch(str(where))):
        where = _download(name, entry, str(where), unpack_to)
    path = Path(where).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no {name} at {where}; expected a folder with {entry.files}. To get it: {entry.how}")
    files = _find_files(name, entry, path)
    finder = _Finder([files[0].parent / root for root in entry.roots], files, published=True)
    return _image_set(name, files, entry.layout, finder, Dropped(on_bad))


def _find_files(name: str, entry: PublicSet, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / entry.folder if (path / entry.folder).is_dir() else path
    if entry.split:
        found = {*folder.glob(f"**/{entry.split}-*.parquet"), *folder.glob(f"**/{entry.split}/*.parquet")}
        if found:
            return sorted(found)
    for candidate in (f"{entry.split or 'test'}.json", "ImageReward_test.json"):
        if (folder / candidate).is_file():
            return [folder / candidate]
    raise FileNotFoundError(f"{path} holds no {name}: expected {entry.files}. To get it: {entry.how}")


def _image_set(name: str, source: Path | Sequence[Path], layout: str, finder: "_Finder", dropped: Dropped) -> ImageSet:
    rows: dict[Image, int] = {}
    columns = []
    for pair in read_preferences(source, layout, dropped.bad, strict=False):
        try:
            images = [finder(image, pair.prompt) for image in (pair.chosen, pair.rejected)]
        except ValueError as error:
            dropped.bad(INVALID, f"{name}, entry {pair.group}: {error}")
        else:
            columns.append((*(rows.setdefault(image, len(rows)) for image in images), pair.label, pair.group))
    if not columns:
        where = source if isinstance(source, Path) else source[0]
        raise ValueError(f"{where} holds no pairs with a verdict ({dropped})")
    chosen, rejected, label, group = (np.array(column) for column in zip(*columns, strict=True))
    return ImageSet(name, tuple(rows), chosen, rejected, label.astype(np.float32), group, dropped)


class _Finder:
    """Callable that turns an image reference of a test set into an `Image`.

    roots: folders to try for relative image paths. The first that contains an image is kept for later images.
    files: parquet files in reading order. published: whether to reject paths that are absolute or contain "..".
    """

    def __init__(self, roots: Sequence[Path], files: Sequence[Path] = (), *, published: bool = False) -> None:
        self.roots, self.published = roots, published
        self.order = {str(file): number for number, file in enumerate(files)}
        self.root: Path | None = None

    def __call__(self, image: ImageRef, prompt: str) -> Image:
        if isinstance(image, Cell):
            row = row_group_starts(image.file)[image.row_group] + image.row
            place = self.order[image.file] * 100_000 + image.row_group
            return Image(f"{Path(image.file).name}/{row}/{image.column}", prompt, image, place)
        if self.published and (Path(image).is_absolute() or ".." in image.split("/")):
            raise ValueError(f"image path: got {image!r:.80}; expected one inside the set's folder")
        if self.root is None:
            self.root = next((root for root in self.roots if (root / image).is_file()), None)
        return Image(image if self.published else str(Path(image)), prompt, (self.root or self.roots[0]) / image)


def _download(name: str, entry: PublicSet, where: str, unpack_to: Path | None) -> Path:
    if entry.hub is None:
        raise ValueError(f"{name} cannot be used from the hub as it is; get it: {entry.how}; then pass its folder")
    from huggingface_hub import snapshot_download

    repository = entry.hub if where == "hub" else where
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(entry.hub_files)))
    except Exception as error:  # the client raises many types without a network
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(
            f"{name} cannot be downloaded from the hub ({type(error).__name__}: {reason}). With a network: "
            f"{entry.how}; then pass DIR in place of {where!r}"
        ) from error
    archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        return folder
    target = (unpack_to or folder) / name
    for archive in archives:
        done = target / f".{archive.name}.unpacked"
        if not done.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
            done.touch()
    for file in folder.glob("*.json"):
        write_atomically(target / file.name, file.read_bytes())
    return target


@dataclass(frozen=True)
class Trained:
    """Digests of a reward's training prompts and image paths, and SHA-256 of the training images if available."""

    prompts: frozenset[str]
    paths: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Leak:
    """Overlap of N test pairs with training data. `prompt`: (N,) bool, whether the pair's prompt was trained on.

    image: (N,) bool, whether an image of the pair was trained on. by: how images were compared, such as "path".
    """

    prompt: np.ndarray
    image: np.ndarray
    by: str

    @property
    def any(self) -> np.ndarray:
        return self.prompt | self.image


def _path_digest(path: str) -> str:
    """Return a digest of an image's published path. A leading "./" or "images/" does not change the digest."""
    return text_digest(Path(path).as_posix().removeprefix("images/"))


def trained_on(prompts: Iterable[str], paths: Iterable[str] = (), contents: Iterable[str] = ()) -> Trained:
    stripped = (text_digest(prompt.strip()) for prompt in prompts)
    return Trained(frozenset(stripped), frozenset(map(_path_digest, paths)), frozenset(contents))


def read_trained(source: str | Path, dropped: Dropped | None = None) -> Trained:
    """Read a reward's training data from a file or folder in any layout of `data.formats`.

    Image paths are included if images are separate files. Hashes of the image files are included only for a jsonl.
    dropped: what to do about invalid records and missing images of a jsonl; default: raise ValueError.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no training set {path}; expected a directory of pairs, a jsonl or a train.json")
    layout, prompts, images, dropped = find_layout(path), set(), set(), dropped or Dropped("refuse")
    for pair in read_preferences(path, layout, dropped.bad, strict=False):
        prompts.add(pair.prompt)
        images |= {image for image in (pair.chosen, pair.rejected) if isinstance(image, str)}
    files = sorted(path.parent / image for image in images) if layout == "jsonl" else []
    for file in files:
        if not file.is_file():
            dropped.bad("missing image", f"{path}: image {file} does not exist")
    return trained_on(prompts, images, (file_digest(file) for file in files if file.is_file()))


def leaked(scores: PairScores, trained: Trained, images: ImageSet | None = None) -> Leak:
    """Find the test pairs in the training data. `images`: the test set; without it, image contents are not compared."""
    if scores.prompts is None:
        raise ValueError("these pairs have no prompts as text, so they cannot be compared with the training data")
    known = np.array([text_digest(prompt.strip()) in trained.prompts for prompt in scores.prompts])[scores.caption]
    if scores.images is None or not (trained.paths or trained.contents):
        return Leak(known, np.zeros(len(scores.label), dtype=bool), "not at all")
    seen = np.zeros(len(scores.images), dtype=bool)
    by_content = bool(trained.contents) and images is not None
    for row in {*scores.chosen.tolist(), *scores.rejected.tolist()}:
        seen[row] = _path_digest(scores.images[row]) in trained.paths
        if by_content:
            seen[row] |= hashlib.sha256(images.images[row].read()).hexdigest() in trained.contents
    by = "path and content" if by_content else "path"
    return Leak(known, seen[scores.chosen] | seen[scores.rejected], by)
