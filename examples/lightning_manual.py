"""Lightning with manual optimization: the loop of the README inside ``training_step``."""

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac2 import KFAC


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()  # Lightning's wrapper, whose step counts and reports
        optimizer.zero_grad()
        output = self.model(x)
        optimizer.optimizer.update_curvature(output)  # K-FAC's own call is on the optimizer inside
        loss = F.cross_entropy(output, y)
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())

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
