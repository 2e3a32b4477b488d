"""Files of a data set's folder: listing them, finding the images that captions name, and refusing what is outside."""

from __future__ import annotations

import filecmp
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from ...model.images import is_image_name, is_url
from .boundary import Boundary, check_regular
from .damage import Damage, shortened


def _folded(name: str) -> str:
    """Return a name without differences of case and of Unicode normal form, as some file systems ignore them."""
    return unicodedata.normalize("NFC", name).casefold()


# Forms in which the name in a list and a file's path are compared, one pair after the other until a file is found.
FORMS: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (str, str),
    (_folded, _folded),
    (_folded, lambda path: _folded(os.path.splitext(path)[0])),  # a name without its suffix
)


class ImageFolder:
    """Lists of the images and the other files under a folder, found in one walk.

    Args:
        path: Path of a folder, or of a file in it; `matching` then finds this file alone.
        damage: Collector of what can't be listed.
        allow_urls: Whether images may be addresses on the web.
        allow_outside: Whether paths and links may lead out of the folder.

    Raises:
        ValueError: The folder is empty.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        damage: Damage | None = None,
        *,
        allow_urls: bool = False,
        allow_outside: bool = False,
    ) -> None:
        self.path, self.damage = Path(path), damage or Damage()
        self.allow_urls, self.allow_outside = allow_urls, allow_outside
        self.root = self.path if self.path.is_dir() else self.path.absolute().parent
        self._scan()
        if not self.path.is_dir() and not self.images and self.root.name.lower() in ("annotations", "data"):
            self.root = self.root.parent  # as in COCO, where images lie beside the folder of annotations
            self._scan()
        if not self.images and not self.files:
            raise ValueError(f"The folder {str(path)!r} is empty. Give one with images and captions.")

    def _scan(self) -> None:
        """Walk the folder and list its images and other files, paths with few parts first."""
        self.images: dict[str, bool] = {}  # relative path -> whether it is a link, or no regular file
        self.files: list[str] = []
        self.outside: list[str] = []  # links to folders elsewhere that are not allowed
        self.boundary = Boundary((os.path.realpath(self.root),), self.allow_urls, self.allow_outside)
        folders, links, walked = [""], list[str](), set[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop()
            # Links may lead in a circle, and to what is in the folder anyway.
            real_path = os.path.realpath(self.root / folder)
            if real_path in walked:
                continue
            walked.add(real_path)
            for entry in self._entries(folder):
                name = f"{folder}{entry.name}"
                if not _is_folder(entry):
                    if is_image_name(name):
                        self.images[name] = not entry.is_file(follow_symlinks=False)
                    else:
                        self.files.append(name)
                elif not entry.is_symlink():
                    folders.append(f"{name}/")
                elif self.allow_outside or self.boundary.contains(entry.path):
                    links.append(f"{name}/")
                else:
                    self.outside.append(name)
        self.files.sort(key=_depth_and_name)
        self._index_names()

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Return the entries of a folder that may belong to a data set, sorted by name."""
        try:
            with os.scandir(self.root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as e:
            self.damage.broken(f"The folder {os.path.join(self.root, folder)!r} can't be read: {e.strerror}.")
            return []
        usable = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                entry.name.encode()
            except UnicodeEncodeError:
                self.damage.repaired("Files whose names are not UTF-8, left out", ascii(f"{folder}{entry.name}"))
            else:
                usable.append(entry)
        return usable

    def _index_names(self) -> None:
        """Make the index by which `find` finds files that lie deeper than their name says."""
        self.has_distinct_names = len({os.path.basename(path) for path in self.images}) == len(self.images)
        without_suffix = [path for path in self.files if not os.path.splitext(path)[1]]
        self._paths_by_name: dict[str, dict[str, None]] = defaultdict(dict)  # in the order of depth
        for path in sorted([*self.images, *without_suffix], key=_depth_and_name):
            for _, form in FORMS:
                self._paths_by_name[form(os.path.basename(path))][path] = None

    def matching(self, *patterns: str) -> list[str]:
        """Return the files that are no images and whose names match a pattern in any case.

        If the data set was given as the path of one file, this is the only candidate.
        """
        if self.path.is_dir():
            return _matching(self.files, patterns)
        return _matching([self.path.absolute().relative_to(self.root.absolute()).as_posix()], patterns)

    def beside(self, *patterns: str) -> list[str]:
        """Return the files that are no images and whose names match, also if the data set was given as one file."""
        return self.readable(_matching(self.files, patterns))

    def locate(self, file: str) -> Path:
        """Return the path at which a file of this folder, given by its path relative to the root, may be opened.

        Raises:
            ValueError: It is a link that leads outside, or no regular file.
        """
        path = self.root / file
        if self.path.is_dir() or path.absolute() != self.path.absolute():
            self.boundary.check_file(path, repr(file))
        else:  # the file that was given may be a link to anywhere
            check_regular(path, repr(file))
        return path

    def readable(self, files: Iterable[str]) -> list[str]:
        """Return those files that may be opened (see `locate`); the others are refused, or left out and reported."""
        usable = []
        for file in files:
            with self.damage.skipping():
                self.locate(file)
                usable.append(file)
        return usable

    def find(self, name: str, folder: str = "") -> str | None:
        """Return where the image is that a file in `folder` names, or None if it is missing.

        The result is a path relative to the root, or on request (`allow_urls`, `allow_outside`) a URL or an absolute
        path. Since archives unpack in many ways, the image may lie deeper than its name says, and its name may differ
        in case, in Unicode normal form or by a suffix.

        Raises:
            ValueError: The image lies outside the data set's folder, is a URL or no regular file, or several different
                images have this name.
        """
        if is_url(name):
            return self.boundary.check_url(name)
        for path in dict.fromkeys((name, name.replace("\\", "/"))):
            found = self._find_exactly(path, folder)
            if found is not None:
                return found
        path = os.path.normpath(path)
        for form_of_name, form_of_file in FORMS[: 2 if is_image_name(path) else 3]:
            wanted = form_of_name(path)
            candidates = [
                other
                for other in self._paths_by_name.get(os.path.basename(wanted), ())
                if f"/{form_of_file(other)}".endswith(f"/{wanted}") and (not folder or other.startswith(f"{folder}/"))
            ]
            if candidates := [path for path in candidates if os.path.exists(self.root / path)]:
                return self._only_one(name, candidates)
        for link in self.outside:
            if path.startswith(f"{link}/") or os.path.lexists(self.root / link / os.path.basename(path)):
                self.boundary.check_file(self.root / link, f"{link!r}, the folder of {shortened(name)},")
        return None

    def absolute(self, found: str) -> str:
        """Return as a URL or an absolute path what `find` has found."""
        return found if is_url(found) else os.path.abspath(self.root / found)

    def _find_exactly(self, path: str, folder: str) -> str | None:
        """Return an image that is right where its name says, seen from the folder of the list or from the root."""
        listed = os.path.normpath(os.path.join(folder, path))
        if self.images.get(listed) is False:
            return listed
        may_leave = os.path.isabs(path) or ".." in path.split("/")
        outside = None
        for start in dict.fromkeys((folder, "")):
            full_path = os.path.join(self.root, start, path)
            if not may_leave and not os.path.lexists(full_path):
                continue
            if not self.boundary.contains(full_path):
                outside = outside or full_path
            elif os.path.exists(full_path):
                self.boundary.check_file(full_path, shortened(path))
                return listed if listed in self.images else self._relative(full_path)
        if outside is None:
            return None
        if self.allow_outside and not os.path.exists(outside):
            return None
        self.boundary.check_file(outside, shortened(path))
        return os.path.realpath(outside)

    def _relative(self, path: str) -> str:
        """Return the relative path of a file inside the folder, as it is listed in `images` if it is."""
        names = (
            os.path.relpath(os.path.abspath(path), os.path.abspath(self.root)),
            os.path.relpath(os.path.realpath(path), self.boundary.folders[0]),
        )
        return next((name for name in names if name in self.images), names[-1])

    def _only_one(self, name: str, candidates: list[str]) -> str:
        """Return the first of the files that a name may mean; raise a ValueError if they differ."""
        for path in candidates:
            self.boundary.check_file(self.root / path, repr(path))
        first, *others = candidates
        if not all(filecmp.cmp(self.root / first, self.root / other, shallow=False) for other in others):
            raise ValueError(f"{shortened(name)} may be any of {', '.join(candidates)}. Give its path.")
        return first


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _depth_and_name(path: str) -> tuple[int, str]:
    """Return a sorting key that puts paths with few parts first."""
    return path.count("/"), path


def _matching(paths: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the paths whose file names match one of the patterns, ignoring case."""
    return [path for path in paths if any(fnmatch(os.path.basename(path).lower(), p.lower()) for p in patterns)]
