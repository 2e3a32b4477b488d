"""The files of a data set's folder: where its images are, and that none lies outside."""

from __future__ import annotations

import os
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from .caption_columns import IMAGE_SUFFIXES


class ImageFolder:
    """All files under a folder, found in one walk.

    Args:
        path: a folder, or a file in it, which is then the only one that `matching` finds.

    Raises:
        ValueError: there is nothing in it.
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
        self.images: dict[str, bool] = {}  # relative path -> whether it is a link
        self.files: list[str] = []
        self.outside: list[str] = []  # linked folders that lie elsewhere
        self._real = os.path.realpath(self.root)
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
        self.files.sort(key=lambda name: (name.count("/"), name))
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.images, key=lambda name: (name.count("/"), name)):
            self._by_name[os.path.basename(name)].append(name)

        self.has_distinct_names = len(self._by_name) == len(self.images)

    def matching(self, *patterns: str) -> list[str]:
        """Files, of images aside, whose names match, the least deep first."""
        files = (
            self.files if self.path.is_dir() else [self.path.absolute().relative_to(self.root.absolute()).as_posix()]
        )
        return [name for name in files if any(fnmatch(os.path.basename(name).lower(), p.lower()) for p in patterns)]

    def beside(self, *patterns: str) -> list[str]:
        """As `matching`, but of all files."""
        return [name for name in self.files if any(fnmatch(os.path.basename(name), p) for p in patterns)]

    def find(self, name: str, folder: str = "") -> str | None:
        """The image that a file in `folder` calls `name`, as a path relative to the root; None if it is not there.

        Since archives unpack in many ways, it may lie deeper than `folder` says.

        Raises:
            ValueError: it lies outside the data set's folder, or several images could be meant.
        """
        path = name.replace("\\", "/")
        if os.path.isabs(path):
            root = self._real if path.startswith(f"{self._real}/") else os.path.abspath(self.root)
            path, folder = os.path.relpath(path, root), ""
        if ".." in PurePosixPath(path).parts:
            raise ValueError(f"{name!r} leaves the data set's folder {str(self.root)!r}.")
        path = os.path.normpath(path)
        inside = os.path.normpath(os.path.join(folder, path))
        if inside not in self.images:
            found = [
                other
                for other in self._by_name.get(os.path.basename(path), [])
                if f"/{other}".endswith(f"/{path}") and (not folder or other.startswith(f"{folder}/"))
            ]
            if not found:
                self._refuse_outside(name, inside)
                return None
            if len({os.path.getsize(self.root / other) for other in found}) > 1:
                raise ValueError(f"{name!r} may be any of {', '.join(found)}. Give its path.")
            inside = found[0]
        if self.images[inside] and not self._is_inside(inside):
            raise ValueError(f"{name!r} is a link that leaves the data set's folder {str(self.root)!r}.")
        return inside

    def _refuse_outside(self, name: str, inside: str) -> None:
        for link in self.outside:
            if (self.root / link / os.path.basename(name)).exists() or inside.startswith(f"{link}/"):
                raise ValueError(
                    f"{name!r} is in {link!r}, a link that leaves the data set's folder {str(self.root)!r}."
                )

    def _is_inside(self, name: str) -> bool:
        return os.path.realpath(self.root / name).startswith(os.path.join(self._real, ""))
