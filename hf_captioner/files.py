"""Writing files completely or not at all, to folders with one writer at a time, and reading files of any origin.

What is read may be damaged or hostile: JSON, YAML, and text that is not Unicode.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from .errors import first_line

LOCK = ".lock"
_MAKE_ROOM = "Make room there, or name another folder."
_NO_PERMISSION = "You may not write there: ask for the permission, or name another folder."
# What to do about an error of writing; the reason itself is the operating system's.
ADVICE = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: _MAKE_ROOM,
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.ENOTDIR: "There is a file where a folder should be: name another folder.",
    errno.EEXIST: "There is a file where a folder should be: name another folder.",
    errno.EISDIR: "There is a folder where a file should be: delete it, or name another folder.",
    errno.ENAMETOOLONG: "Give a shorter name.",
}


@contextmanager
def explain_write_errors(content: str, folder: str | Path, *, then: str = "") -> Iterator[None]:
    """Turn an error of writing into an OSError that says what was not written, why, and what to do.

    Args:
        content: What is written in the block, at the start of a sentence, such as "The log".
        folder: Folder to which it is written.
        then: Advice for the time when the cause is removed, at the end of the message.
    """
    try:
        yield
    except Exception as e:
        # safetensors raises an exception of its own, with the number of the operating system's error in the text.
        found = re.search(r"\(os error (\d+)\)", str(e))
        number = e.errno if isinstance(e, OSError) else int(found[1]) if found else None
        if number is None:
            raise
        advice = ADVICE.get(number, "Name another folder.")
        raise OSError(
            " ".join(f"{content} can't be written to {str(folder)!r}: {os.strerror(number)}. {advice} {then}".split())
        ) from e


def write_atomically(path: str | Path, content: str | bytes | Callable[[Path], object]) -> Path:
    """Write a file that appears, or replaces an earlier one, once it is complete; return its path.

    Args:
        path: File to write. A link is followed, and a device or a pipe, such as `/dev/stdout`, is written to directly.
        content: Text, bytes, or a function that writes the file at the path it is called with.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    is_special = target.exists() and not target.is_file()
    # The name begins with a dot, and keeps the suffix, from which matplotlib knows the format.
    partial = target if is_special else target.with_name(f".{os.getpid()}.partial{target.suffix}")
    try:
        if isinstance(content, str):
            content = content.encode("utf-8")
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        if not is_special:
            sync(partial)
            os.replace(partial, target)
    finally:
        if not is_special:
            partial.unlink(missing_ok=True)
    return path


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace files of a folder by the ones that a function writes, once all of these are complete.

    Args:
        folder: Folder whose files are replaced.
        write: Function that is called with an empty folder and fills it.

    Raises:
        OSError: The files can't be written. Those in the folder remain as they were.
    """
    partial = folder / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        files = sorted(partial.iterdir())
        for file in files:
            sync(file)
        for file in files:
            os.replace(file, folder / file.name)
        sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the directory entries of a folder, to the disk."""
    if os.name != "posix":
        return  # Only POSIX systems can open a folder.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_writer(folder: str | Path, *, content: str = "Files") -> Iterator[None]:
    """Create a folder, make sure that it can be written to, and keep other processes from writing to it in the block.

    Args:
        folder: Folder that is written to.
        content: What is written there, for errors.

    Raises:
        ValueError: Another process writes to the folder.
        OSError: The folder can't be written to.
    """
    folder = Path(folder)
    is_new = not os.path.exists(folder)
    with explain_write_errors(content, folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".probe", b"")  # the lock may be a file of an earlier run, on a disk now full
        (folder / ".probe").unlink()
    try:
        with locked(folder / LOCK, f"is writing to {str(folder)!r}"):
            yield
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written


@contextmanager
def locked(path: Path, activity: str, *, report: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock in the block. Whatever ends the process frees it, and forked processes don't inherit it.

    Args:
        path: File of the lock, in a folder that exists. It is deleted afterwards.
        activity: What the process that holds the lock is doing, for messages, such as "is writing to 'outputs'".
        report: Function that is called with a message before waiting for another process. Without it, there is no
            waiting.

    Raises:
        ValueError: Another process holds the lock, and there is no `report`.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as e:
        holder = ""
        with suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")
        message = f"{holder or 'Another process'} {activity}"
        if report is None:
            raise ValueError(f"{message}. Wait for its end, or name another folder.") from e
        report(f"{message}: waiting for it.")
        lock.acquire()
    try:
        with suppress(OSError):  # Windows lets nobody write to a locked file.
            path.write_text(f"Process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def read_json(path: str | Path, content: str) -> Any:
    """Read a JSON file of any origin.

    Args:
        path: File to read.
        content: What it holds, at the start of a sentence and in the singular, such as "The file of results".

    Raises:
        ValueError: The file is not JSON in UTF-8.
        OSError: The file can't be read.
    """
    return parse_json(Path(path).read_bytes(), f"{content} {str(path)!r}")


def parse_json(data: bytes | str, name: str) -> Any:
    """Parse JSON, of bytes in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is not JSON, or an object has a key twice, of which one value would be lost. The error begins
            with `name` and says in which line of several the mistake is.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as e:
        line = f", line {e.lineno}," if "\n" in e.doc else ""
        raise ValueError(f"{name}{line} is not JSON: {e.msg.removesuffix(' at')} at character {e.colno}.") from e
    except (ValueError, RecursionError) as e:  # bytes that are no UTF-8, a number of thousands of digits, deep nesting
        raise ValueError(f"{name} is not JSON: {first_line(e)}") from e


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object's pairs, or raise a ValueError if a key occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key[:40]!r} occurs twice in an object.")
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without what grows out of a small file or is easily overlooked in it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases: ten lines of them make a value of gigabytes."""
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise ComposerError(None, None, f"*{event.anchor} refers to another value", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a name that is given twice, of which YAML takes the last."""
        mapping = super().construct_mapping(node, deep)
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(mapping) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return mapping


def parse_fields(text: str) -> dict[str, Any]:
    """Parse YAML text that holds names with values.

    Raises:
        ValueError: It holds something else, or is nested too deeply.
    """
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ValueError(" ".join(str(e).split())) from e
    if not isinstance(values or {}, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not names with values")
    return values or {}


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8.

    Half a character, a lone surrogate, can't. JSON may hold one, and Python keeps bytes that are not UTF-8 as such.
    """
    return text.isascii() or re.search("[\ud800-\udfff]", text) is None
