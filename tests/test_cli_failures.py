import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import LIMIT_S, CommandLine, command, write_input
from safetensors.torch import load_file, save_file

from ringspan.commands import attend as attend_module
from ringspan.commands import finish
from ringspan.commands.asked import Asked, Exit
from ringspan.commands.job import plan
from ringspan.commands.source import RandomSource
from ringspan.commands.workers import run_local_processes


@pytest.fixture
def ringspan(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def file(tmp_path) -> Path:
    return write_input(tmp_path / "in.safetensors")


def changed(**tensors):
    def change(path):
        save_file({name: x for name, x in (load_file(path) | tensors).items() if x is not None}, path)

    return change


FILES = {
    "INPUT cannot be read": lambda path: path.unlink(),
    "Is a directory": lambda path: (path.unlink(), path.mkdir()),
    "INPUT is not a whole safetensors file": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "header": lambda path: path.write_text("not one at all"),
    "INPUT lacks the tensor k and v": changed(k=None, v=None),
    "holds q": changed(k=None, v=None),
    r"k and v must have one shape .*got  k: \[2, 2, 61, 8\], v: \[2, 2, 60, 8\]": changed(v=torch.zeros(2, 2, 60, 8)),
    "q must have 4 dimensions": changed(q=torch.zeros(4, 61, 8)),
    "k is BF16": changed(k=torch.zeros(2, 2, 61, 8, dtype=torch.bfloat16)),
    "v is I64": changed(v=torch.zeros(2, 2, 61, 8, dtype=torch.int64)),
    "q and k must have one head_dim": changed(q=torch.zeros(2, 4, 61, 16)),
    "must be a multiple of the number of key/value heads": changed(q=torch.zeros(2, 3, 61, 8)),
    "q of INPUT is empty": changed(q=torch.zeros(2, 4, 0, 8)),
}


@pytest.mark.parametrize("message", FILES)
def test_a_bad_file_is_named_and_nothing_is_written(tmp_path, file, ringspan, message):
    FILES[message](file)
    ended = ringspan("attend", file, "--out", tmp_path / "out.safetensors")
    assert ended.status == 2 and "Traceback" not in ended.err and ended.out == ""
    assert str(file) in ended.err and re.search(message, ended.err.replace("\n", ""))
    assert not [path for path in tmp_path.iterdir() if path != file]


OPTIONS = {
    "--window 3": "--window takes two whole numbers",
    "--window -2,0": "window_size must be at least -1",
    "--documents 0,x": "--documents takes the boundaries",
    "--documents 0,50": "cu_seqlens must end at the number of tokens",
    "--documents 5,61": "cu_seqlens must begin with 0",
    "--layout round": "layout is unknown",
    "--kernel fast": "kernel is unknown",
    "--transport mpi": "--transport is unknown",
    "--scale inf": "softmax_scale must be finite",
    "--tokens 8": "give INPUT, or --tokens",
    "--workers 0": "--workers",
    "--compare --window 3,0": "knows no mask but causal",
    "--out /no/such/folder/out.safetensors": "--out cannot be written",
    "--out .": "it is a folder",
    "--out in.safetensors": "--out is INPUT itself",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_a_bad_option_is_named_and_nothing_is_computed_or_written(tmp_path, file, ringspan, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    before = file.read_bytes()
    ended = ringspan("attend", file, *words.split())
    assert ended.status == 2 and OPTIONS[words] in ended.err and "Traceback" not in ended.err
    assert ended.out == "" and "step" not in ended.err
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give INPUT, or --tokens"),
        ("--tokens 8 --heads 3 --kv-heads 2", "--heads must be a multiple"),
        ("--tokens 8 --dtype int8", "--dtype is unknown"),
    ],
)
def test_bad_random_input_is_refused(ringspan, words, message):
    ended = ringspan("attend", *words.split())
    assert ended.status == 2 and message in ended.err


def test_a_mask_without_meaning_for_unequal_lengths_is_refused(tmp_path, ringspan):
    ended = ringspan("attend", write_input(tmp_path / "in.safetensors", 10, 20), "--causal", "--workers", 3)
    assert ended.status == 2 and "q: 10 tokens, k: 20 tokens over 3 ranks" in ended.err


def test_a_result_beyond_the_bound_ends_with_1_and_is_not_written(tmp_path, file, ringspan, monkeypatch):
    exact = attend_module.ring_attention

    def slightly_wrong(*tensors, **options):
        result = exact(*tensors, **options)
        return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result

    monkeypatch.setattr(attend_module, "ring_attention", slightly_wrong)
    ended = ringspan("attend", file, "--transport", "local", "--out", tmp_path / "out.safetensors")
    assert ended.status == 1 and "✗ 1.0e-03" in ended.out and re.search(r"written +│ nothing", ended.out)
    assert list(tmp_path.iterdir()) == [file]


def test_a_thread_that_raises_ends_the_job_with_3(tmp_path, file, ringspan, monkeypatch):
    def out_of_luck(*tensors, **options):
        raise OverflowError("out of luck")

    monkeypatch.setattr(attend_module, "ring_attention", out_of_luck)
    ended = ringspan("attend", file, "--transport", "local", "--out", tmp_path / "out.safetensors")
    assert ended.status == 3 and "OverflowError: out of luck" in ended.err and "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_told_and_leaves_no_part_behind(tmp_path, file, ringspan, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "save_file", full)
    ended = ringspan("attend", file, "--transport", "local", "--out", tmp_path / "out.safetensors")
    assert ended.status == 2 and "No space left on device" in ended.err
    assert list(tmp_path.iterdir()) == [file]


class Unreadable(RandomSource):
    def take(self, name, ranges):
        if ranges[0].start == 1:  # the second worker of a striped layout
            raise OverflowError("a cable fell out")
        return super().take(name, ranges)


def test_a_process_that_raises_is_named_and_the_others_end(tmp_path, capsys):
    source = Unreadable(60, 2, 2, 8, torch.float32, 0)
    job = plan(source, Asked(layout="striped"), 3, True, tmp_path / "out.safetensors")
    begin = time.monotonic()
    assert run_local_processes(job) == Exit.FAILED
    assert time.monotonic() - begin < LIMIT_S / 2
    told = capsys.readouterr().err
    assert "worker 1 of 3 failed" in told and "OverflowError: a cable fell out" in told
    assert not list(tmp_path.iterdir())


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(word) for word in found.stdout.split()]
    return [*children, *(grandchild for child in children for grandchild in _children(child))]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _busy_job(tmp_path) -> tuple[subprocess.Popen, list[int]]:
    """A job that would take minutes, once its ring is turning, and the processes that it started."""
    words = ("attend", "--tokens", "12000", "--kernel", "reference", "--workers", "2", "--out", tmp_path / "out")
    line = [sys.executable, "-m", "ringspan", *map(str, words)]
    job = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert "step 1 of 2 of worker 0" in job.stderr.readline()
    return job, _children(job.pid)


def _none_left(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(_alive, pids))


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@needs_proc
def test_a_killed_process_is_told_and_the_others_end(tmp_path):
    job, pids = _busy_job(tmp_path)
    os.kill(max(pids), signal.SIGKILL)  # the worker that was started last
    _, told = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 3 and "was ended by SIGKILL" in told and "Traceback" not in told
    assert _none_left(pids) and not list(tmp_path.iterdir())


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_command(tmp_path, number):
    job, pids = _busy_job(tmp_path)
    os.kill(job.pid, number)
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == (130 if number == signal.SIGINT else -number)
    assert _none_left(pids) and not list(tmp_path.iterdir())


def test_the_library_loads_no_extra_and_the_command_without_it_says_what_to_install():
    code = (
        "import sys, ringspan; print([name for name in ('typer', 'rich', 'safetensors') if name in sys.modules]);"
        "sys.modules['typer'] = None; from ringspan.cli import main; main()"
    )
    ended = command(program=("-c", code))
    assert ended.status == 2 and ended.out == "[]\n"
    assert ended.err == "ringspan: the command line needs typer; pip install rich safetensors typer\n"


def test_version_and_help_are_for_people(ringspan):
    ended = ringspan("--version")
    assert ended.status == 0 and re.fullmatch(r"ringspan \d+\.\d+\.\d+\n", ended.out)
    for words in ((), ("attend",), ("schedule",), ("doctor",)):
        ended = ringspan(*words, "--help")
        assert ended.status == 0 and "Usage" in ended.out
