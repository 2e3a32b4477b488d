"""The boundary of a data set: the files and addresses that its captions and tables may name."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from .damage import shortened

# What a name may lead to instead of a file. Opening a pipe or a device may never end.
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True)
class Boundary:
    """What may be opened for a data set: regular files in its folders, and on request others and URLs.

    Args:
        folders: Paths of the folders, with all links resolved.
        allow_urls: Whether images may be addresses on the web.
        allow_outside: Whether paths and links may lead to files outside of the folders.
    """

    folders: tuple[str, ...]
    allow_urls: bool = False
    allow_outside: bool = False

    def contains(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path lies in one of the folders once all its links are resolved."""
        real_path = os.path.realpath(path)
        return any(real_path == folder or real_path.startswith(os.path.join(folder, "")) for folder in self.folders)

    def check_url(self, url: str) -> str:
        """Return a URL that may be downloaded; for others raise a ValueError."""
        # `datasets` takes `::` for a chain of file systems, such as `zip://image.jpg::/home/me/archive.zip`.
        if "::" in url or not re.match(r"https?://", url, re.IGNORECASE):
            raise ValueError(f"{shortened(url)} is a URL that is never opened; only http and https are.")
        if not self.allow_urls:
            raise ValueError(
                f"{shortened(url)} is a URL. Download it, or have URLs opened with --allow_urls (allow_urls=True)."
            )
        return url

    def check_file(self, path: str | os.PathLike[str], what: str) -> None:
        """Raise a ValueError if a path leads outside or to no regular file; `what` it is begins the message."""
        if not self.allow_outside and not self.contains(path):
            target = shortened(os.path.realpath(path))
            leads = "" if target == what else f" leads to {target}, which"
            raise ValueError(
                f"{what}{leads} leaves the data set's folder {self.folders[0]!r}. "
                "To open it all the same, use --allow_outside (allow_outside=True)."
            )
        check_regular(path, what)


def check_regular(path: str | os.PathLike[str], what: str) -> None:
    """Raise a ValueError if there is no regular file at a path; `what` it is begins the message."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise ValueError(f"{what} can't be opened: {e.strerror}.") from e
    if not stat.S_ISREG(mode):
        raise ValueError(f"{what} is no regular file but {KINDS.get(stat.S_IFMT(mode), 'a device')}.")
