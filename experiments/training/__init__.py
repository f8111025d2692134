"""The one shared trainer, its checkpoints, run records and tracking."""
