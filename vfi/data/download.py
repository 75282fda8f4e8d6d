"""Download a file over an unreliable network, in several attempts, each of which resumes the previous one.

http(s) by the standard library, everything else by fsspec, whose file systems are packages of their own (s3fs, gcsfs, …).
"""

from __future__ import annotations

import http.client
import random
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Generator
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import fsspec

from shards.schema import ShardError
from vfi.credentials import HOW_TO_SIGN_IN, parse, password_from_netrc, redact, reveal

_PIECE = 1 << 20  # bytes
_PROGRESS = 1 << 20  # an attempt that brought this many bytes was no failure
_SLOWEST = 4096  # bytes a second; an attempt that is slower over `timeout` ends
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}


class StorageError(ShardError):
    """Raised when data can't be reached or stored; the message says where, why, and what to do. It never skips a sample."""


class MissingError(ShardError):
    """Raised for a file that does not exist."""


class Patience(NamedTuple):
    """Limits of retrying. Waits double, and are drawn between half and the whole, so that workers don't all retry at once."""

    attempts: int = 8
    """In a row that brought less than 1 MiB."""
    first_wait: float = 0.5
    longest_wait: float = 30.0
    timeout: float = 30.0
    """Seconds without a byte, after which an attempt ends."""


PATIENCE = Patience()


class _InterruptedError(Exception):
    """Raised when an attempt failed, but another one may succeed."""


def fetch(url: str, into: BinaryIO, size: int | None, limit: int, patience: Patience) -> None:
    """Append to `into` until it has `size` bytes; with None, replace it by the whole file, of at most `limit` bytes.

    Raises MissingError when there is no such file, StorageError when access is denied, it is too long, or all attempts failed.
    """
    failures = 0
    while size is None or into.tell() < size:
        if size is None:
            into.seek(0)
            into.truncate()
        start = into.tell()
        pieces = _pieces(url, start, size, patience.timeout)
        try:
            for piece in pieces:
                into.write(piece)
                if into.tell() > limit:
                    raise StorageError(f"{url} is longer than the {limit} bytes that it may have")
            if size is None:
                return
            if into.tell() < size:
                raise _InterruptedError(f"it ended after {into.tell()} of {size} bytes")
        except _InterruptedError as error:
            failures = 1 if into.tell() - start >= _PROGRESS else failures + 1
            if failures >= patience.attempts:
                raise StorageError(
                    f"{url} could not be fetched in {failures} attempts, the last of which failed: {error}. "
                    f"Check the network and the address, and start again (--resume auto resumes a run)"
                ) from error
            wait = min(patience.first_wait * 2 ** (failures - 1), patience.longest_wait)
            time.sleep(wait * random.uniform(0.5, 1))
        finally:
            pieces.close()


def _pieces(url: str, start: int, size: int | None, timeout: float) -> Generator[bytes]:
    """Yield the file's bytes from `start` on; _InterruptedError when they end too early or don't arrive."""
    return _from_http(url, start, timeout) if url.startswith(("http://", "https://")) else _from_fsspec(url, start, size)


def _from_http(url: str, start: int, timeout: float) -> Generator[bytes]:
    request = _request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    began, received = time.monotonic(), 0
    try:
        with urllib.request.build_opener(_Redirect).open(request, timeout=timeout) as response:
            whole = response.status != http.HTTPStatus.PARTIAL_CONTENT
            if not whole and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise _InterruptedError(f"it answered with another range than from {start}")
            skip = start if whole else 0  # a server that knows no ranges begins again
            length = response.headers.get("Content-Length")
            left = int(length) if length else None
            while left != 0 and (piece := response.read1(_PIECE)):
                received += len(piece)
                left = None if left is None else max(left - len(piece), 0)
                elapsed = time.monotonic() - began
                if elapsed > timeout and received < _SLOWEST * elapsed:
                    raise _InterruptedError(f"only {received} bytes came in {elapsed:.0f} s")
                yield piece[skip:]
                skip = max(skip - len(piece), 0)
            if left:
                raise _InterruptedError(f"the connection ended {left} bytes before the end")
    except urllib.error.HTTPError as error:
        answer = f"{url}: {error.code} {error.reason}"
        if error.code in (404, 410):
            raise MissingError(answer) from error
        if error.code == http.HTTPStatus.UNAUTHORIZED:
            raise StorageError(
                f"{answer}: the server refuses this user and password, or their absence; {HOW_TO_SIGN_IN}"
            ) from error
        if 400 <= error.code < 500 and error.code not in (408, 425, 429):
            raise StorageError(f"{answer}: the server refuses; check the address and the right to read it") from error
        raise _InterruptedError(f"{error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # a ValueError is a header that is not a number
        raise _InterruptedError(_reason(error)) from error


def _request(url: str) -> urllib.request.Request:
    """Return a request with the secrets of an address; its password is in a header that goes to no other host."""
    address = parse(reveal(url))
    request = urllib.request.Request(str(address._replace(user="", password="")))
    is_known = address.user or address.password
    sign_in = (unquote(address.user), unquote(address.password)) if is_known else None
    if not is_known and not address.query:
        sign_in = password_from_netrc(address)
    if sign_in:
        request.add_unredirected_header("Authorization", f"Basic {b64encode(':'.join(sign_in).encode()).decode()}")
    return request


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Keep the password on the way to another address of the same server, and to none else."""

    def redirect_request(self, req: urllib.request.Request, *arguments: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *arguments)
        if new and (new.type, new.host) == (req.type, req.host) and "Authorization" in req.unredirected_hdrs:
            new.add_unredirected_header("Authorization", req.unredirected_hdrs["Authorization"])
        return new


def _from_fsspec(url: str, start: int, size: int | None) -> Generator[bytes]:
    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(reveal(url))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"install {package}: pip install {package}" if package else _reason(error)
        raise StorageError(f"{url}: {protocol}:// needs a package that is not installed; {advice}") from error
    except ValueError as error:
        raise StorageError(
            f"{url}: {_reason(error)}; give a folder, http(s)://, s3://, gs:// or what else fsspec opens"
        ) from error
    try:
        end = system.size(path) if size is None else size
        for first in range(start, end, 8 * _PIECE):
            yield system.cat_file(path, start=first, end=min(first + 8 * _PIECE, end))
    except FileNotFoundError as error:
        raise MissingError(f"{url}: no such file") from error
    except PermissionError as error:
        raise StorageError(f"{url}: {_reason(error)}; check the right to read it") from error
    except Exception as error:  # each file system has errors of its own below it, often of no common kind
        raise _InterruptedError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return the message of an error, without secrets of addresses, or its type when it has none."""
    return redact(str(error)) or type(error).__name__
