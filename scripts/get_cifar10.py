"""Whether CIFAR-10 can be had here, downloading it if need be; the exit status is 3 if there is none.

Data that was named and is not there, or that is damaged, is an error (1) rather than absence.
"""

import sys

from experiments.problems import Cifar10, DataError
from experiments.problems.cifar10 import FOLDER, JPEG_COPY, Cifar10NotFound

ABSENT = 3


def main() -> None:
    source = Cifar10()
    try:
        splits = source.load(1, 1)
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(ABSENT if isinstance(error, Cifar10NotFound) and source.parquet_folder is None else 1)
    name = JPEG_COPY if any(split.is_jpeg for split in splits) else "CIFAR-10"
    print(f"{name} from {source.parquet_folder or f'{source.root}/{FOLDER}'}")


if __name__ == "__main__":
    main()
