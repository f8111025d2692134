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

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIZE = 32
VARIABLE = "KFAC2_CIFAR10"
FOLDER = "cifar-10-batches-py"
JPEG = b"\xff\xd8"
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

    def load(self, train_samples: int | None = None, test_samples: int | None = None) -> tuple[Split, Split]:
        """The training and the test split: the first images of a fixed shuffle, or all in file order.

        Raises:
            DataError: no source, a broken file, too few images, labels that are not CIFAR-10's.
        """
        path = self.path or os.environ.get(VARIABLE)
        splits = []
        for name, samples in (("train", train_samples), ("test", test_samples)):
            if path:
                contents, labels = _read_parquet(Path(path), name)
                chosen = _choose(samples, labels, f"{path} ({name})", all_classes=name == "train")
                images, is_jpeg = _decode([contents[i] for i in chosen])
            else:
                pixels, labels = _read_torchvision(Path(self.root), name)
                chosen = _choose(samples, labels, f"{self.root}/{FOLDER} ({name})", name == "train")
                images, is_jpeg = torch.from_numpy(pixels[chosen.numpy()]).permute(0, 3, 1, 2), False
            splits.append(Split(images.contiguous(), labels[chosen], is_jpeg))
        train, test = splits
        return train, test


def _choose(samples: int | None, labels: Tensor, origin: str, all_classes: bool) -> Tensor:
    """Indices of the images to use; the shuffle is the same on every machine and for every seed."""
    if all_classes and len(labels.unique()) < len(CLASSES):
        raise DataError(f"{origin}: has {len(labels.unique())} classes, CIFAR-10 has {len(CLASSES)}")
    if samples is None:
        return torch.arange(len(labels))
    if samples < 1:
        raise ValueError(f"the number of images must be positive, got {samples}")
    if samples > len(labels):
        raise DataError(f"{origin}: {samples} images are asked for, it has {len(labels)}")
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:samples]


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
        rows = _rows(file)
        for number, (image, label) in enumerate(rows):
            if not isinstance(label, int) or not 0 <= label < len(CLASSES):
                raise DataError(f"{file}, row {number}: the label must be 0 to 9, got {label}")
            contents.append(Encoded(image, f"{file}, row {number}"))
            labels.append(label)
    return contents, torch.tensor(labels, dtype=torch.int64)


def _rows(file: Path) -> list[tuple[bytes, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["img", "label"], partitioning=None)
        images = table["img"].combine_chunks().field("bytes").to_pylist()  # pyright: ignore
        return list(zip(images, table["label"].to_pylist(), strict=True))
    except KeyError as error:
        raise DataError(f"{file}: needs the columns img {{bytes, path}} and label ({error})") from error
    except (OSError, pa.ArrowException, AttributeError) as error:
        raise DataError(f"{file}: cannot be read as CIFAR-10's Parquet: {error}") from error


def _decode(images: Sequence[Encoded]) -> tuple[Tensor, bool]:
    """uint8 ``(N, 3, 32, 32)``, and whether any of them is a JPEG."""
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
    is_jpeg = any(image.content.startswith(JPEG) for image in images)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), is_jpeg


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
            if not (root / FOLDER).is_dir():  # another training may have been faster
                os.rename(Path(temporary) / FOLDER, root / FOLDER)
    except (OSError, RuntimeError) as error:
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
