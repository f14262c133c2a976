"""Objects at an address, read and written through fsspec, with one message for what fails."""

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from uuid import uuid4

from pydantic import ValidationError

from moma.errors import StorageError, UserError, shorten
from moma.files import MAX_BYTES, UNFINISHED, Checksum, add_path_to_errors, sync_file, sync_folder
from moma.recipe import Config

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CHUNK_BYTES = 2**22
# Small objects that are requested at the same time.
_OBJECTS_PER_REQUEST = 512
# Extras of moma that install what an address needs.
_EXTRAS = {"s3": "pip install 'moma[s3]'"}
# Of S3, by name: botocore need not be installed.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")

AnyConfig = TypeVar("AnyConfig", bound=Config)


@lru_cache(maxsize=16)
def open_storage(address: str) -> "Storage":
    """Return the storage at an address; nothing is requested yet.

    Raises:
        UserError: the package for such addresses is not installed, or there is no such scheme.
    """
    import fsspec  # not needed without an address

    scheme = address.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        remedy = _EXTRAS.get(scheme, f"install the package for {scheme}:// ({error})")
        raise UserError(f"{address}: a package is missing; {remedy}") from error
    except ValueError as error:
        raise UserError(
            f"{address}: unknown scheme '{scheme}'; use s3://bucket/folder or another one of fsspec"
        ) from error
    except TypeError as error:
        raise UserError(
            f"{address}: such a file system needs more than an address ({error}); use "
            "s3://bucket/folder, file:///folder, or another one of fsspec"
        ) from error
    except Exception as error:  # of any library: some connect at once
        raise _describe(address, error) from error
    return Storage(address, system, root)


class Storage:
    """Objects below an address, by name, such as `shards/captions/plan.json`."""

    def __init__(self, address: str, system: "AbstractFileSystem", root: str) -> None:
        self.address, self._system, self._root = address, system, root.rstrip("/")
        self._is_local = "file" in (system.protocol, *system.protocol)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of the objects below a folder, by name."""
        with self._errors(folder):
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        root = len(self._path(""))
        return {path[root:]: int(info["size"] or 0) for path, info in found.items()}

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder."""
        with self._errors(folder):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        paths = (entry["name"] for entry in found if entry["type"] == "directory")
        return sorted(PurePosixPath(path).name for path in paths)

    def read(self, name: str) -> bytes | None:
        """Return a small object; None if there is none."""
        with self._errors(name):
            try:
                content: bytes = self._system.cat_file(self._path(name), start=0, end=MAX_BYTES + 1)
            except FileNotFoundError:
                return None
        if len(content) > MAX_BYTES:
            raise UserError(f"{self._at(name)}: larger than {MAX_BYTES >> 20} MiB; remove it")
        return content

    def read_config(self, schema: type[AnyConfig], name: str) -> AnyConfig | None:
        """Return an object that is JSON; None if there is none.

        Raises:
            UserError: it is something else; the message names the key.
        """
        content = self.read(name)
        return None if content is None else self.parse(schema, name, content)

    def parse(self, schema: type[AnyConfig], name: str, content: bytes) -> AnyConfig:
        """Return the content of an object that is JSON; errors are as in `read_config`."""
        try:
            return schema.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            reason = f"'{shorten(key, 200)}': {first['msg']}" if key else first["msg"]
            raise UserError(
                f"{self._at(name)}: damaged, or of another version ({reason}); remove it, and run "
                "`moma prepare` again"
            ) from error

    def read_all(self, names: Sequence[str], missing_ok: bool = False) -> dict[str, bytes]:
        """Return small objects, of which many are requested at the same time.

        Args:
            missing_ok: whether objects that do not exist are left out; else they are an error.
        """
        found: dict[str, bytes] = {}
        for first in range(0, len(names), _OBJECTS_PER_REQUEST):
            some = names[first : first + _OBJECTS_PER_REQUEST]
            paths = [self._path(name) for name in some]
            with self._errors(some[0]):
                contents = self._system.cat(paths, on_error="return")
            for name in some:
                content = contents[self._path(name)]
                if missing_ok and isinstance(content, FileNotFoundError):
                    continue
                with self._errors(name):
                    if isinstance(content, BaseException):
                        raise content
                found[name] = content
        return found

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object unless there is one; return whether there was none."""
        if self.size(name) is not None:
            return False
        with self._errors(name):
            try:
                if self._is_local:
                    _write_file(Path(self._path(name)), BytesIO(content), os.link)
                else:
                    self._system.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, in place of an older one: a reader finds one of both."""
        with self._errors(name):
            if self._is_local:
                _write_file(Path(self._path(name)), BytesIO(content), os.replace)
            else:
                self._system.pipe_file(self._path(name), content)

    def upload(self, source: Path, name: str) -> None:
        """Write a file, unless there is an object of this name and size.

        Names are those of the content, so that it is the same object.
        """
        size = source.stat().st_size
        if self.size(name) == size:
            return
        with self._errors(name):
            if self._is_local:
                with source.open("rb") as file:
                    _write_file(Path(self._path(name)), file, os.replace)
            else:
                self._system.put_file(str(source), self._path(name))
        if (found := self.size(name)) != size:
            raise StorageError(
                f"{self._at(name)}: has {found} bytes after {size} were written; run the same "
                "command to upload it again"
            )

    def download(self, name: str, expected: Checksum, file: BinaryIO) -> None:
        """Write an object into a file.

        Raises:
            UserError: it has another size or checksum.
        """
        size, digest = 0, hashlib.sha256()
        for chunk in self._chunks(name):
            with add_path_to_errors(Path(file.name)):
                file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if size > expected[0]:
                break
        found = size, digest.hexdigest()
        if found != tuple(expected):
            raise UserError(
                f"{self._at(name)}: damaged: it has {size} bytes and the SHA-256 {found[1][:16]}…, "
                f"not {expected[0]} and {expected[1][:16]}…; run `moma prepare --verify`, which "
                "makes it again"
            )

    def is_intact(self, name: str, expected: Checksum) -> bool:
        """Return whether an object exists and has this size and checksum."""
        if self.size(name) != expected[0]:
            return False
        digest = hashlib.sha256()
        for chunk in self._chunks(name):
            digest.update(chunk)
        return digest.hexdigest() == expected[1]

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, if another machine has not."""
        for name in names:
            with self._errors(name), suppress(FileNotFoundError):
                self._system.rm_file(self._path(name))

    def require(self, sizes: Mapping[str, int], folders: Sequence[str]) -> None:
        """Raise `StorageError` unless objects exist in these folders with their sizes."""
        found: dict[str, int] = {}
        for folder in folders:
            found |= self.sizes(folder)
        wrong = next((name for name, size in sizes.items() if found.get(name) != size), None)
        if wrong is not None:
            raise StorageError(
                f"{self._at(wrong)}: missing, or not of {sizes[wrong]} bytes ({found.get(wrong)}); "
                "run `moma prepare --verify`, which makes it again"
            )

    def size(self, name: str) -> int | None:
        """Return the bytes of an object; None if it does not exist."""
        with self._errors(name):
            self._system.invalidate_cache()
            try:
                return int(self._system.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._errors(name):
            file = self._system.open(self._path(name), "rb", block_size=_CHUNK_BYTES)
        with file:
            while True:
                with self._errors(name):
                    chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _at(self, name: str) -> str:
        return f"{self.address}/{name}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Describe what a request raises: which object, and what to do."""
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(
                f"{self._at(name)}: not found; check data.remote, and create the bucket if there "
                "is none; if others are there, `moma prepare --verify` makes this one again"
            ) from error
        except Exception as error:  # of any library
            raise _describe(self._at(name), error) from error


def _describe(place: str, error: Exception) -> UserError:
    # Without credentials: user and password, or the signature of an address.
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))
    text = re.sub(r"(://[^\s?]*)\?\S*", r"\1", text)
    reason = shorten(text or type(error).__name__, 300)
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return UserError(
            f"{place}: no permission ({reason}); give credentials in the environment or in the "
            "storage library's own configuration, or choose another data.remote"
        )
    if isinstance(error, asyncio.TimeoutError):
        reason = "no answer in time"
    return StorageError(
        f"{place}: cannot be read or written ({reason}); check the network and the endpoint, then "
        "run the same command to resume"
    )


def _write_file(path: Path, content: BinaryIO, place: Callable[[Path, Path], object]) -> None:
    """Write a file under a name of its own, which no other writer of `path` touches, and place it.

    Args:
        place: gives a file that exists another name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{uuid4().hex}{UNFINISHED}")
    try:
        with own.open("xb") as file:
            copyfileobj(content, file, _CHUNK_BYTES)
            sync_file(file)
        place(own, path)
        sync_folder(path.parent)
    finally:
        own.unlink(missing_ok=True)
