"""The GPU benchmark on a machine without GPU: every line of it runs, and it tells what is wrong or missing."""

import sys
from pathlib import Path

import pytest
import torch

from ringspan.kernels import measured
from ringspan.kernels.reference import Reference
from ringspan.kernels.table import choose

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(measured.TABLE_VARIABLE, str(folder / "gpu.json"))
        report = gpu.main(["--device", "cpu", "--quick", "--out", str(folder / "report.txt"), "--write-table"])
    return report, folder


def test_every_section_is_measured_and_nothing_is_wrong(found):
    report, folder = found
    text = (folder / "report.txt").read_text()
    assert text == "\n".join(report.lines) + "\n"
    for title in ("forward:", "backward:", "rings of", "merge of", "peak memory", "targets", "versions ", "date "):
        assert title in text, title
    assert "Error" not in text and "WRONG" not in text and "out of time" not in text
    own = choose("auto", torch.bfloat16, torch.device("cpu"), 64).name
    for name in (f"own ({own})", "flash + merge", "auto, ring of 1", "torch flash", "ring of 4"):
        assert f" {name} " in text, name


def test_what_it_measured_is_what_auto_decides_by(found):
    _, folder = found
    rows = measured.read(folder / "gpu.json")
    assert {(m.head_dim, m.num_keys) for m in rows} == {(64, 96), (64, 160)}
    assert all(m.tflops.keys() == {measured.OWN, "flash"} and m.dtype == "bfloat16" for m in rows)


def test_a_wrong_kernel_is_told_and_not_timed(capsys):
    class Wrong(Reference):
        name = "wrong"

        def absorb(self, state, q, k, v, visible, scale):
            super().absorb(state, q, k, v.roll(1, -1), visible, scale)

    size = gpu.Size((96,), (64,), 2, 2, 64)
    device = gpu.Device("cpu", Wrong(), (), {})
    report = gpu.Report(float("inf"))
    gpu.forward(device, size, 1.0, report)
    (line,) = (line for line in report.lines if "own (wrong)" in line and "full" in line)
    assert "WRONG: relative error" in line and "TFLOP" not in line
    assert "own (wrong)" not in " ".join(report.figures)


def test_a_way_that_cannot_run_is_a_row_and_not_the_end():
    def broken() -> None:
        raise RuntimeError("no such engine\nand more")

    times = gpu.timed(gpu.cpu(), {"broken": broken, "good": lambda: None}, gpu.QUICK)
    assert times["broken"] == "RuntimeError: no such engine"
    assert isinstance(times["good"], dict) and times["good"]["median"] < 1


def test_what_begins_after_the_deadline_is_left_out_and_told():
    report = gpu.Report(deadline=0.0)
    gpu.forward(gpu.cpu(), gpu.QUICK, 1.0, report)
    assert [line for line in report.lines if line][1].endswith("not measured: out of time")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_how_to_run_it_without_one(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --quick" in capsys.readouterr().err
