"""How the command lines end: `python -m pytest tests/test_console.py`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import PROJECT

pytestmark = pytest.mark.integration

SERIES = [sys.executable, "-m", "alpaca_helpers.series", "--profile", "pocket"]
SERIES += ["-p", "num_train_epochs", "1", "-p", "max_heldout_rows", "20"]
PROGRAM = """
import sys
from alpaca_helpers import AlpacaError
from alpaca_helpers.console import run_command

def main():
    print("facts 7 → 96 %", *sys.argv[2:])
    exec(sys.argv[1])

run_command(main)
"""


def program(body="", *, environment=None, shell="", **more):
    """A command line that prints an arrow and does `body`; `shell` stands after it."""
    command = f'exec "$0" -c "$1" "$2" {shell}'
    given = {"capture_output": True, "cwd": PROJECT, "env": os.environ | (environment or {}), "timeout": 60} | more
    return subprocess.run(["bash", "-c", command, sys.executable, PROGRAM, body], **given)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "cp932"])
def test_every_print_survives_any_encoding(encoding):
    done = program(environment={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.startswith(b"facts 7 ") and done.stdout.rstrip().endswith(b" 96 %")


def test_a_fault_is_its_sentence_and_ctrl_c_one_line():
    done = program("raise AlpacaError('The bread is burnt.')")
    assert (done.returncode, done.stderr) == (1, b"The bread is burnt.\n")
    done = program("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, b"\nInterrupted.\n")


def test_a_full_output_and_a_reader_that_has_gone():
    done = program(shell="> /dev/full")
    assert done.returncode == 1 and done.stderr == b"No space left on device: the output cannot be written.\n"
    read, write = os.pipe()
    os.close(read)
    done = program(capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""


def test_closed_streams_do_no_harm():
    assert program(shell="<&- >&- 2>&-").returncode == 0


def test_a_real_fault_keeps_its_traceback():
    done = program("1 / 0")
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr and b"Traceback" in done.stderr


def started(tmp_path: Path, until: str, **more) -> subprocess.Popen:
    """The series, at the point where it has printed `until`."""
    series = subprocess.Popen(
        [*SERIES, "--run", f"{tmp_path}/run"], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )
    for line in series.stdout:
        if until in line.decode():
            return series
    raise AssertionError(series.stderr.read())


def test_ctrl_c_in_the_series_is_one_line_and_the_run_goes_on(tmp_path):
    """A terminal sends the interrupt to the whole group: to the series and to the kernel that it has started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    series = started(tmp_path, "[2/4]", start_new_session=True)
    signal.signal(signal.SIGINT, before)
    time.sleep(4)
    os.killpg(series.pid, signal.SIGINT)
    out, err = series.communicate(timeout=60)
    assert series.returncode == 130
    said = [line for line in err.decode().splitlines() if line.strip() and "Executing:" not in line]
    assert said == ["Interrupted: what is done is kept, and the same command goes on from there."]
    again = subprocess.run([*SERIES, "--run", f"{tmp_path}/run"], cwd=PROJECT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "[1/4] 01_base_model: unchanged" in again.stdout and "[2/4] 02_dataset_and_tokenizer\n" in again.stdout


def test_a_series_whose_reader_goes_away_ends_without_a_traceback(tmp_path):
    series = started(tmp_path, "[1/4]")
    series.stdout.close()
    said = series.stderr.read().decode()
    series.wait(timeout=120)
    assert "Traceback" not in said and "Error" not in said
