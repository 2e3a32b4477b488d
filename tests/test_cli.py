"""The command line itself: help, spelling, exit codes, pipes, and what a wheel brings along."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hf_captioner import __version__
from hf_captioner.__main__ import COMMANDS
from hf_captioner.cli import CommandParser, run_command

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = Path(__file__).with_name("fixtures") / "first_release" / "captioner"


def run(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m hf_captioner` in a process of its own."""
    command = [sys.executable, "-m", "hf_captioner", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, **kwargs)


def test_help_lists_commands_without_torch_or_transformers() -> None:
    program = (
        "import sys; from hf_captioner.__main__ import main; code = main(['--help'])\n"
        "print('loaded:', *sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys())); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, loaded = result.stdout.splitlines()
    assert loaded == "loaded:"
    assert all(any(line.startswith(f"  {name} ") for line in text) for name in COMMANDS) and len(text) < 30


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_captioner.__main__ import main

    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    assert f"usage: hf-captioner {name}" in capsys.readouterr().out


def test_version_and_wrong_commands(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_captioner.__main__ import main

    assert main(["--version"]) == 0 and capsys.readouterr().out == f"hf-captioner {__version__}\n"
    assert main(["trian"]) == 2 and "Did you mean 'train'?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2 and "Commands are caption, evaluate" in capsys.readouterr().err


def test_options_take_hyphens_and_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="hf-captioner try")
    parser.add_argument("--num_beams", type=int)
    parser.add_argument("--name")
    for spelling in ("--num_beams", "--num-beams"):
        assert parser.parse_args([spelling, "3"]).num_beams == parser.parse_args([f"{spelling}=3"]).num_beams == 3
    assert parser.parse_args(["--name=a-b"]).name == "a-b"
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.parse_args(["--num_beam", "3"])  # options are never abbreviated
    assert capsys.readouterr().err.splitlines()[-1] == "See: hf-captioner try --help"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("too many\n beams"), 2, "error: too many beams"),
        (FileNotFoundError(2, "No such file", "a.jpg"), 2, "error: [Errno 2] No such file: 'a.jpg'"),
        (ImportError("METEOR needs pycocoevalcap"), 2, "error: METEOR needs pycocoevalcap"),
        (ValueError(), 2, "error: ValueError"),
        (ValueError("a" * 600 + "b" * 600), 2, f"error: {'a' * 500} … {'b' * 500}"),
        (MemoryError(), 2, "error: Memory has run out: MemoryError. Lower --batch_size or --num_workers."),
        (KeyboardInterrupt(), 130, "Stopped by SIGINT."),
    ],
)
def test_errors_end_in_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise error

    assert run_command(fail, []) == code and capsys.readouterr().err.strip() == line


def test_an_unexpected_error_ends_in_one_line_that_names_a_file_with_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise KeyError("a mistake of ours")

    assert run_command(fail, []) == 70
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"error: KeyError: 'a mistake of ours'. This should not happen: .* with '(.*)'\.", line)
    assert found and "in fail" in Path(found[1]).read_text()
    Path(found[1]).unlink()
    monkeypatch.setenv("HF_CAPTIONER_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run_command(fail, [])


def test_of_several_processes_the_main_one_reports_an_error_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run_command(lambda _: int("many"), []) == 2
    assert len(waited) == 1 and capsys.readouterr().err.count("error: invalid literal") == 2


@pytest.mark.parametrize("command", [["hf_captioner", "parts"], ["hf_captioner", "train", "--output_dir", "TMP"]])
def test_ctrl_c_while_libraries_are_imported_is_silent(command: list[str], tmp_path: Path) -> None:
    program = [sys.executable, "-v", "-m", *(str(tmp_path) if word == "TMP" else word for word in command)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = any("torch._C" in line for line in process.stderr)  # -v tells each import
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert seen and process.wait(60) == 130 and "Traceback" not in rest


def test_piped_output_holds_results_alone(photo_files: list[Path]) -> None:
    result = run("caption", FIXTURE, *photo_files[:2])
    assert result.returncode == 0, result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [str(path) for path in photo_files[:2]]
    assert "it/s" not in result.stderr and "%|" not in result.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`hf-captioner … | head -1`: the second write finds the pipe closed."""
    program = (
        "import sys, time; from hf_captioner.cli import run_command\n"
        "def main(_):\n    print('first', flush=True); time.sleep(1); print('second' * 99999, flush=True)\n"
        "sys.exit(run_command(main, []))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_in_one_line() -> None:
    program = (
        "import sys, time; from hf_captioner.cli import run_command\n"
        "def main(_):\n    print('running', flush=True); time.sleep(60)\n"
        "sys.exit(run_command(main, []))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == "Stopped by SIGINT.\n"


@pytest.mark.slow
def test_a_wheel_alone_does_every_job(tmp_path: Path) -> None:
    """Build the wheel and use nothing else of the repository: train by name, caption, score, export, publish."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}

    def succeed(*arguments: Any) -> str:
        result = run(*arguments, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    assert {"flickr8k", "shapes"} <= {line.split()[0] for line in succeed("train", "--list").splitlines()}
    sizes = ["--hidden_size", 16, "--embedding_size", 16, "--attention_size", 16, "--max_length", 9]
    succeed("train", "shapes", *sizes, "--max_images", 16, "--epochs", 1, "--output_dir", "out", "--tracking", "none")
    picture = tmp_path / "out" / "attention.png"
    succeed("caption", "out", picture, "--attention", "look", "--attention_format", "panels", "overlay", "gif", "html")
    assert len(list((tmp_path / "look").iterdir())) == 4
    succeed("evaluate", "out", "--max_images", 8)
    assert json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())["scores"]
    assert (tmp_path / "out" / "evaluation" / "report.html").stat().st_size > 10_000
    succeed("inspect", "shapes")
    succeed("export", "out", "onnx")
    succeed("push", "out", "me/captioner", "--license", "apache-2.0", "--output_dir", "published", "--image", picture)
    assert (tmp_path / "published" / "modeling_captioner.py").is_file()
