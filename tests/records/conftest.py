from tests.figures.conftest import write_record, write_resnet  # noqa: F401
