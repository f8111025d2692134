"""Tiny files in the layouts that CIFAR-10 comes in."""

import hashlib
import pickle
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torchvision.datasets import CIFAR10

TRAIN, TEST = 60, 20


def pixels(samples: int, seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """uint8 ``(samples, height, width, 3)``"""
    return np.random.default_rng(seed).integers(0, 256, (samples, *size, 3), dtype=np.uint8)


def classes(samples: int) -> list[int]:
    return [7 * i % 10 for i in range(samples)]


def encoded(images: np.ndarray, form: str = "PNG") -> list[bytes]:
    contents = []
    for image in images:
        file = BytesIO()
        Image.fromarray(image).save(file, form)
        contents.append(file.getvalue())
    return contents


def write_file(path: Path, contents: Sequence[bytes | None], labels: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)])
    pq.write_table(pa.table({"img": images, "label": pa.array(labels)}), path)
    return path


def write_parquet(folder: Path, form: str = "PNG", train: int = TRAIN, test: int = TEST) -> Path:
    """``train`` images of seed 0 and ``test`` images of seed 1."""
    for name, samples, seed in (("train", train, 0), ("test", test, 1)):
        file = folder / f"{name}-00000-of-00001.parquet"
        write_file(file, encoded(pixels(samples, seed), form), classes(samples))
    return folder


def write_torchvision(folder: Path, monkeypatch: Any) -> Path:
    """The same images as ``cifar-10-batches-py``, whose checksums torchvision is made to expect."""
    batches = folder / CIFAR10.base_folder
    batches.mkdir(parents=True)
    parts = np.split(pixels(TRAIN), 5)
    targets = np.split(np.array(classes(TRAIN)), 5)
    train = [
        (f"data_batch_{i + 1}", {"data": rows(parts[i]), "labels": targets[i].tolist()}) for i in range(5)
    ]
    test = [("test_batch", {"data": rows(pixels(TEST, 1)), "labels": classes(TEST)})]
    meta = ("batches.meta", {"label_names": [str(i) for i in range(10)]})
    for name, content in (*train, *test, meta):
        (batches / name).write_bytes(pickle.dumps(content))
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in batches.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in train])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in test])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return folder


def rows(images: np.ndarray) -> np.ndarray:
    """``(N, 3072)``, channel by channel."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)
