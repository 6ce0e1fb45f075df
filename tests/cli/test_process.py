"""How a command's process handles streams and signals: one line, an exit status, no traceback.

A function replaces the sub-commands, so a process starts in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = """
import sys
import typer
from milora_cli import main
from milora_cli.__main__ import main as entry

main.app = typer.Typer()
main.app.callback()(lambda: None)

@main.app.command()
def command():
    {body}

sys.exit(entry())
"""


def line_of(body: str) -> list[str]:
    return [sys.executable, "-c", COMMAND.format(body=body), "command"]


def in_shell(body: str, redirections: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *line_of(body)],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("text", ["short", "long"])
@pytest.mark.parametrize(
    ("redirections", "said"),
    [("> /dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
def test_a_standard_output_that_takes_nothing_is_one_line_and_status_2(redirections: str, said: str, text: str) -> None:
    done = in_shell(f"print('x' * {1 if text == 'short' else 100_000})", redirections)
    assert done.returncode == 2
    assert done.stderr.decode() == f"milora: standard output: {said}\n"


def test_a_full_disk_in_a_library_s_words_is_one_line() -> None:
    done = in_shell("raise ValueError('I/O error: No space left on device (os error 28)')", "")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"milora: No space left on a disk; free some space: I/O error")
    assert b"Traceback" in in_shell("raise ValueError('other')", "").stderr


def test_a_mistake_has_the_last_line_also_after_progress_bars() -> None:
    body = """from tqdm import tqdm
    from milora_core.errors import MiLoraError
    outer, inner = tqdm(total=2), tqdm(total=2, leave=False)
    outer.update()
    raise MiLoraError('wrong')"""
    done = in_shell(body, "")
    assert done.returncode == 2
    assert done.stderr.decode().endswith("\nmilora: wrong\n")


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reader_that_leaves_ends_the_command_in_silence(size: int) -> None:
    reader = "| { read -N 1; exec <&-; sleep 1; }; exit ${PIPESTATUS[0]}"
    done = in_shell(f"print('x' * {size}, flush=True); import time; time.sleep(0.5); print('x' * {size})", reader)
    assert done.stderr == b""
    assert done.returncode == 141


def test_files_never_take_the_place_of_closed_streams(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    body = f"file = open({str(path)!r}, 'w'); print('a message', file=sys.stderr); sys.stderr.flush(); file.close()"
    assert in_shell(body, "<&- 2>&-").returncode == 0
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "utf-8"),
        ({"PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
        ({"PYTHONUTF8": "1"}, "utf-8"),
    ],
)
def test_any_text_can_be_printed_in_any_locale(environment: dict[str, str], encoding: str) -> None:
    text = "caf\u00e9 \u25cf \ud800"
    done = in_shell(f"print({text!a})", "", **environment)
    assert (done.stdout.decode(encoding), done.stderr) == (
        text.encode(encoding, "backslashreplace").decode(encoding) + "\n",
        b"",
    )
    body = f"""from milora_cli.output import json_only
    with json_only(True) as print_result: print_result(dict(text={text!a}))"""
    assert json.loads(in_shell(body, "", **environment).stdout.decode(encoding)) == {"text": text}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("moment", ["import", "work"])
def test_a_signal_is_one_line_and_its_status(number: signal.Signals, said: str, moment: str, tmp_path: Path) -> None:
    here, undone = tmp_path / "here", tmp_path / "undone"
    (tmp_path / "swallows.py").write_text(
        f"import time\ntry:\n    open({str(here)!r}, 'w').close()\n    time.sleep(30)\nexcept:\n    time.sleep(30)\n"
    )
    working = f"""import time
    try:
        open({str(here)!r}, 'w').close()
        time.sleep(30)
    finally:
        open({str(undone)!r}, 'w').close()"""
    process = subprocess.Popen(
        line_of("import swallows" if moment == "import" else working),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(here)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stderr.decode() == f"milora: {said}\n"
    assert process.returncode == 128 + number
    assert undone.exists() == (moment == "work")


def test_an_ignored_signal_stays_ignored_and_a_forked_worker_keeps_the_default() -> None:
    body = """import os, signal, time
    os.kill(os.getpid(), signal.SIGINT)
    here, told = os.pipe()
    worker = os.fork()
    if not worker: os.write(told, b"x")
    while not worker: time.sleep(0.01)
    os.read(here, 1)
    os.kill(worker, signal.SIGTERM)
    print(os.waitpid(worker, 0)[1])"""
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    done = subprocess.run(line_of(body), capture_output=True, check=False, timeout=60, **ignoring)
    assert (done.stdout, done.stderr, done.returncode) == (b"15\n", b"", 0)
