"""Lightning with automatic optimization: one line more in ``training_step``.

Lightning calls ``training_step`` from inside ``optimizer.step``, as a closure, which K-FAC's ``step`` evaluates first.
"""

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac2 import KFAC


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        output = self.model(x)
        self.optimizers().optimizer.update_curvature(output)  # the optimizer itself, not Lightning's wrapper
        loss = F.cross_entropy(output, y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> KFAC:
        return KFAC(self.model, lr=0.1)


def main() -> list[float]:
    """Train on three linearly separable classes; returns the loss of each step."""
    lightning.seed_everything(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(classifier, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    return classifier.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
