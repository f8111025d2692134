"""CIFAR-10 (Krizhevsky 2009) from Parquet files, from a torchvision folder, or downloaded by torchvision."""

import os
import threading
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
SIZE = 32
IMAGES = {"train": 50_000, "test": 10_000}
VARIABLE = "KFAC2_CIFAR10"
FOLDER = "cifar-10-batches-py"
JPEG = b"\xff\xd8"
JPEG_COPY = "CIFAR-10 (JPEG copy)"
SECONDS_TO_CONNECT = 10


class DataError(RuntimeError):
    """Data that is not there, or not what it should be."""


class Cifar10NotFound(DataError):
    """No source has CIFAR-10."""


class Split(NamedTuple):
    images: Tensor
    """uint8 ``(N, 3, 32, 32)``"""
    labels: Tensor
    """int64 ``(N,)``, 0-9"""
    is_jpeg: bool
    """Decoded from lossy JPEG files, hence not the original's pixels."""


class Encoded(NamedTuple):
    """One image of a Parquet file, not decoded yet."""

    content: bytes
    origin: str


@dataclass(frozen=True)
class Cifar10:
    """Where CIFAR-10 comes from: ``path``, else ``root``, else downloaded into ``root``.

    Args:
        path: a folder of Parquet files ``train*.parquet`` and ``test*.parquet`` with the columns ``img``
            {bytes, path} and ``label``; by default the environment variable ``KFAC2_CIFAR10``. If it
            is given, no other source is tried.
        root: the folder that torchvision's ``cifar-10-batches-py`` is in, or is downloaded into.
    """

    path: str | None = None
    root: str = "data"

    @property
    def parquet_folder(self) -> Path | None:
        """The folder that is given, if any."""
        given = self.path or os.environ.get(VARIABLE)
        return Path(given) if given else None

    def load(self, train_samples: int | None = None, test_samples: int | None = None) -> tuple[Split, Split]:
        """The training and the test split: the first images of a fixed shuffle, or all in file order.

        The shuffle is one of rows: a source with another order of rows gives other images.

        Raises:
            DataError: no source, a broken file, too few images, labels that are not CIFAR-10's.
        """
        return self._split("train", train_samples), self._split("test", test_samples)

    def _split(self, name: str, samples: int | None) -> Split:
        folder = self.parquet_folder
        if folder is None:
            pixels, labels = _read_torchvision(Path(self.root), name)
            chosen = _choose(samples, labels, f"{name} split of {Path(self.root) / FOLDER}")
            return Split(_channels_first(pixels[chosen.numpy()]), labels[chosen], is_jpeg=False)
        encoded, labels = _read_parquet(folder, name)
        classes = len(labels.unique())
        if name == "train" and classes < CLASSES:
            raise DataError(f"{folder}: {classes} classes in the training split, CIFAR-10 has {CLASSES}")
        chosen = _choose(samples, labels, f"{name} split of {folder}")
        images = [encoded[i] for i in chosen.tolist()]
        pixels = _channels_first(_decode(images))
        return Split(pixels, labels[chosen], any(image.content.startswith(JPEG) for image in images))


def _choose(samples: int | None, labels: Tensor, origin: str) -> Tensor:
    """Indices of the images to use; the shuffle of the rows is the same on every machine, for every seed."""
    if samples is None:
        return torch.arange(len(labels))
    if samples > len(labels):
        raise DataError(f"{origin}: {samples:,} images are asked for, it has {len(labels):,}")
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:samples]


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# -- Parquet ----------------------------------------------------------------------------------------


def _read_parquet(folder: Path, split: str) -> tuple[list[Encoded], Tensor]:
    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        raise Cifar10NotFound(
            f"{folder}: no {split}*.parquet there. problem.data.path or {VARIABLE} must name a folder of "
            "CIFAR-10's Parquet files; without it, torchvision's copy is used"
        )
    contents: list[Encoded] = []
    labels: list[int] = []
    for file in files:
        for number, (image, label) in enumerate(_rows(file)):
            if not isinstance(label, int) or not 0 <= label < CLASSES:
                raise DataError(f"{file}, row {number}: the label must be 0 to 9, got {label}")
            contents.append(Encoded(image, f"{file}, row {number}"))
            labels.append(label)
    if not labels:
        raise DataError(f"{files[0]}: has no rows")
    return contents, torch.tensor(labels, dtype=torch.int64)


def _rows(file: Path) -> list[tuple[bytes, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read(columns=["img", "label"])
        images = table["img"].combine_chunks().field("bytes").to_pylist()  # pyright: ignore
        return list(zip(images, table["label"].to_pylist(), strict=True))
    except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
        raise DataError(
            f"{file}: cannot be read as Parquet with the columns img {{bytes, path}} and label: {error}"
        ) from error


def _decode(images: Sequence[Encoded]) -> np.ndarray:
    """uint8 ``(N, 32, 32, 3)``"""
    from PIL import Image

    pixels = np.empty((len(images), SIZE, SIZE, 3), dtype=np.uint8)
    for i, (content, origin) in enumerate(images):
        try:
            with Image.open(BytesIO(content)) as image:
                array = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise DataError(f"{origin}: the image cannot be decoded: {error}") from error
        if array.shape != pixels.shape[1:]:
            raise DataError(f"{origin}: the image is {array.shape[1]}×{array.shape[0]}, not {SIZE}×{SIZE}")
        pixels[i] = array
    return pixels


# -- torchvision ------------------------------------------------------------------------------------


def _read_torchvision(root: Path, split: str) -> tuple[np.ndarray, Tensor]:
    from torchvision.datasets import CIFAR10

    if not (root / FOLDER).is_dir():
        _download(root)
    try:
        dataset = CIFAR10(str(root), train=split == "train")
    except RuntimeError as error:
        raise DataError(f"{root / FOLDER}: is incomplete or damaged, remove it ({error})") from error
    return dataset.data, torch.tensor(dataset.targets)


def _download(root: Path) -> None:
    """Into a folder beside, then renamed: an interrupted download leaves nothing that looks complete."""
    from torchvision.datasets import CIFAR10

    try:
        _connect(CIFAR10.url)
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root) as temporary:
            CIFAR10(temporary, download=True)
            os.rename(Path(temporary) / FOLDER, root / FOLDER)
    except (OSError, RuntimeError) as error:
        if (root / FOLDER).is_dir():  # another training was faster
            return
        raise Cifar10NotFound(
            f"no CIFAR-10 here. Give one of: a folder of Parquet files in {VARIABLE} or problem.data.path; "
            f"torchvision's {FOLDER} in {root}/ (problem.data.root); network, to download it ({error})"
        ) from error


def _connect(url: str) -> None:
    """Find out within seconds that there is no network; a look-up of the name alone may hang for a minute."""
    failures: list[Exception] = [TimeoutError(f"{url} did not answer in {SECONDS_TO_CONNECT} s")]

    def attempt() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=SECONDS_TO_CONNECT).close()
            failures.clear()
        except Exception as error:
            failures[:] = [error]

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_CONNECT)
    if failures:
        raise OSError(str(failures[0]))
