"""Which optimizers the paper compares. What each is trained with is in ``configs/experiment/``."""

OPTIMIZERS = ("sgd", "adam", "kfac", "two_level_kfac")
