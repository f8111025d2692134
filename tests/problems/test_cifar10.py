"""CIFAR-10 from each of its sources, and what is said of files that are not it."""

import threading
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.datasets import CIFAR10

from experiments.problems import Cifar10, Cifar10NotFound, DataError
from scripts import get_cifar10
from tests.problems.cifar_files import (
    TEST,
    TRAIN,
    classes,
    encoded,
    pixels,
    write_file,
    write_parquet,
    write_torchvision,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.delenv("KFAC2_CIFAR10", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def as_images(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def test_parquet_is_read_in_file_order(tmp_path: Path) -> None:
    images, labels = pixels(TRAIN), classes(TRAIN)
    half = TRAIN // 2
    for part, chosen in (("00001", slice(half, TRAIN)), ("00000", slice(half))):
        file = tmp_path / "plain_text" / f"train-{part}-of-00002.parquet"
        write_file(file, encoded(images[chosen]), labels[chosen])
    write_file(tmp_path / "plain_text" / "test-0.parquet", encoded(pixels(TEST, 1)), classes(TEST))
    train, test = Cifar10(str(tmp_path)).load()
    assert train.images.dtype == torch.uint8
    assert torch.equal(train.images, as_images(images))
    assert train.labels.tolist() == labels
    assert torch.equal(test.images, as_images(pixels(TEST, 1)))
    assert not train.is_jpeg
    assert not test.is_jpeg


def test_a_subset_is_the_beginning_of_one_shuffle(tmp_path: Path) -> None:
    source = Cifar10(str(write_parquet(tmp_path)))
    (whole, _), (small, test), (smaller, _) = source.load(), source.load(30, 10), source.load(12, 10)
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(small.images, whole.images[order[:30]])
    assert torch.equal(small.labels, whole.labels[order[:30]])
    assert torch.equal(smaller.images, small.images[:12])
    assert len(test.labels) == 10


def test_a_jpeg_copy_is_recognised(tmp_path: Path) -> None:
    train, test = Cifar10(str(write_parquet(tmp_path, "JPEG"))).load(10, 10)
    assert train.is_jpeg
    assert test.is_jpeg


def test_only_the_images_in_use_are_decoded(tmp_path: Path) -> None:
    contents = encoded(pixels(TRAIN))
    unused = int(torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))[-1])
    contents[unused] = b"no image"
    write_parquet(tmp_path)
    write_file(tmp_path / "train-00000-of-00001.parquet", contents, classes(TRAIN))
    Cifar10(str(tmp_path)).load(TRAIN - 1, TEST)
    with pytest.raises(DataError, match=rf"train-00000-of-00001.parquet, row {unused}: the image cannot be"):
        Cifar10(str(tmp_path)).load()


def test_the_variable_stands_in_for_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = write_parquet(tmp_path / "given"), write_parquet(tmp_path / "other", train=50)
    monkeypatch.setenv("KFAC2_CIFAR10", str(given))
    assert len(Cifar10().load()[0].labels) == TRAIN
    assert len(Cifar10(path=str(other)).load()[0].labels) == 50


def test_a_wrong_path_is_no_reason_to_look_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_torchvision(tmp_path / "data", monkeypatch)
    with pytest.raises(Cifar10NotFound, match=r"nowhere: no train\*\.parquet there.*KFAC2_CIFAR10"):
        Cifar10(str(tmp_path / "nowhere"), str(root)).load()


def test_torchvision_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_torchvision(tmp_path, monkeypatch)
    train, test = Cifar10(root=str(root)).load()
    assert torch.equal(train.images, as_images(pixels(TRAIN)))
    assert train.labels.tolist() == classes(TRAIN)
    assert torch.equal(test.images, as_images(pixels(TEST, 1)))
    (root / CIFAR10.base_folder / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(DataError, match="cifar-10-batches-py: is incomplete or damaged"):
        Cifar10(root=str(root)).load()


def test_a_download_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_torchvision(tmp_path / "original", monkeypatch) / CIFAR10.base_folder
    monkeypatch.setattr("experiments.problems.cifar10._connect", lambda url: None)

    def cut_off(self: CIFAR10) -> None:
        (Path(self.root) / CIFAR10.base_folder).mkdir()
        raise RuntimeError("connection lost")

    monkeypatch.setattr(CIFAR10, "download", cut_off)
    root = tmp_path / "data"
    with pytest.raises(Cifar10NotFound, match="connection lost"):
        Cifar10(root=str(root)).load()
    assert not list(root.iterdir())

    def succeed(self: CIFAR10) -> None:
        (Path(self.root) / CIFAR10.base_folder).symlink_to(original)

    monkeypatch.setattr(CIFAR10, "download", succeed)
    assert len(Cifar10(root=str(root)).load()[0].labels) == TRAIN
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]


def test_no_source_names_all_three(tmp_path: Path) -> None:
    with pytest.raises(Cifar10NotFound) as caught:
        Cifar10(root=str(tmp_path)).load()
    for way in ("KFAC2_CIFAR10", "problem.data.path", "problem.data.root", "network", "no network in tests"):
        assert way in str(caught.value)


def test_a_network_that_swallows_packets_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> None:
        over.wait(30)

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    monkeypatch.setattr("experiments.problems.cifar10.SECONDS_TO_CONNECT", 0.1)
    with pytest.raises(Cifar10NotFound, match=r"did not answer in 0\.1 s"):
        Cifar10(root=str(tmp_path)).load()
    over.set()


@pytest.mark.parametrize(
    ("content", "label", "message"),
    [
        (b"\x89PNG cut", 3, "row 4: the image cannot be decoded"),
        (encoded(pixels(1))[0][:900], 3, "row 4: the image cannot be decoded"),
        (encoded(pixels(1), "JPEG")[0][:900], 3, "row 4: the image cannot be decoded"),
        (None, 3, "row 4: the image cannot be decoded"),
        (encoded(pixels(1, size=(32, 28)))[0], 3, "row 4: the image is 28×32, not 32×32"),
        (encoded(pixels(1))[0], 10, "row 4: the label must be 0 to 9, got 10"),
        (encoded(pixels(1))[0], -1, "row 4: the label must be 0 to 9, got -1"),
        (encoded(pixels(1))[0], None, "row 4: the label must be 0 to 9, got None"),
    ],
    ids=["no-png", "short-png", "short-jpeg", "none", "size", "ten", "negative", "no-label"],
)
def test_a_bad_row_is_named(tmp_path: Path, content: bytes | None, label: int | None, message: str) -> None:
    write_parquet(tmp_path)
    contents: list[bytes | None] = [*encoded(pixels(TRAIN))]
    labels: list[int | None] = [*classes(TRAIN)]
    contents[4], labels[4] = content, label
    file = write_file(tmp_path / "train-00000-of-00001.parquet", contents, labels)
    with pytest.raises(DataError, match=f"{file}, {message}"):
        Cifar10(str(tmp_path)).load()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path) / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{file}: cannot be read as Parquet"):
            Cifar10(str(tmp_path)).load()


@pytest.mark.parametrize(
    "table",
    [
        {"img": [{"bytes": b"", "path": ""}], "fine_label": [3]},
        {"image": [b""], "label": [3]},
        {"img": [b""], "label": [3]},
        {"img": [{"path": ""}], "label": [3]},
    ],
    ids=["cifar100", "other-name", "no-struct", "no-bytes"],
)
def test_another_layout_is_refused(tmp_path: Path, table: dict) -> None:
    file = write_parquet(tmp_path) / "train-00000-of-00001.parquet"
    pq.write_table(pa.table(table), file)
    with pytest.raises(DataError, match=rf"{file}: cannot be read as Parquet with the columns img \{{bytes"):
        Cifar10(str(tmp_path)).load()


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path) / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(DataError, match=f"{file}: has no rows"):
        Cifar10(str(tmp_path)).load()


def test_too_few_classes_or_images_are_refused(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path)
    with pytest.raises(DataError, match=f"train split of {folder}: 5,000 images are asked for, it has 60"):
        Cifar10(str(folder)).load(5000, 10)
    write_file(folder / "train-00000-of-00001.parquet", encoded(pixels(TRAIN)), [0, 1] * (TRAIN // 2))
    with pytest.raises(DataError, match=f"{folder}: 2 classes in the training split, CIFAR-10 has 10"):
        Cifar10(str(folder)).load(10, 10)


def test_the_script_says_where_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFAC2_CIFAR10", str(write_parquet(tmp_path, "JPEG")))
    get_cifar10.main()
    assert capsys.readouterr().out == f"CIFAR-10 (JPEG copy) from {tmp_path}\n"
    monkeypatch.delenv("KFAC2_CIFAR10")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as absent:
        get_cifar10.main()
    assert absent.value.code == get_cifar10.ABSENT
    assert "no CIFAR-10 here" in capsys.readouterr().err
    monkeypatch.setenv("KFAC2_CIFAR10", str(tmp_path / "mistyped"))
    with pytest.raises(SystemExit) as wrong:
        get_cifar10.main()
    assert wrong.value.code == 1
