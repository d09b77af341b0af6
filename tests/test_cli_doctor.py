import re

import pytest
import torch
from command_line import CommandLine

from ringspan.commands import doctor
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
    assert re.search(r"✓ a ring of 3 threads over 301 tokens.*error \d\.\de-\d+", ended.out)
    assert all(len(line) <= 100 for line in ended.out.splitlines())


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
