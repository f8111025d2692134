"""The Trainer of transformers: ``compute_loss`` passes the logits on, in training only."""

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from kfac2 import KFAC


class KFACTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **options: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            self.optimizer.optimizer.update_curvature(outputs.logits)  # inside Accelerate's wrapper
        return (loss, outputs) if return_outputs else loss


def main() -> list[float]:
    """Tell which of two words a sequence has at its start; returns the loss of each step."""
    torch.manual_seed(0)
    words = torch.randint(2, 32, (256, 8))
    words[:, 0] = words[:, 0] % 2
    data = [{"input_ids": row, "labels": row[0]} for row in words]
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            num_train_epochs=3,
            per_device_train_batch_size=32,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = KFACTrainer(model, arguments, train_dataset=data, optimizers=(KFAC(model, lr=0.03), None))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
