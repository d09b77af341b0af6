import re
from xml.etree import ElementTree

import pytest
from command_line import CommandLine

from ringspan.commands.asked import Asked
from ringspan.commands.schedule import scene
from ringspan.layout import LAYOUTS
from ringspan.schedule.check import visible_pairs


@pytest.fixture
def ringspan(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def rows(picture: str) -> list[str]:
    """The lines of the table, a rank each."""
    return [line for line in picture.splitlines() if re.match(r" +\d+ +[░▒▓█·]", line)]


def test_the_picture_shows_each_ranks_shards_hops_and_loads(ringspan):
    ended = ringspan("schedule", "--workers", 4, "--layout", "zigzag", "--causal")
    assert ended.status == 0 and ended.err == ""
    assert [" ".join(line.split()) for line in rows(ended.out)] == [
        "0 ▒▒▒ 0 →1 ▒▒▒ 3 →1 ▒▒▒ 2 →1 ▒▒▒ 1 33.6M 1.00 3",
        "1 ▒▒▒ 1 →2 ▒▒▒ 0 →2 ▒▒▒ 3 →2 ▒▒▒ 2 33.6M 1.00 3",
        "2 ▒▒▒ 2 →3 ▒▒▒ 1 →3 ▒▒▒ 0 →3 ▒▒▒ 3 33.6M 1.00 3",
        "3 ▒▒▒ 3 →0 ▒▒▒ 2 →0 ▒▒▒ 1 →0 ▒▒▒ 0 33.6M 1.00 3",
    ]
    assert "134.2M visible pairs a head in 16 tiles; the busiest rank has 1.00 of the mean" in ended.out
    assert "12 hops" in ended.out and all(len(line) <= 100 for line in ended.out.splitlines())


def test_contiguous_causal_shows_idle_ranks_and_a_poor_balance(ringspan):
    ended = ringspan("schedule", "--causal", "--tokens", 4000)
    shown = [" ".join(line.split()) for line in rows(ended.out)]
    assert shown[0] == "0 ▒▒▒ 0 →1 · · · 500.5k 0.25 1"
    assert shown[3].startswith("3 ▒▒▒ 3 ███ 2 ███ 1 ███ 0 ")
    assert "the busiest rank has 1.75 of the mean" in ended.out


def test_a_shard_that_skips_ranks_is_shown_to_come_from_its_owner(ringspan):
    ended = ringspan("schedule", "--documents", "0,1000,9000,12000")
    assert "12,000 tokens" in ended.out and re.search(r"█ 1 +2→0", rows(ended.out)[2])


@pytest.mark.parametrize(("workers", "steps"), [(8, "0→1"), (12, "█0"), (64, "steps 0 to 63")])
def test_many_workers_are_shown_in_less_detail(ringspan, workers, steps):
    ended = ringspan("schedule", "--workers", workers, "--causal")
    assert len(rows(ended.out)) == workers and steps in ended.out and "…" not in ended.out
    assert all(len(line) <= 100 for line in ended.out.splitlines())


def test_the_backward_tells_the_bytes_of_both_forms_and_which_is_taken(ringspan):
    ended = ringspan("schedule", "--backward", "keys", "--causal", "--layout", "zigzag")
    assert ended.status == 0 and "⇢home" in ended.out and "⇠" in ended.out
    assert re.search(r"keys travel: 48\.0 MiB .*\(k, v, dk, dv\)\n", ended.out)
    assert re.search(r"queries travel: 32\.2 MiB .*what the library takes", ended.out)
    ended = ringspan("schedule", "--backward", "queries", "--kv-heads", 1)
    assert "queries travel, with their gradients" in ended.out and all(len(x) <= 100 for x in ended.out.splitlines())
    assert re.search(r"keys travel: 6\.0 MiB .*what the library takes", ended.out)


def test_one_of_a_thing_and_few_bytes_are_told_as_such(ringspan):
    ended = ringspan("schedule", "--workers", 1)
    assert "1 worker:" in ended.out and "in 1 tile;" in ended.out
    ended = ringspan("schedule", "--workers", 2, "--causal", "--tokens", 16, "--head-dim", 8)
    assert "1 hop of one K/V shard of 2.0 KiB, 2.0 KiB in all" in ended.out


def test_a_rank_that_only_passes_on_is_not_taken_for_an_idle_one(ringspan):
    told = "blank: nothing to compute"
    assert told in ringspan("schedule", "--workers", 16, "--window", "1024,0", "--backward", "queries").out
    assert told not in ringspan("schedule", "--causal").out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backward", [None, "keys", "queries"])
def test_the_scene_counts_every_visible_pair(layout, backward):
    for asked in (Asked(causal=True, layout=layout), Asked(window_size=(7, 2), layout=layout), Asked(layout=layout)):
        shown = scene(asked, 5, 43, backward)
        total = sum(map(shown.pairs, range(5)))
        assert total == visible_pairs(asked.mask(43, 43)).sum()
        assert 1 <= shown.busiest_load <= 5 and all(0 <= cell.share <= 1 for cell in shown.cells.values())


@pytest.mark.parametrize("words", ["--causal", "--layout zigzag --backward queries", "--workers 33", "--workers 1"])
def test_the_drawing_is_well_formed_and_labelled(tmp_path, ringspan, words):
    path = tmp_path / "schedule.svg"
    ended = ringspan("schedule", *words.split(), "--svg", path)
    assert ended.status == 0 and str(path) in ended.out
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words_drawn = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "rank 0" in words_drawn and "visible pairs a head" in words_drawn
    width, height = (float(root.get(name)) for name in ("width", "height"))
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(box.get(name)) for name in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--backward both", "--backward is unknown"),
        ("--svg /no/such/folder/x.svg", "--svg cannot be written"),
        ("--layout round", "layout is unknown"),
        ("--documents 0", "cu_seqlens must begin with 0"),
        ("--documents 0,10 --tokens 20", "cu_seqlens must end at"),
        ("--heads 3 --kv-heads 2", "--heads must be a multiple"),
    ],
)
def test_bad_options_of_schedule_are_named(ringspan, words, message):
    ended = ringspan("schedule", *words.split())
    assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err
