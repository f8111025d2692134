"""Entry points; the only modules that import Hydra."""
