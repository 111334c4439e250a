"""benchmarks/gpu.py, tiny on the CPU: all its parts run once. And benchmarks/scale.py.

Also that benchmarks/ablation.py runs things in a fresh clone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import ablation, scale
from config import Config
from support import commit

ROOT = Path(__file__).parent.parent
TINY = (
    f"--audit {ROOT / 'examples' / 'household' / 'actor'} --limit 900 "
    "--model tiny --num_envs 2 4 --prompt 250 --response 4 --longest 2 --turns 4 --tokens 1024 2048"
).split()


def run_gpu(out, *words):
    """-> (its rows by part, what it printed)"""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "QWEN_TOKENIZER": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *TINY, "--out", str(out), *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, out.read_text().splitlines())
    return {row.pop("part"): row for row in rows}, done.stdout


# ---- gpu.py ------------------------------------------------------------------------------------


def test_every_part_reports(tmp_path):
    rows, printed = run_gpu(tmp_path / "rows.jsonl")
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    wanted = {"hae": 2, "generate": 6, "rollout": 5, "update": 3, "plan": 3}
    counts = {part: sum(name.startswith(part) for name in rows) for part in wanted}
    assert counts == wanted
    assert {"environment", "audit", "build", "log-probs", "all"} < set(rows)
    assert len(rows) == 24
    assert rows["audit"]["holds"]
    assert list(rows)[1] == "audit"
    assert rows["log-probs"]["holds"]
    assert rows["log-probs"]["generation"] < 0.05
    assert rows["hae, 4096 x 50"]["holds"]
    ours, lockstep = rows["rollout, 4 envs"], rows["rollout, 4 envs, lockstep"]
    assert ours["turns"] == 1 + 2 + 1 + 2
    assert rows["rollout, 2 envs, lockstep"]["turns"] == 1 + 2 + 1 + 2
    assert ours["rows a turn"] == 1 < lockstep["rows a turn"]
    assert 230 < rows["build"]["tokens a prompt"] < 270
    assert printed.splitlines()[-1].startswith("gpu: ")
    assert printed.endswith("x\n")
    assert all(name in printed for name in rows)


def test_what_fails_takes_nothing_else_with_it(tmp_path):
    rows, printed = run_gpu(tmp_path / "rows.jsonl", "--model", "none", "--audit", "nothing")
    succeeded = [name for name in rows if "failed" not in rows[name]]
    assert succeeded == ["environment", "hae, 128 x 50", "hae, 4096 x 50", "all"]
    assert rows["build"]["failed"] == "KeyError: 'none'"
    assert rows["audit"]["failed"] == "RuntimeError: benchmarks/audit.py did not end"
    assert rows["all"]["failed parts"] == 20
    assert printed.endswith("gpu: not measured\n")


# ---- scale.py ----------------------------------------------------------------------------------


def test_parts_are_read_from_measured_rows(tmp_path):
    """a + b rows is what two numbers of slots took; twice the parameters, twice the seconds."""
    rows = {
        "build": {"actor M": 1500, "tokens a prompt": 750},
        "generate, 64 envs": {"ms a step": 30.0, "ms prompts": 200.0},
        "generate, 128 envs": {"ms a step": 36.4, "ms prompts": 384.0},
        "generate, 128 envs, bf16 copy": {"ms a step": 1.0},
        "update": {"failed": "OutOfMemoryError"},
        "update, checkpointing": {"scored tokens/s": 9e4, "tokens/s": 3e4},
    }
    lines = [json.dumps({"part": part, **row}) + "\n" for part, row in rows.items()]
    (tmp_path / "rows").write_text("".join(lines))
    for times in (1, 2):
        sizes = SimpleNamespace(actor=1.5e9 * times)
        part = scale.measured_parts(tmp_path / "rows", sizes)
        wanted = [0.0236 * times, 1e-4 * times, 4e-6 * times]
        assert [part.a, part.b, part.c] == pytest.approx(wanted)
        assert [part.s, part.u] == pytest.approx([9e4 / times, 3e4 / times])


def iteration_cost(config, gpus, sharded):
    parts = scale.Parts(a=0.02, b=1e-4, c=1e-5, s=1e5, u=2e4)
    sizes = SimpleNamespace(actor=1.5e9, critic=1.5e9, heads=0)
    args = SimpleNamespace(
        episodes=128, turns=20.0, longest=50, prompt=750, response=40, world=0.004, cores=10
    )
    return scale.cost(parts, sizes, config, args, gpus, sharded)


# 2560 turns of 790 tokens in all; on 4 GPUs 640 turns each, in 31 micro-batches of 16384 tokens.
@pytest.mark.parametrize(
    "gpus, sharded, turns, exchange",
    [
        (1, False, 2560, 0),
        (4, False, 640, 2 * 0.75 * 4 * 3e9 * 10 / 3e11),
        (4, True, 640, 0.75 * (31 * (8 + 4) * 3e9 + 2 * 1.5e9) / 3e11),
    ],
)
def test_an_iteration_costs_its_equations(gpus, sharded, turns, exchange):
    wanted = {
        "rollout": 50 * 40 * 0.02 + turns * (40 * 1e-4 + 750 * 1e-5),
        "worlds": turns * 0.004 / 10,
        "score": 2 * turns * 790 / 1e5,  # actor, critic, reference, and the critic after KEEP
        "update": turns * 790 / 2e4,
        "exchange": exchange,
    }
    cost = iteration_cost(Config(), gpus, sharded)
    assert cost == pytest.approx(wanted)
    flat = iteration_cost(Config(method="ppo", epochs=2), gpus, sharded)
    assert flat["score"] == pytest.approx(1.5 * turns * 790 / 1e5)
    # Episodes that wait for a slot play after the others.
    waiting = iteration_cost(Config(num_envs=16), gpus, sharded)["rollout"]
    more = (128 / gpus / 16 - 1) * 20 * 40 * 0.02
    assert waiting - wanted["rollout"] == pytest.approx(more)


def test_scale_says_that_it_assumes(capsys):
    scale.main([])
    printed = capsys.readouterr().out
    assert printed.startswith("ASSUMED, not measured")
    assert "\nscale: " in printed


# ---- ablation.py -------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """Cells that ablation.py would run; they end at once, with made-up curves."""
    ran = []

    def train(method, prompt, seed, iterations, start, work):
        ran.append((method, prompt, seed))
        return made_up_line(method, prompt, seed, ablation.commit(), iterations)

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "make_clone", lambda prompt, seed, work: work)
    monkeypatch.setattr(ablation, "plot", lambda lines, path: None)
    monkeypatch.setattr(ablation, "commit", lambda: "this commit")
    return ran


def made_up_line(method, prompt, seed, commit, iterations=24):
    return {
        "method": method,
        "prompt": prompt,
        "seed": seed,
        "commit": commit,
        "config": {"iterations": iterations},
        "success_start": 0.5,
        "success_final": 0.9,
        "per_task_type": {"pick_and_place_simple": 0.9},
        "iterations_to_80": None,
        "seconds": 60.0,
        "curve": [0.5, 0.9],
    }


def test_ablation_runs_what_is_missing_and_leaves_the_committed_results(tmp_path, capsys, runs):
    before = ablation.OURS.read_bytes()
    ablation.main(["--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert sorted(runs) == sorted(ablation.QUICK)  # though all of them are among ours
    assert ablation.OURS.read_bytes() == before
    printed = capsys.readouterr().out
    assert "ours, in ablation.jsonl: commit 4a3df3f22e, 24 iterations" in printed
    assert printed.endswith("ablation: 1.00x\n")
    runs.clear()
    ablation.main(["--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert runs == []
    ablation.main(["--quick", "--jobs", "1", "--iterations", "2", "--out", str(tmp_path)])
    assert sorted(runs) == sorted(ablation.QUICK)
    assert "this commit: this commi, 24 iterations" in capsys.readouterr().out


def test_ablation_keeps_lines_of_other_commits_apart(tmp_path, capsys, runs):
    line = made_up_line("hiper", "plan-execute", 0, "another commit")
    (tmp_path / "ablation.jsonl").write_text(json.dumps(line) + "\n")
    ablation.main(["--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert ("hiper", "plan-execute", 0) in runs
    assert "another commit: another co" in capsys.readouterr().out
    mine = [line["commit"] for line in ablation.show(tmp_path, 24)]
    assert mine == ["this commit"] * 4


def test_lines_of_edited_code_are_not_the_commit_s(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "ROOT", tmp_path)
    assert ablation.commit() == "unknown"
    (tmp_path / "file").write_text("x")
    name = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init"], ["add", "."], [*name, "commit", "-m", "x"], ["tag", "v1"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    clean = ablation.commit()
    assert len(clean) == 40
    (tmp_path / "file").write_text("y")
    first = ablation.commit()
    assert first.startswith(f"{clean}-dirty-")
    assert first == ablation.commit()
    assert commit.short(first) == clean[:10] + first[40:]
    (tmp_path / "file").write_text("z")
    assert first != ablation.commit()


@pytest.mark.parametrize(
    "curve, iteration", [([0.8] * 3, 3), ([0.5, 0.95, 1.0, 0.6], 3), ([0.9, 0.9], None), ([], None)]
)
def test_the_first_iteration_at_a_level(curve, iteration):
    assert ablation.first_reached(curve, 0.8) == iteration
