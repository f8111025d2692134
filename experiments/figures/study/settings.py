"""Which settings the study's arms have, as columns of ``load_trainings``."""

TEN, FIVE = "0-1-2-3-4-5-6-7-8-9", "0-1-2-3-4"
PAPER = {
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "damping": 1e-2,
    "kl_clip": 1e-3,
    "inverse": "eigen",
    "factor_interval": 10,
    "inverse_interval": 100,
    "depth": 64,
    "width": 10,
    "batch_norm": True,
    "activation": "identity",
    "train_samples": 25000,
    "epochs": 100,
    "batch_size": 512,
    "seeds": TEN,
}
ONE = {"optimizer": "kfac"}
TWO = {"optimizer": "two_level_kfac", "coarse_weight": 1.0}
VARIANT = {"optimizer": "two_level_variant", "coarse_weight": 1.0}
# The grid's winner for one level; that for two levels has no momentum.
BEST_ONE = PAPER | {"lr": 1e-2, "damping": 1e-3, "kl_clip": 1e-2}

ONE_LEVEL, FULL = "one level", "full"
CONTROLS = {
    FULL: "full",
    "exact": "exact",
    "diagonal": "diagonal",
    "λI only": "damping_only",
    "identity, same length": "identity",
    "diagonal, same length": "diagonal_matched",
    "permuted, same length": "permuted",
}
BASES = {
    FULL: "full",
    "signs, draw 1": "signs",
    "signs, draw 2": "signs_2",
    "signs, draw 3": "signs_3",
    "Gaussian, draw 1": "gaussian",
    "Gaussian, draw 2": "gaussian_2",
    "Gaussian, draw 3": "gaussian_3",
}
TIMES = {
    FULL: "full",
    "first step only": "first_step",
    "epoch 1 only": "first_epoch",
    "after epoch 5 only": "after_epoch_5",
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LAMBDAS = {  # and the learning rates tried with each
    1e-5: (3e-4, 1e-3, 3e-3, 1e-2),
    1e-4: (3e-4, 1e-3, 3e-3, 1e-2),
    1e-3: (1e-3,),
    1e-2: (1e-3,),
}
WEAK_LAMBDA = 1e-5  # with which one level is compared at every depth
WEIGHTS = (0.25, 0.5, 1.0)
DAMPINGS = {"λI": "full", "λ diag(n)": "consistent"}
NETS = {
    "batch norm, linear": {"batch_norm": True, "activation": "identity"},
    "batch norm, ReLU": {"batch_norm": True, "activation": "relu"},
    "plain, linear": {"batch_norm": False, "activation": "identity"},
    "plain, ReLU": {"batch_norm": False, "activation": "relu"},
}
DEPTHS = {True: (8, 16, 32, 64, 128), False: (2, 4, 8, 16)}
MEASURED = {"one level": "deep_linear_mlp/kfac/paper", "two levels": "deep_linear_mlp/two_level_kfac/paper"}
CONVOLUTIONS = "resnet20_cifar10_preview/two_level_variant/coarse=observed,epochs=12"
