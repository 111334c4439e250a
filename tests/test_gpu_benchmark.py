"""benchmarks/gpu.py, tiny and on the CPU: all that a GPU will be asked has been asked once. And benchmarks/scale.py, on made-up answers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import scale
from config import Config

ROOT = Path(__file__).parent.parent
TINY = "--model tiny --slots 2 4 --prompt 250 --response 4 --longest 2 --turns 4 --tokens 1024 2048".split()


def run(out, *words):
    """-> (its rows by part, what it printed)"""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *TINY, "--out", str(out), *words],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "QWEN_TOKENIZER": "",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {
        row.pop("part"): row for row in map(json.loads, out.read_text().splitlines())
    }, done.stdout


def test_every_part_reports(tmp_path):
    rows, said = run(tmp_path / "rows.jsonl")
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    assert [
        sum(name.startswith(part) for name in rows)
        for part in ("hae", "generate", "rollout", "update", "plan")
    ] == [2, 6, 5, 3, 3]
    assert {"environment", "build", "attention", "log-probs", "all"} < set(rows) and len(rows) == 24
    assert (
        rows["log-probs"]["holds"]
        and rows["log-probs"]["generation"] < 0.05
        and rows["hae, 4096 x 50"]["holds"]
    )
    assert (
        rows["rollout, 4 slots"]["turns"]
        == rows["rollout, 2 slots, lockstep"]["turns"]
        == 1 + 2 + 1 + 2
    )
    assert (
        rows["rollout, 4 slots"]["rows a turn"]
        == 1
        < rows["rollout, 4 slots, lockstep"]["rows a turn"]
    )
    assert (
        230 < rows["build"]["tokens a prompt"] < 270
        and said.splitlines()[-1].startswith("gpu: ")
        and said.endswith("x\n")
    )
    assert all(name in said for name in rows)


def test_what_fails_takes_nothing_else_with_it(tmp_path):
    rows, said = run(tmp_path / "rows.jsonl", "--model", "none")
    assert [name for name in rows if "failed" not in rows[name]] == [
        "environment",
        "hae, 128 x 50",
        "hae, 4096 x 50",
        "all",
    ]
    assert (
        rows["build"]["failed"] == "KeyError: 'none'"
        and rows["all"]["failed parts"] == 20
        and said.endswith("gpu: not measured\n")
    )


def test_parts_are_read_from_measured_rows(tmp_path):
    """a + b rows is what two numbers of slots took; twice the parameters, twice the seconds."""
    rows = {
        "build": {"actor M": 1500, "tokens a prompt": 750},
        "generate, 64 slots": {"ms a step": 30.0, "ms prompts": 200.0},
        "generate, 128 slots": {"ms a step": 36.4, "ms prompts": 384.0},
        "generate, 128 slots, bf16 copy": {"ms a step": 1.0},
        "update": {"scored tokens/s": 9e4, "tokens/s": 4e4},
        "update, checkpointing": {"tokens/s": 3e4},
    }
    (tmp_path / "rows").write_text(
        "".join(json.dumps({"part": part, **row}) + "\n" for part, row in rows.items())
    )
    for times in (1, 2):
        part = scale.measured(tmp_path / "rows", SimpleNamespace(actor=1.5e9 * times))
        assert [part.a, part.b, part.c] == pytest.approx(
            [0.0236 * times, 1e-4 * times, 4e-6 * times]
        )
        assert [part.s, part.u] == pytest.approx([9e4 / times, 3e4 / times])


@pytest.mark.parametrize(
    "gpus, sharded, wanted",
    [
        (
            1,
            False,
            [
                50 * 40 * 0.02 + 2560 * (40 * 1e-4 + 750 * 1e-5),
                2560 * 0.004 / 10,
                1.5 * 2560 * 790 / 1e5,
                2560 * 790 / 2e4,
                0,
            ],
        ),
        (
            4,
            False,
            [
                50 * 40 * 0.02 + 640 * (40 * 1e-4 + 750 * 1e-5),
                640 * 0.004 / 10,
                1.5 * 640 * 790 / 1e5,
                640 * 790 / 2e4,
                2 * 0.75 * 4 * 3e9 * 10 / 3e11,
            ],
        ),
        (
            4,
            True,
            [
                50 * 40 * 0.02 + 640 * (40 * 1e-4 + 750 * 1e-5),
                640 * 0.004 / 10,
                1.5 * 640 * 790 / 1e5,
                640 * 790 / 2e4,
                0.75 * (124 * (8 + 3) * 3e9 + 2 * 1.5e9) / 3e11,
            ],
        ),
    ],
)  # 124 micro-batches of 4096 tokens
def test_an_iteration_costs_its_equations(gpus, sharded, wanted):
    part, s = (
        SimpleNamespace(a=0.02, b=1e-4, c=1e-5, s=1e5, u=2e4),
        SimpleNamespace(actor=1.5e9, critic=1.5e9, heads=0),
    )
    given = SimpleNamespace(
        episodes=128, turns=20.0, longest=50, prompt=750, response=40, world=0.004, cores=10
    )
    assert list(scale.cost(part, s, Config(), given, gpus, sharded).values()) == pytest.approx(
        wanted
    )
    some = scale.cost(part, s, Config(slots=16), given, gpus, sharded)[
        "rollout"
    ]  # who has to wait plays after the others
    assert some - wanted[0] == pytest.approx((128 / gpus / 16 - 1) * 20 * 40 * 0.02)


def test_scale_says_that_it_assumes():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "scale.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 0
        and done.stdout.startswith("ASSUMED, not measured")
        and "\nscale: " in done.stdout
    )
