"""benchmarks/horizon.py: what it runs and in which order, and its tables."""

import dataclasses
import json
import math
from collections import Counter

import pytest

from benchmarks import ablation, horizon, tuning
from config import Config
from conftest import tiny_config


def line_of(method, point, seed, final=0.5, commit="this commit", iterations=10):
    return {
        "method": method,
        "prompt": "plan-execute",
        "chain": point[0],
        "routine": point[1],
        "seed": seed,
        "commit": commit,
        "config": {"iterations": iterations},
        "success_start": 0.25,
        "success_final": final,
        "iterations_to_80": None,
        "curve": [0.2, 0.4],
    }


@pytest.fixture
def runs(monkeypatch):
    """Calls of train.py and of the cloning that horizon.py would make; they end at once."""
    made = {"clones": [], "runs": []}

    def clone(folder, **flags):
        made["clones"].append((folder.name, flags))
        return folder / "start"

    def run_training(flags, out, start):
        made["runs"].append((flags, start))
        return line_of(flags["method"], (0, 0), flags["seed"], iterations=flags["iterations"])

    monkeypatch.setattr(horizon, "clone", clone)
    monkeypatch.setattr(horizon, "run_training", run_training)
    monkeypatch.setattr(horizon, "plot", lambda lines, path: None)
    for module in (horizon, ablation):
        monkeypatch.setattr(module, "commit", lambda: "this commit")
    return made


def test_the_most_informative_cells_come_first():
    cells = horizon.cells(2)
    first = [("hiper", (4, 0), 0), ("ppo", (4, 0), 0), ("hiper", (1, 0), 0), ("ppo", (1, 0), 0)]
    assert cells[:4] == first
    assert {method for method, _, _ in cells[:16]} == {"hiper", "ppo"}
    assert len(cells) == len(set(cells)) == 2 * len(horizon.METHODS) * len(horizon.POINTS)
    counts = Counter(method for method, point, _ in horizon.cells(9) if point == (4, 0))
    assert counts.pop("hiper") == counts.pop("ppo") == 8
    assert set(counts) == set(horizon.METHODS[2:]) and set(counts.values()) == {4}


def test_the_paper_s_settings_are_a_method_of_their_own(tmp_path, runs):
    line = horizon.run_cell(("hiper-paper", (4, 0), 0), 10, tmp_path, tmp_path)
    [(flags, _)] = runs["runs"]
    assert line["method"] == "hiper-paper" and flags["method"] == "hiper"
    paper = Config()  # its defaults are the paper's
    for name in ("lam_low", "lam_high", "normalize"):
        assert flags[name] == getattr(paper, name)


def test_all_methods_of_a_point_and_seed_share_a_clone_and_play_equally_many_episodes(
    tmp_path, capsys, runs
):
    horizon.main(["--seeds", "1", "--out", str(tmp_path)])
    assert len(runs["runs"]) == len(horizon.cells(1))
    shared = {}
    for flags, start in runs["runs"]:
        settings = tuple(value for name, value in flags.items() if name not in horizon.PAPER)
        assert shared.setdefault(start, settings) == settings
    assert len(shared) == len(horizon.POINTS)
    assert all(flags == dict(runs["clones"])[name] for name, flags in runs["clones"])


def test_runs_that_are_done_are_not_run_again(tmp_path, capsys, runs):
    ours = horizon.OURS.read_bytes() if horizon.OURS.exists() else b""
    done = [line_of("hiper", (4, 0), 0), line_of("ppo", (4, 0), 0, commit="another commit")]
    text = "".join(json.dumps(line) + "\n" for line in done)
    (tmp_path / "horizon.jsonl").write_text(text)
    horizon.main(["--seeds", "1", "--out", str(tmp_path)])
    assert len(runs["runs"]) == len(horizon.cells(1)) - 1
    assert "another commit: another co, 10 iterations" in capsys.readouterr().out
    assert (horizon.OURS.read_bytes() if horizon.OURS.exists() else b"") == ours


def test_other_iterations_are_other_runs_with_a_table_of_their_own(tmp_path, capsys, runs):
    lines = [line_of(method, (4, 0), 0) for method in ("hiper", "ppo")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "horizon.jsonl").write_text(text)
    horizon.main(["--seeds", "1", "--iterations", "20", "--out", str(tmp_path)])
    assert len(runs["runs"]) == len(horizon.cells(1))
    said = capsys.readouterr().out
    assert "this commit: this commi, 10 iterations" in said
    assert "this commit: this commi, 20 iterations" in said
    assert [line["config"]["iterations"] for line in horizon.show(tmp_path, 10)] == [10, 10]


def test_the_table_counts_seeds_and_pairs(capsys):
    lines = [line_of("hiper", (4, 0), seed, final=0.5 + seed / 10) for seed in range(3)]
    lines += [line_of("ppo", (4, 0), seed, final=0.4) for seed in range(1, 3)]
    assert horizon.differences(lines, (4, 0), "ppo") == [
        (pytest.approx(20), 0),
        (pytest.approx(30), 0),
    ]
    horizon.show_table("title", lines)
    said = capsys.readouterr().out
    assert "hiper minus ppo, chain 4, routine 0, 2 pairs: final 25.0 [20.0, 30.0]" in said
    [row] = [row for row in said.splitlines() if row.split()[:4] == ["4", "0", "hiper", "3"]]
    assert "60.0 [50.0, 70.0]" in row and " 50.0  30.0" in row and row.endswith("-, -, -")


def test_one_seed_has_no_interval():
    assert math.isnan(horizon.interval([50.0])[0])
    assert horizon.summary([50.0]) == "50.0"


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [line_of("hiper", (chain, 0), seed) for chain in (1, 4) for seed in range(2)]
    horizon.plot(lines, tmp_path / "horizon.png")
    assert (tmp_path / "horizon.png").stat().st_size > 10_000


def test_tuning_changes_one_value_at_a_time_and_equally_often_for_both_methods(
    monkeypatch, tmp_path, capsys
):
    made = []

    def run_training(flags, out, start):
        assert start == (start.parent / "start")
        made.append((out, flags))
        return {**line_of(flags["method"], (1, 0), flags["seed"]), "commit": "this commit"}

    monkeypatch.setattr(tuning, "make_clone", lambda cell, work: work / f"{cell[2]}" / "start")
    monkeypatch.setattr(tuning, "run_training", run_training)
    monkeypatch.setattr(tuning, "commit", lambda: "this commit")
    assert tuning.run_all(2, tmp_path) == []
    assert tuning.run_all(2, tmp_path) == []  # nothing is run again
    assert len(made) == len({out for out, _ in made}) == 28
    assert Counter((flags["method"], flags["seed"]) for _, flags in made) == {
        (method, seed): 7 for method in ("hiper", "ppo") for seed in (8, 9)
    }
    shared = {*horizon.shared_flags(("ppo", (1, 0), 8)), "method", "episodes", "iterations"}
    for _, flags in made:
        defaults = dataclasses.asdict(tiny_config(method=flags["method"]))
        changed = flags.keys() - shared
        assert all(flags[name] != defaults[name] for name in changed)
        assert len(changed) <= 1 or changed == {"lam_low", "lam_high"}
    capsys.readouterr()
    tuning.show_table("title", [json.loads(line) for line in open(tmp_path / "tuning.jsonl")])
    _, title, *table = capsys.readouterr().out.splitlines()
    assert title == "title"
    assert len(table) == 15
    assert table[1].split()[-4:] == ["30.0,", "30.0", "50.0,", "50.0"]
