"""A folder somewhere that fsspec reaches: objects in it are written whole, read in ranges, listed and removed.

An object that is put is there whole or not at all: object stores see to that, and on a local disk it is written under another name
first. Elsewhere (sftp, smb) one that is cut off is found by its length.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirtylog.checkpoint.folder import write_synced
from dirtylog.errors import AccessDeniedError, DirtyLogError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}
"""Where a folder is but the beginning of a name. To make one may make a bucket, which nobody asked for."""
PARTIAL = ".partial"


class Location:
    """A folder at a URL. Names are relative to it."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        try:
            import fsspec  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise UnsupportedError("remote copies need fsspec", remedy="install it: pip install 'dirtylog[store]'") from error
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **(storage_options or {}))
        except ImportError as error:
            raise UnsupportedError(
                f"{url!r} cannot be reached: what fsspec needs for it is not installed",
                reason=str(error),
                remedy="for s3:// that is: pip install s3fs",
            ) from error
        except Exception as error:  # each file system has errors of its own
            raise InvalidArgumentError(f"{url!r} names no place that can be used", reason=_reason(error)) from error
        protocol = self._files.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_local = "file" in protocols
        self._makes_folders = not protocols & _WITHOUT_FOLDERS

    def put(self, name: str, data: bytes) -> None:
        """Write an object, over one of the same name."""
        path = self._path(name)
        with self._errors(name, "written"):
            if self._makes_folders:
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if self._is_local:
                local = Path(path)
                write_synced(local, data, local.with_name(f"{local.name}.{os.getpid()}{PARTIAL}"))
            else:
                self._files.pipe_file(path, data)

    def get(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """Return what an object holds, all or a range of it; FileNotFoundError if there is none."""
        with self._errors(name, "read"):
            return bytes(self._files.cat_file(self._path(name), start=begin, end=end))

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the objects in a folder, by name, and their lengths."""
        with self._errors(folder, "listed"):
            # What is remembered may be of before others wrote.
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            return {f"{folder}/{path.rpartition('/')[2]}": int(info["size"]) for path, info in found.items()}

    def remove(self, names: list[str]) -> None:
        """Remove objects."""
        with self._errors("objects", "removed"):
            for name in names:
                self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{str(self._root).rstrip('/')}/{name}"

    @contextmanager
    def _errors(self, name: str, done: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if done == "read":
                raise
            raise DirtyLogError(f"{name} at {self.url!r} cannot be {done}", errno=error.errno, reason=_reason(error)) from error
        except Exception as error:  # each file system has errors of its own
            what = f"{name} at {self.url!r} cannot be {done}"
            if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
                raise AccessDeniedError(
                    what, reason=_reason(error), remedy="give credentials that may do that, as fsspec's file system takes them"
                ) from error
            raise DirtyLogError(what, errno=getattr(error, "errno", None), reason=_reason(error)) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
