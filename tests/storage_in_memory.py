"""Storage that ends with the process, for tests: `data.remote` refuses that of fsspec itself."""

from fsspec.implementations.memory import MemoryFileSystem


class StorageInMemory(MemoryFileSystem):
    """Objects at `ram://…`."""

    protocol = "ram"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("ram://"))
