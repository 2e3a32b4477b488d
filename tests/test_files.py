"""Files that are complete or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_captioner.files import explain_write_errors, locked, only_writer, parse_json, write_atomically

HOLD = """
import os, sys, time
from hf_captioner.files import only_writer
with only_writer(sys.argv[1]):
    if os.fork() == 0:  # as a worker of a data loader, which outlives its killed parent for seconds
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_until_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with (
            pytest.raises(ValueError, match=rf"^Process {process.pid} on .* is writing to '.*folder'\. Wait"),
            only_writer(folder),
        ):
            pass
        process.kill()
        process.wait()
        with only_writer(folder):
            (folder / "result").write_text("")
        os.kill(child, signal.SIGKILL)
    assert [path.name for path in folder.iterdir()] == ["result"]
    with only_writer(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


def test_who_reports_waits_for_a_lock(tmp_path: Path) -> None:
    program = HOLD.replace("only_writer(sys.argv[1])", "locked(Path(sys.argv[1]), 'x')").replace("60", "0.5")
    program = program.replace("only_writer", "locked").replace("import os", "from pathlib import Path; import os", 1)
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "lock"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        lines: list[str] = []
        with locked(tmp_path / "lock", "is encoding", report=lines.append):
            assert lines == [lines[0]] and "is encoding: waiting for it." in lines[0]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("FILE", "There is a file where a folder should be"),
        ("FILE/below", "There is a file where a folder should be"),
        ("n" * 300, "File name too long. Give a shorter name"),
        ("/proc/nowhere", "No such file or directory. Name another folder"),  # root may write anywhere else
    ],
)
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("")
    with (
        pytest.raises(OSError, match=rf"^Results can't be written to '.*': .*({message})"),
        only_writer(tmp_path / folder, content="Results"),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EACCES, "You may not write there"),
        (errno.EROFS, "Name another folder"),
        (errno.EISDIR, "There is a folder where a file should be"),
    ],
)
def test_the_advice_fits_the_error(number: int, advice: str) -> None:
    with (
        pytest.raises(OSError, match=f"^The log can't be written to 'out': {os.strerror(number)}. {advice}.* Go on.$"),
        explain_write_errors("The log", "out", then="Go on."),
    ):
        raise OSError(number, os.strerror(number))
    with (
        pytest.raises(OSError, match=r"^The model can't be written to 'out': No space left on device. Make room"),
        explain_write_errors("The model", "out"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors has it


@pytest.mark.parametrize("content", ["new", b"new", lambda path: path.write_text("new")])
def test_a_file_is_replaced_when_it_is_complete(content: Any, tmp_path: Path) -> None:
    file, link = tmp_path / "file.txt", tmp_path / "link.txt"
    file.write_text("old")
    link.symlink_to(file)

    def fail(path: Path) -> None:
        path.write_text("half")
        assert path.suffix == ".txt"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert write_atomically(link, content) == link
    assert file.read_text() == "new" and link.is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_device_is_written_to_directly(capfd: pytest.CaptureFixture[str]) -> None:
    write_atomically("/dev/null", "text")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,\n}', "x, line 2, is not JSON"),
        (b"\xff\xfe", "x is not JSON"),
        (b"[" * 9999, "x is not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ],
)
def test_anything_but_json_is_refused_by_name(data: bytes, message: str) -> None:
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]
    with pytest.raises(ValueError, match=message):
        parse_json(data, "x")
