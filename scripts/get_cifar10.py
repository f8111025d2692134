"""Whether CIFAR-10 can be had here, downloading it if need be; exit status 1 and the reason if not.

python scripts/get_cifar10.py
"""

import sys

from kfac2.problems import Cifar10, DataError
from kfac2.problems.cifar10 import FOLDER, JPEG_COPY


def main() -> None:
    source = Cifar10()
    try:
        splits = source.load(1, 1)
    except DataError as error:
        sys.exit(str(error))
    name = JPEG_COPY if any(split.is_jpeg for split in splits) else "CIFAR-10"
    print(f"{name} from {source.parquet_folder or f'{source.root}/{FOLDER}'}")


if __name__ == "__main__":
    main()
