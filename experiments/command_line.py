"""From the command line to Hydra's main: everything is checked first, and a user's error is one line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.overrides import check_overrides, composed, late_settings, members
from experiments.problems import DataError
from experiments.records import RecordInUseError
from experiments.training.processes import is_first
from experiments.training.progress import shown

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")
OTHER_WORK = ("help", "hydra_help", "cfg", "info", "shell_completion", "experimental_rerun")
OTHER_CONFIGS = ("config_path", "config_name", "config_dir")
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException, DataError, RecordInUseError)


def launch(main: Callable[[], None], check: Callable[[DictConfig], int]) -> None:
    """Run ``main``, a function of ``hydra.main``, with this process's arguments.

    Args:
        check: raises for a configuration that cannot be meant, and returns how many trainings it is. All members of
            a sweep pass it before the first is trained.

    Raises:
        SystemExit: with the message of a user's error; HYDRA_FULL_ERROR=1 shows where it comes from instead.
    """
    options, _ = get_args_parser().parse_known_args()
    if any(getattr(options, name) for name in OTHER_CONFIGS):
        return main()
    check_overrides(sys.argv[1:], CONFIGS)
    if any(getattr(options, name) for name in OTHER_WORK):
        return main()
    with user_errors(), initialize_config_dir(CONFIGS, version_base="1.3"):
        choices = members(options.overrides)[0] if options.multirun else [options.overrides]
        trainings = sum(map(check, composed(choices)))
        if options.multirun:
            sys.argv[1:] = ["--multirun", *late_settings(options.overrides)]
    with shown(trainings) if trainings and is_first() else nullcontext():
        main()


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's error inside ends the program with one line; a member of a sweep leaves that to Hydra."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        is_member = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
        raise (CompactHydraException if is_member else SystemExit)(one_line(error)) from None


def one_line(error: Exception) -> str:
    """The error's message without line breaks, and without what is of no use to who typed the command."""
    text, cause = str(error).partition("Config search path")[0], error.__cause__
    if isinstance(error, OmegaConfBaseException):
        text = f"{error.full_key}: {_first_line(error)}"
    elif isinstance(cause, OmegaConfBaseException):
        text = f"{_first_line(error)}: {_first_line(cause)}"
    elif isinstance(error, OSError):
        text = text.removeprefix(f"[Errno {error.errno}] ")
    return " ".join(text.split())


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
