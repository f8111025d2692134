"""CIFAR ResNets as He et al. describe them, and the problem made of one."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.problems import Cifar10, CifarResNet, DataError, cifar_resnet
from experiments.problems.augmentation import crop_and_flip, draw_crops, normalise
from experiments.problems.resnet import BasicBlock
from tests.problems.cifar_files import TEST, TRAIN, write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(autouse=True)
def small_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete one, in the eyes of the problem."""
    monkeypatch.setattr("experiments.problems.cifar_problem.IMAGES", {"train": TRAIN, "test": TEST})


def problem(folder: Path, seed: int = 0, **options) -> CifarResNet:
    return CifarResNet([seed], depth=8, data=Cifar10(str(folder)), **options)


@pytest.mark.parametrize(("depth", "parameters"), [(110, 1_730_714), (20, 272_474)])
def test_size_and_shape(depth: int, parameters: int) -> None:
    model = cifar_resnet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(layers) - len(shortcuts) == depth
    assert [(m.in_channels, m.out_channels, m.stride) for m in shortcuts] == [
        (16, 32, (2, 2)),
        (32, 64, (2, 2)),
    ]
    assert all(m.bias is None for m in layers if isinstance(m, nn.Conv2d))
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock)]
    sizes: list[torch.Size] = []
    hooks = [b.register_forward_hook(lambda _, __, output: sizes.append(output.shape)) for b in blocks]
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert len(hooks) == (depth - 2) // 2
    per_stage = len(blocks) // 3
    assert sizes == [(2, c, s, s) for c, s in ((16, 32), (32, 16), (64, 8)) for _ in range(per_stage)]


@pytest.mark.parametrize("depth", [2, 18, 21, 111])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .*got {depth}"):
        cifar_resnet(depth)


def test_a_block_adds_its_shortcut() -> None:
    def norm(x: Tensor, module: nn.BatchNorm2d) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        normalised = (x - mean) / (var + module.eps).sqrt()
        return normalised * module.weight[:, None, None] + module.bias[:, None, None]

    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6)
    for channels, stride in ((4, 1), (8, 2)):
        block = BasicBlock(4, channels, stride)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        y = norm(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.norm1).relu()
        y = norm(F.conv2d(y, block.conv2.weight, padding=1), block.norm2)
        shortcut = x
        if isinstance(block.shortcut, nn.Sequential):
            conv, batch_norm = block.shortcut
            assert isinstance(batch_norm, nn.BatchNorm2d)
            shortcut = norm(F.conv2d(x, conv.get_parameter("weight"), stride=2), batch_norm)
        torch.testing.assert_close(block(x), (y + shortcut).relu(), rtol=1e-4, atol=1e-5)


def test_initialisation() -> None:
    model = cifar_resnet(110, torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            spread = module.weight.std().item() * math.sqrt(fan_out / 2)
            assert spread == pytest.approx(1, abs=5 / math.sqrt(2 * module.weight.numel()))
            assert module.weight.abs().max() > 2 * module.weight.std()  # normal, not uniform
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for values in (model.linear.weight, model.linear.bias):
        assert values.abs().max() <= 1 / 8
    assert model.linear.weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.06)
    assert model.linear.bias.std() > 0


def test_a_seed_decides_everything(folder: Path) -> None:
    torch.manual_seed(1)
    first = problem(folder)
    torch.manual_seed(2)
    second, other = problem(folder), problem(folder, seed=1)
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.model.conv.weight, other.model.conv.weight)
    torch.rand(5, generator=first.label_generators[0])  # an optimizer that draws labels
    torch.rand(5)
    for _ in range(2):
        for (x, i), (y, j) in zip(first.train_batches(16), second.train_batches(16), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(i, j)
    ours, theirs = next(first.train_batches(16)), next(other.train_batches(16))
    assert not torch.equal(ours[0], theirs[0])


def test_label_draws_differ_between_seeds_and_from_the_batches(folder: Path) -> None:
    draws = [
        torch.rand(4, generator=problem(folder, seed).label_generators[0]).tolist() for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist() != draws[0]


def test_batches_are_the_augmented_images_in_a_new_order(folder: Path) -> None:
    p = problem(folder)
    twin = torch.Generator()
    twin.set_state(p.state_dict()["generators"][0])
    orders = []
    for _ in range(2):
        batches = list(p.train_batches(25))
        assert [len(targets) for _, targets in batches] == [25, 25, 10]
        orders.append(torch.randperm(TRAIN, generator=twin))
        for (images, targets), indices in zip(batches, orders[-1].split(25), strict=True):
            assert torch.equal(
                images, normalise(crop_and_flip(p.train_images[indices], draw_crops(len(indices), twin)))
            )
            assert torch.equal(targets, p.train_targets[indices])
    assert not torch.equal(*orders)


def test_test_batches_are_not_augmented(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.problems.cifar_problem.EVALUATION_BATCH", 8)
    p = problem(folder)
    images, targets = (torch.cat(parts) for parts in zip(*p.test_batches(), strict=True))
    assert torch.equal(images, normalise(p.test_images))
    assert torch.equal(targets, p.test_targets)
    assert len(targets) == TEST


def test_losses_and_accuracies(folder: Path) -> None:
    p = problem(folder)
    output = torch.zeros(4, 10, dtype=torch.bfloat16)
    output[torch.arange(4), torch.tensor([1, 2, 3, 4])] = 2
    targets = torch.tensor([1, 2, 3, 9])
    loss, accuracy = p.losses(output, targets), p.accuracies(output, targets)
    expected = math.log(9 + math.exp(2)) - 1.5
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([expected])
    assert accuracy.tolist() == [0.75]
    output[0, 0] = torch.nan
    assert p.accuracies(output, targets).isnan().tolist() == [True]


def test_all_images_means_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"train split are 50,000 images, but there are 60.*train_samples"):
        problem(folder)
    with pytest.raises(DataError, match=r"test split are 10,000 images.*test_samples"):
        problem(folder, train_samples=TRAIN)
    problem(folder, train_samples=TRAIN, test_samples=TEST)


def test_label_says_scale_and_copy(folder: Path, tmp_path: Path) -> None:
    assert problem(folder).label is None
    assert problem(folder, label="reduced").label == "reduced"
    jpeg = write_parquet(tmp_path, "JPEG")
    assert problem(jpeg).label == "CIFAR-10 (JPEG copy)"
    assert problem(jpeg, label="reduced").label == "reduced; CIFAR-10 (JPEG copy)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0, 1]}, r"one seed at a time, got seeds=\[0, 1\]: make one problem per seed"),
        ({"seeds": []}, "one seed at a time"),
        ({"train_samples": 0}, "train_samples must be positive"),
        ({"test_samples": -1}, "test_samples must be positive"),
        ({"depth": 9}, r"6n \+ 2"),
    ],
    ids=["seeds", "no-seed", "train", "test", "depth"],
)
def test_bad_options_are_refused_without_data(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarResNet(**options, data=Cifar10("/nowhere"))
