import re

import pytest
import torch
from command_line import CommandLine

from ringspan import _native
from ringspan.commands import doctor, report
from ringspan.kernels import measured
from ringspan.kernels import table as kernel_table
from ringspan.kernels.reference import Reference


@pytest.fixture
def ringspan(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_doctor_tells_versions_kernels_transports_and_tries_a_ring(ringspan):
    ended = ringspan("doctor")
    assert ended.status == 0 and ended.err == ""
    assert f"torch {torch.__version__}" in ended.out and "Python 3." in ended.out and "GiB" in ended.out
    for kernel in kernel_table.KERNELS:
        assert re.search(rf"^ *{kernel.name} +[✓✗] +[✓✗]", ended.out, re.MULTILINE)
    assert re.search(r"local +✓", ended.out) and re.search(r"shared_memory +✓", ended.out)
    assert re.search(r"torch_dist +gloo +✓", ended.out)
    assert re.search(r"peer_memory +[✓✗] +processes of one host, tensors on NVIDIA GPUs", ended.out)
    assert re.search(r"✓ a ring of 3 threads over 301 tokens.*error \d\.\de-\d+", ended.out)
    assert all(len(line) <= 100 for line in ended.out.splitlines())
    assert re.search(rf"native kernel +{_native.info()['isa']} ", ended.out)


def test_a_narrow_terminal_gets_every_word_of_doctor(ringspan, monkeypatch):
    monkeypatch.setattr(report, "_WIDTH", 60)
    out = ringspan("doctor").out
    assert all(len(line) <= 60 for line in out.splitlines()) and "…" not in out
    assert re.search(r"^  native_rounded: it is for bfloat16", out, re.MULTILINE)
    told = " ".join(out.split())
    assert "local: threads of one process" in told and "float64, or head_dim > 256: always" in told


def test_doctor_shows_why_a_kernel_declines(ringspan, monkeypatch):
    class Fussy(Reference):
        name = "fussy"

        def declines(self, dtype, device, head_dim):
            return None if dtype == torch.float32 else f"it does not take {dtype}"

    monkeypatch.setattr(doctor, "KERNELS", (*kernel_table.KERNELS, Fussy()))
    ended = ringspan("doctor")
    assert re.search(r"fussy +✓ +✗ +✗ +it does not take torch.bfloat16", ended.out)


def test_doctor_ends_with_1_if_the_ring_is_wrong(ringspan, monkeypatch):
    monkeypatch.setattr(doctor.ringspan, "ring_attention", lambda q, k, v, **options: q)
    ended = ringspan("doctor")
    assert ended.status == 1 and "✗ a ring of 3 threads" in ended.out


def test_a_package_that_is_not_installed_is_told(monkeypatch):
    assert doctor._version("no-such-package-anywhere") == "(not installed)"


def test_doctor_tells_what_gpus_would_use_and_by_what(ringspan, monkeypatch, tmp_path):
    monkeypatch.setenv(measured.TABLE_VARIABLE, str(tmp_path / "gpu.json"))
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    told = " ".join(ringspan("doctor").out.split())
    assert "none is here; by compute capability" in told or "NVIDIA GPUs (here)" in told
    assert "float64, or head_dim > 256 reference always" in told
    assert "an estimate, until" in told
    rows = [measured.Measurement((9, 0), "bfloat16", dim, 4096, {"triton": 2.0, "cudnn": 1.0}) for dim in (64, 128)]
    measured.write(measured.table_path(), rows)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    told = " ".join(ringspan("doctor").out.split())
    assert re.search(r"bfloat16 on 9.0, d 64 / 128 triton / triton .*measured: ", told)
    assert "10.0" not in told


def test_doctor_tells_that_without_triton_gpus_have_the_definition_only(ringspan, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    told = " ".join(ringspan("doctor").out.split())
    assert "all others reference triton is not installed, the definition serves, slowly" in told
