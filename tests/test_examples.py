"""The examples do what they say, started as their readers start them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def torchrun(example: str, num_ranks: int, *words: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    ended = subprocess.run([*command, EXAMPLES / example, *words], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_program_of_the_readme_runs():
    lines = sorted(torchrun("torchrun.py", 2).splitlines())
    assert lines == [
        "rank 0: positions 0..8191, out (1, 4, 4096, 64)",
        "rank 1: positions 2048..6143, out (1, 4, 4096, 64)",
    ]


@pytest.mark.parametrize(("model", "num_parameters"), [("gpt_oss", 37), ("deepseek_v3", 30)])
def test_a_hugging_face_model_over_a_ring_has_the_loss_and_gradients_of_one_process(model, num_parameters):
    said = torchrun("hugging_face.py", 3, model)
    loss, whole = map(float, re.search(r"loss ([\d.]+) over 3 ranks, ([\d.]+) in one process", said).groups())
    assert abs(loss - whole) <= 2e-6
    furthest = float(
        re.search(rf"gradients of {num_parameters} parameters differ by ([-\de.]+) at most", said).group(1)
    )
    assert furthest <= 1e-5  # relative, in float32, through two layers


def test_a_video_model_over_a_ring_makes_what_one_process_makes():
    said = torchrun("video.py", 4)
    found = re.search(r"\(1, 4, 5, 18, 14\) over 4 ranks, differs from one process by ([-\de.]+)", said)
    assert float(found.group(1)) <= 2e-6


def test_an_image_model_with_joint_attention_over_a_ring_makes_what_one_process_makes():
    said = torchrun("image.py", 3)
    found = re.search(r"\(1, 63, 16\) over 3 ranks, differs from one process by ([-\de.]+)", said)
    assert float(found.group(1)) <= 2e-6


def test_a_model_generates_over_a_spread_cache_what_it_does_in_one_process():
    said = torchrun("generate.py", 3)
    assert "48 of 48 tokens over 3 ranks are those of one process" in said
    found = re.search(r"keys kept \[341, 341, 342\], logits differ by ([-\de.]+) at most", said)
    assert float(found.group(1)) <= 1e-5  # relative; a ring of one differs as much


def test_a_decoder_over_replicas_rings_and_fsdp2_has_the_loss_and_gradients_of_one_process():
    said = torchrun("fsdp2.py", 4)
    losses = re.findall(r"loss ([\d.]+) over 2 x 2 ranks, ([\d.]+) in one process", said)
    furthest = re.findall(r"gradients of 18 parameters differ by ([-\de.]+) at most", said)
    assert len(losses) == len(furthest) == 2  # steps of the optimizer
    assert all(abs(float(loss) - float(whole)) <= 2e-6 for loss, whole in losses)
    assert all(float(found) <= 1e-5 for found in furthest)
