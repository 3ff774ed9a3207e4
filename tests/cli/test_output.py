"""Output that cannot be written costs no work: a reader that went away, a full disk, a terminal without the signs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from gpt2lab.basics.output import lossy, lost

SCRIPT = """
import sys
from gpt2lab import cli
from gpt2lab.basics.output import console_for
from gpt2lab.basics.progress import display
from gpt2lab.basics.progress import Message

def work(arguments, debug, app):
    with display(console_for()) as listener:
        for number in range(20000):
            listener(Message(f"event {number} \\u2264"))
        print("printed \\u2264")
    open("done", "w").close()
    return 0

cli.execute = work
sys.argv = ["gpt2lab", *sys.argv[1:]]
cli.main()
"""


def run(folder: Path, word: str, out: int | IO[Any], **environment: str) -> tuple[int, str]:
    """A command that prints much and then leaves a file; (exit code, standard error)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, word], stdout=out, stderr=subprocess.PIPE, cwd=folder, timeout=60, check=False,
        env={**os.environ, **environment}, text=True,
    )  # fmt: skip
    assert (folder / "done").exists()
    return done.returncode, done.stderr


@pytest.mark.parametrize(("word", "code"), [("run", 0), ("components", 141)])
def test_a_command_goes_on_without_its_reader(tmp_path: Path, word: str, code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    assert run(tmp_path, word, write) == (code, "")
    os.close(write)


@pytest.mark.parametrize(
    "closed", ["2>&-", "<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "<&-"))]
)
def test_a_command_goes_on_without_its_standard_streams(tmp_path: Path, closed: str) -> None:
    opened = "import os; os.write(os.open('file', os.O_CREAT | os.O_WRONLY), b'kept'); os.system('echo printed')\n"
    script = SCRIPT.replace("    open(", f"    {opened}    open(")
    command = ["sh", "-c", f'exec "$0" -c "$1" run {closed}', sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, timeout=60, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "done").exists()
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("word", "code", "kind"), [("run", 0, "warning:"), ("components", 3, "error [ENVIRONMENT]")])
def test_a_command_goes_on_when_its_log_is_on_a_full_disk(tmp_path: Path, word: str, code: int, kind: str) -> None:
    with open("/dev/full", "w") as full:
        expected = f"gpt2lab: {kind} standard output: what was printed is lost: No space left on device\n"
        assert run(tmp_path, word, full) == (code, expected)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:surrogateescape"])  # the second as in the locale C
def test_a_terminal_without_a_sign_shows_another(tmp_path: Path, encoding: str) -> None:
    with (tmp_path / "out").open("wb") as out:
        assert run(tmp_path, "report", out, PYTHONIOENCODING=encoding) == (0, "")
    assert b"printed ?\n" in (tmp_path / "out").read_bytes()


def test_what_python_did_not_open_stays_as_it_is() -> None:
    stream = io.StringIO()
    assert lossy(stream) is stream and lost(stream) is None


def test_output_goes_on_when_there_is_space_again(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    with os.fdopen(write, "w") as file:
        stream = lossy(file)
        assert lossy(stream) is stream
        raw: Any = stream.buffer.raw  # type: ignore[attr-defined]
        raw.descriptor = os.open(tmp_path, os.O_RDONLY)  # cannot be written
        stream.write("lost")
        assert str(lost(stream)).endswith("Bad file descriptor")
        os.close(raw.descriptor)
        raw.descriptor = write
        stream.write("kept")
        stream.flush()
        assert os.read(read, 100) == b"kept"
    os.close(read)
