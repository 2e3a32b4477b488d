"""WebDataset's tar shards: the files of a sample lie one behind the other, with one name and different suffixes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from datasets import Dataset, IterableDataset, NamedSplit

from ...errors import first_line
from ...files import is_utf8, parse_json
from ...model.images import IMAGE_SUFFIXES, is_image_name
from .caption_columns import ID_COLUMNS, captions_in_row, clean_captions
from .damage import Damage, located
from .image_folder import ImageFolder
from .parquet_files import MAX_EXPANSION, MODEST_BYTES
from .splits import Splits, assign_split, missing_splits, split_in_path
from .stored_rows import divide_training, file_stamps, generate, in_stream, row_features

TEXT_SUFFIXES = (".txt", ".text", ".caption", ".captions")
# Largest sizes in bytes of the files in a shard: of names, captions and images.
MAX_NAME, MAX_TEXT, MAX_IMAGE = 2**20, 2**24, 2**28


def read_tar_shards(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Splits:
    """Stream tar shards, or copy them once into an Arrow file in the cache of `datasets` for random access."""
    shards: dict[str, list[str]] = {}
    for file in files:
        shards.setdefault(split_in_path(file) or "train", []).append(str(folder.locate(file)))
    missing = missing_splits(shards, damage.report)
    splits: dict[str, Dataset | IterableDataset] = {}
    for name in (*shards, *missing) if streaming else shards:
        paths = shards.get(name, shards.get("train", []))
        arguments: dict[str, Any] = {"shards": paths, "skip_broken": damage.skip_broken}
        if streaming:
            if missing and paths is shards.get("train"):
                arguments |= {"split": name, "missing": tuple(missing)}
            splits[name] = IterableDataset.from_generator(
                _streamed_tar_rows,
                features=row_features(),
                gen_kwargs={**arguments, "report": damage.report},
                split=NamedSplit(name),
            )
            continue
        # Damage is reported every time, also where rows come from the cache.
        if not sum(1 for _ in tar_rows(**arguments, report=damage.report, read_images=False)):
            raise ValueError(
                f"{len(paths)} tar shards such as {paths[0]} hold no image for the split {name!r}. Add images, or name "
                f"shards by their split: {name}-00000.tar."
            )
        dataset = generate(_cached_tar_rows, name, {**arguments, "stamps": file_stamps(paths)})
        splits[name] = dataset.remove_columns("location")
    if missing and not streaming:
        train = splits["train"]
        assert isinstance(train, Dataset)
        splits |= divide_training(train, train["image_id"][:], missing)
    return splits


def _cached_tar_rows(stamps: tuple[str, ...], **arguments: Any) -> Iterator[dict[str, Any]]:
    """Call `tar_rows` without reports; by `stamps`, `datasets` tells changed files from those it has cached."""
    return ({**row, "location": None} for row in tar_rows(**arguments, report=lambda line: None))


def _streamed_tar_rows(**arguments: Any) -> Iterator[dict[str, Any]]:
    """Call `tar_rows` for a stream."""
    return map(in_stream, tar_rows(**arguments))


def tar_rows(
    shards: Sequence[str],
    split: str | None = None,
    missing: Sequence[str] = (),
    *,
    report: Callable[[str], None],
    skip_broken: bool = False,
    read_images: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of tar shards; no more than one sample at a time is in memory.

    If missing splits are made of these shards (see `splits.assign_split`), only the rows of one `split` are yielded.
    With `read_images=False`, images are left empty, merely to learn which rows there are. `report` and `skip_broken`
    are those of `Damage`.

    Raises:
        ValueError: A shard or a sample can't be read.
    """
    for shard in shards:
        damage = Damage(report, skip_broken=skip_broken)
        keys: set[str] = set()
        for key, files in _read_samples(shard, damage, read_images):
            with damage.skipping():
                if key in keys:
                    raise ValueError(f"{shard}: the sample {key!r} occurs twice.")
                keys.add(key)
                row = _build_row(shard, key, files, damage)
                if row is not None and (split is None or assign_split(row["image_id"], missing) == split):
                    yield row
        damage.report_repairs()


def _build_row(shard: str, key: str, files: Mapping[str, bytes], damage: Damage) -> dict[str, Any] | None:
    """Build the row of a sample from its files by suffix; None if it has no image or no caption."""
    image_suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix in files]
    captions: list[str] = []
    image_id = key
    for suffix, content in files.items():
        if suffix not in (*TEXT_SUFFIXES, ".json"):
            continue
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise ValueError(f"{shard}: {key + suffix!r} is not UTF-8, byte 0x{content[e.start]:02x}.") from e
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if suffix == ".json":
            location = f"{shard}: {key + suffix!r}"
            fields = parse_json(text, location)
            if not isinstance(fields, dict):
                raise ValueError(f"{location} is no JSON object.")
            with located(location):
                found = captions_in_row(fields)
            image_id = str(next((fields[name] for name in ID_COLUMNS if name in fields), key))
            if not is_utf8(image_id):
                raise ValueError(f"{location} has an id with half a character.")
        # img2dataset writes each caption to a text file and, among other fields, to a JSON file.
        captions += [caption for caption in found if caption.strip() not in {known.strip() for known in captions}]
    if not image_suffixes or not captions:
        lacking = "a caption" if image_suffixes else "an image"
        damage.repaired(f"{shard}: samples without {lacking}, left out", key)
        return None
    for suffix in image_suffixes[1:]:
        damage.repaired(f"{shard}: further images of a sample, left out", key + suffix)
    image = {"bytes": files[image_suffixes[0]], "path": key + image_suffixes[0]}
    return {"image": image, "captions": clean_captions(captions, f"{shard}: {key!r}", damage), "image_id": image_id}


def _read_samples(shard: str, damage: Damage, read_images: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the name of each sample and its files by suffix."""
    key = ""
    files: dict[str, bytes] = {}
    for path, content in _read_members(shard, damage, read_images):
        folder, _, name = path.removeprefix("./").rpartition("/")
        stem, dot, suffix = name.partition(".")
        stem = os.path.join(folder, stem)
        if stem != key and files:
            yield key, files
            files = {}
        key = stem
        if (suffix := dot + suffix.lower()) in files:
            damage.broken(f"{shard}: {path!r} occurs twice.")
        else:
            files[suffix] = content
    if files:
        yield key, files


def _read_members(shard: str, damage: Damage, read_images: bool) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each file in a tar, which stays empty unless it is needed.

    Links, paths that leave the folder of the tar, and files that are too large are refused.
    """
    try:
        for tar, member in _members(shard):
            is_image, is_text = is_image_name(member.name), member.name.lower().endswith((*TEXT_SUFFIXES, ".json"))
            if member.isdir():
                continue
            if not is_utf8(member.name):
                damage.broken(f"{shard}: the name {member.name!a} is not UTF-8.")
            elif member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                damage.broken(f"{shard}: {member.name!r} leaves the data set's folder.")
            elif member.issym() or member.islnk():
                damage.broken(f"{shard}: {member.name!r} is no file but a link, to {member.linkname!r}.")
            elif not member.isreg():
                damage.broken(f"{shard}: {member.name!r} is no regular file.")
            elif member.size > (MAX_TEXT if is_text else MAX_IMAGE) and (is_text or is_image):
                damage.broken(f"{shard}: {member.name!r} has {member.size} bytes, too many.")
            elif is_text or (is_image and read_images):
                with _errors_of_tar(f"{member.name!r}"):
                    file = tar.extractfile(member)
                    assert file is not None
                    content = file.read()
                yield member.name, content
            else:
                yield member.name, b""
    except tarfile.ReadError as e:
        damage.broken(f"{shard} can't be read to its end: {e}")


def _members(shard: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the open tar and each of its members.

    `tarfile` by itself takes a damaged header, or none, for the end of the archive.

    Raises:
        tarfile.ReadError: The tar is damaged, or does not end as tars do.
    """
    with _errors_of_tar("its start"):
        tar = tarfile.open(shard, tarinfo=_BoundedHeader)  # noqa: SIM115  # closed below
        max_bytes = max(MODEST_BYTES, MAX_EXPANSION * os.path.getsize(shard))
    with tar:
        file, end = tar.fileobj, 0
        assert file is not None
        with _errors_of_tar("its start"):
            member = tar.next()
        while member is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it has seen in memory
            start, end = end, tar.offset  # type: ignore[attr-defined]
            if end <= start:
                raise tarfile.ReadError(f"the header at byte {start} is damaged: its size is negative.")
            if end > max_bytes:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_EXPANSION} times its size.")
            yield tar, member
            with _errors_of_tar(f"the header at byte {end}"):
                if file.tell() != end:
                    file.seek(end - 1)
                    if not file.read(1):
                        raise tarfile.ReadError("the file ends before it.")
                try:
                    member = _BoundedHeader.fromtarfile(tar)
                except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # zeros
                    member = None
                except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                    raise tarfile.ReadError("the file ends without the zeros at the end of a tar.") from None
        with _errors_of_tar(f"what follows byte {end}"):
            while file.tell() <= end + MODEST_BYTES and (block := file.read(2**20)):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("there are data behind the zeros at the end of a tar.")


class _BoundedHeader(tarfile.TarInfo):
    """A header in a tar that is not read if its name, of which the header tells the length, takes too much memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedHeader:
        """Build a header from a block of 512 bytes."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > MAX_NAME and not header.isreg() and not header.isdir()):
            raise tarfile.ReadError(f"it tells a size of {header.size} bytes.")
        return header


@contextmanager
def _errors_of_tar(what: str) -> Iterator[None]:
    """Raise all errors that a damaged tar causes as `tarfile.ReadError`s that say what is damaged."""
    try:
        yield
    except Exception as e:  # tarfile, gzip, zlib and lzma raise a dozen kinds
        raise tarfile.ReadError(f"{what} is damaged: {first_line(e)}") from e
