"""An image of a disk that fails; worker processes import this module, so it imports little."""

from moma.errors import StorageError


def fail_to_read():
    raise StorageError("the disk fails")
