"""Functions that turn what users call an image into a file: paths, URLs, data URIs, open files and bytes."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import threading
import time
import zlib
from typing import Any

from .image_limits import MAX_MEMORY, BinaryFile, LimitedBytes, LimitedFile

# Limits of downloads; raise them if your images are larger.
MAX_DOWNLOAD = 100 * 2**20  # bytes
DOWNLOAD_TIMEOUT = 30.0  # seconds for a whole download
MAX_REDIRECTS = 5

SHOWN = 100  # characters of a name in error messages


def is_url(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name is an address, of any scheme, and not a path; `open_image` reads http and https."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fsdecode(name), re.IGNORECASE) is not None


def shown(name: str) -> str:
    """Return a name for error messages: short, in one line, and without the secrets of a URL."""
    if is_url(name):
        scheme, _, rest = name.partition("://")
        address, *query = re.split(r"[?#]", rest, maxsplit=1)
        host, slash, path = address.partition("/")
        name = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?…' if query else ''}"
    if len(name) > SHOWN and not (len(name) < 4096 and os.path.lexists(name)):
        name = f"{name[: SHOWN // 2 - 10]}…{name[-SHOWN // 2 - 9 :]}"
    return name if name and name.isprintable() else ascii(name)


def open_source(source: Any) -> tuple[str, BinaryFile]:
    """Return the name of a source for error messages, and the file to read it from.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: The URL cannot be downloaded.
        ValueError: It is not a file, or has been opened as text.
        TypeError: It is none of a path, URL, data URI, bytes-like object and open file.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return f"The given {type(source).__name__} object", LimitedBytes(source)
    if callable(getattr(source, "read", None)):
        return _from_open_file(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"An image cannot be read from {type(source).__name__}; give a path, a URL, bytes, an open file, "
            "a PIL image or a numpy array."
        )
    name = os.fsdecode(source)
    if name[:5].lower() == "data:":
        return "The given data URI", LimitedBytes(_from_data_uri(name))
    if is_url(name):
        return shown(name), LimitedBytes(download(name))
    return shown(name), _from_path(name)


def _from_path(name: str) -> LimitedFile:
    if "\0" in name:
        raise FileNotFoundError(f"{shown(name)} does not exist.")
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer, and a device never ends
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, device or socket"
            raise ValueError(f"{shown(name)} is not a readable image: it is {kind}, not a file.")
        return LimitedFile(io.FileIO(name))
    except (FileNotFoundError, NotADirectoryError, UnicodeError) as e:
        raise FileNotFoundError(f"{shown(name)} does not exist.") from e
    except OSError as e:  # without permission, too long, …
        raise ValueError(f"{shown(name)} is not a readable image: {e.strerror}") from e


def _from_open_file(source: Any) -> tuple[str, LimitedBytes]:
    given = getattr(source, "name", None)
    name = shown(given) if isinstance(given, str) and given else f"The given {type(source).__name__} object"
    if isinstance(source, io.TextIOBase):
        raise ValueError(f"{name} is not a readable image: it was opened as text; open it with mode 'rb'.")
    try:
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        data = bytes(source.read(MAX_MEMORY + 1))
    except Exception as e:  # whatever the object raises
        raise ValueError(f"{name} is not a readable image: {e}") from e
    if len(data) > MAX_MEMORY:
        raise ValueError(f"{name} is not a readable image: it has more than {MAX_MEMORY} bytes.")
    return name, LimitedBytes(data)


def _from_data_uri(uri: str) -> bytes:
    head, comma, content = uri[: 4 * MAX_DOWNLOAD // 3].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("The given data URI is not a readable image: give data:image/…;base64,…")
    try:
        return base64.b64decode(content.replace("%2B", "+").replace("%2F", "/").replace("%3D", "="))
    except (binascii.Error, ValueError) as e:
        raise ValueError("The given data URI is not a readable image: its base64 is broken.") from e


def download(url: str) -> bytes:
    """Return the bytes that a server sends for an http(s) URL.

    Raises:
        ConnectionError: It can't be downloaded, is larger than `MAX_DOWNLOAD`, or takes longer than `DOWNLOAD_TIMEOUT`.
    """
    # Not transformers' load_image, which decodes error pages and loses transparency and the range of 16 bits.
    try:
        from huggingface_hub.utils import httpx  # an exported captioner runs without it
    except ImportError as e:
        raise ConnectionError(f"{shown(url)} cannot be downloaded without huggingface_hub; give a file.") from e
    if not url.lower().startswith(("http://", "https://")):
        raise ConnectionError(f"{shown(url)} cannot be downloaded: only http and https are read.")
    outcome: list[bytes | str] = []
    # The encoding is refused because a small answer could be unpacked to any size.
    headers = {"Accept-Encoding": "identity"}
    client = httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=10.0, headers=headers)
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT

    def fetch() -> None:
        try:
            with client.stream("GET", url) as response:
                outcome.append(_read_response(response, deadline))
        except httpx.HTTPStatusError as e:
            outcome.append(f"the server answers {e.response.status_code} {e.response.reason_phrase}"[:SHOWN])
        except Exception as e:  # of httpx, and of Python for hosts that can't be encoded
            outcome.append(str(e).replace(url, "the URL")[:SHOWN] or type(e).__name__)

    # In a thread, because a server that sends its header byte by byte never lets a timeout of httpx pass.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT)
    client.close()
    result = outcome[0] if outcome else f"it takes more than {DOWNLOAD_TIMEOUT:.0f} s"
    if isinstance(result, str):
        raise ConnectionError(f"{shown(url)} cannot be downloaded: {result}")
    return result


def _read_response(response: Any, deadline: float) -> bytes:
    """Return the body of a response, unless it is too large or comes too slowly."""
    response.raise_for_status()
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    decoder = zlib.decompressobj(wbits=47) if encoding in ("gzip", "deflate") else None
    if decoder is None and encoding != "identity":
        raise ValueError(f"it is encoded as {encoding!r}")
    body = bytearray()
    for chunk in response.iter_raw():
        body += decoder.decompress(chunk, MAX_DOWNLOAD + 1 - len(body)) if decoder else chunk
        if len(body) > MAX_DOWNLOAD:
            raise ValueError(f"it has more than {MAX_DOWNLOAD // 2**20} MiB; raise {__name__}.MAX_DOWNLOAD")
        if time.monotonic() > deadline:
            raise ValueError(f"it takes more than {DOWNLOAD_TIMEOUT:.0f} s")
    return bytes(body)
