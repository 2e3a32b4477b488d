"""Files of a data set's folder: finding its images, and refusing images that lie outside of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from .caption_columns import IMAGE_SUFFIXES


class ImageFolder:
    """Lists of the images and the other files under a folder, found in one walk.

    Args:
        path: Path of a folder, or of a file in it; `matching` then finds this file alone.

    Raises:
        ValueError: The folder is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.root = self.path if self.path.is_dir() else self.path.absolute().parent
        self._scan()
        if not self.path.is_dir() and not self.images and self.root.name.lower() in ("annotations", "data"):
            self.root = self.root.parent  # as in COCO, where images lie beside the folder of annotations
            self._scan()
        if not self.images and not self.files:
            raise ValueError(f"The folder {str(path)!r} is empty. Give one with images and captions.")

    def _scan(self) -> None:
        """Walk the folder and list its images and other files, paths with few parts first."""
        self.images: dict[str, bool] = {}  # relative path -> whether it is a link
        self.files: list[str] = []
        self.outside: list[str] = []  # links to folders elsewhere
        self._real_root = os.path.realpath(self.root)
        folders = [""]
        while folders:
            folder = folders.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    name = f"{folder}{entry.name}"
                    if entry.is_dir():
                        if not entry.is_symlink():
                            folders.append(f"{name}/")
                        elif not self._is_inside(name):
                            self.outside.append(name)
                    elif name.lower().endswith(IMAGE_SUFFIXES):
                        self.images[name] = entry.is_symlink()
                    else:
                        self.files.append(name)
        self.files.sort(key=_depth_and_name)
        self._paths_by_name: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self.images, key=_depth_and_name):
            self._paths_by_name[os.path.basename(path)].append(path)
        self.has_distinct_names = len(self._paths_by_name) == len(self.images)

    def matching(self, *patterns: str) -> list[str]:
        """Return the files that are no images and whose names match a pattern in any case.

        If the data set was given as the path of one file, this is the only candidate.
        """
        if self.path.is_dir():
            return _matching(self.files, patterns)
        return _matching([self.path.absolute().relative_to(self.root.absolute()).as_posix()], patterns)

    def beside(self, *patterns: str) -> list[str]:
        """Return the files that are no images and whose names match, also if the data set was given as one file."""
        return _matching(self.files, patterns)

    def find(self, name: str, folder: str = "") -> str | None:
        """Return the path relative to the root of the image that a file in `folder` names; None if it is missing.

        Since archives unpack in many ways, the image may lie deeper than its name says.

        Raises:
            ValueError: The image lies outside the data set's folder, or several different images have this name.
        """
        path = name.replace("\\", "/")
        if os.path.isabs(path):
            root = self._real_root if path.startswith(f"{self._real_root}/") else os.path.abspath(self.root)
            path, folder = os.path.relpath(path, root), ""
        if ".." in PurePosixPath(path).parts:
            raise ValueError(f"{name!r} leaves the data set's folder {str(self.root)!r}.")
        path = os.path.normpath(path)
        found = os.path.normpath(os.path.join(folder, path))
        if found not in self.images:
            deeper = [
                other
                for other in self._paths_by_name.get(os.path.basename(path), [])
                if f"/{other}".endswith(f"/{path}") and (not folder or other.startswith(f"{folder}/"))
            ]
            if not deeper:
                self._refuse_linked_folders(name, found)
                return None
            if len({os.path.getsize(self.root / other) for other in deeper}) > 1:
                raise ValueError(f"{name!r} may be any of {', '.join(deeper)}. Give its path.")
            found = deeper[0]
        if self.images[found] and not self._is_inside(found):
            raise ValueError(f"{name!r} is a link that leaves the data set's folder {str(self.root)!r}.")
        return found

    def _refuse_linked_folders(self, name: str, path: str) -> None:
        """Raise a ValueError if the image lies in a linked folder that is outside the data set's folder."""
        for link in self.outside:
            if (self.root / link / os.path.basename(name)).exists() or path.startswith(f"{link}/"):
                raise ValueError(
                    f"{name!r} is in {link!r}, a link that leaves the data set's folder {str(self.root)!r}."
                )

    def _is_inside(self, path: str) -> bool:
        """Return whether the target of a link, given by its path relative to the root, lies under the root."""
        return os.path.realpath(self.root / path).startswith(os.path.join(self._real_root, ""))


def _depth_and_name(path: str) -> tuple[int, str]:
    """Return a sorting key that puts paths with few parts first."""
    return path.count("/"), path


def _matching(paths: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the paths whose file names match one of the patterns, ignoring case."""
    return [path for path in paths if any(fnmatch(os.path.basename(path).lower(), p.lower()) for p in patterns)]
