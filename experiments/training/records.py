"""What of a run's record needs torch: its checkpoint, and where its numbers were computed.

The checkpoint is the one commit point: it carries the rows so far, and the curves are rewritten from it,
so a kill at any moment loses at most the epoch under way.
"""

import io
from typing import Any

import torch

from experiments.records import RecordDirectory, RecordError
from experiments.records.files import MAKE_AGAIN, write_atomically
from experiments.training import processes


class RunDirectory(RecordDirectory):
    """The files of one run: ``curves.csv``, ``provenance.json`` and, while it runs, ``checkpoint.pt``."""

    def origin(self, device: str) -> dict[str, Any]:
        own = {"torch_version": torch.__version__, "device": device, "threads": torch.get_num_threads()}
        return own if processes.number() == 1 else own | {"processes": processes.number()}

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.save(state, content)
        write_atomically(self.checkpoint, lambda path: path.write_bytes(content.getbuffer()))

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """Raises ``RecordError`` if it is damaged."""
        if not self.checkpoint.exists():
            return None
        try:
            # Only this project's runs write here, and optimizer states hold more than plain weights.
            return torch.load(self.checkpoint, map_location=device, weights_only=False)
        except Exception as error:  # of whatever kind: pickle runs what the damaged bytes say
            reason = str(error).partition("\n")[0]
            raise RecordError(f"{self.checkpoint} is damaged ({reason}); {MAKE_AGAIN}") from error
