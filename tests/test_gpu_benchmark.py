"""benchmarks/gpu.py, tiny and on the CPU: all that a GPU will be asked has been asked once."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = "--model tiny --slots 2 4 --prompt 250 --response 4 --longest 2 --turns 4 --tokens 1024 2048".split()


def run(out, *words):
    """-> (its rows by part, what it printed)"""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *TINY, "--out", str(out), *words],
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "QWEN_TOKENIZER": ""},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {row.pop("part"): row for row in map(json.loads, out.read_text().splitlines())}, done.stdout


def test_every_part_reports(tmp_path):
    rows, said = run(tmp_path / "rows.jsonl")
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    assert [sum(name.startswith(part) for name in rows) for part in ("hae", "generate", "rollout", "update", "plan")] == [2, 6, 5, 3, 3]
    assert {"environment", "build", "attention", "log-probs", "all"} < set(rows) and len(rows) == 24
    assert rows["log-probs"]["holds"] and rows["log-probs"]["generation"] < 0.05 and rows["hae, 4096 x 50"]["holds"]
    assert rows["rollout, 4 slots"]["turns"] == rows["rollout, 2 slots, lockstep"]["turns"] == 1 + 2 + 1 + 2
    assert rows["rollout, 4 slots"]["rows a turn"] == 1 < rows["rollout, 4 slots, lockstep"]["rows a turn"]
    assert 230 < rows["build"]["tokens a prompt"] < 270 and said.splitlines()[-1].startswith("gpu: ") and said.endswith("x\n")
    assert all(name in said for name in rows)


def test_what_fails_takes_nothing_else_with_it(tmp_path):
    rows, said = run(tmp_path / "rows.jsonl", "--model", "none")
    assert [name for name in rows if "failed" not in rows[name]] == ["environment", "hae, 128 x 50", "hae, 4096 x 50", "all"]
    assert rows["build"]["failed"] == "KeyError: 'none'" and rows["all"]["failed parts"] == 20 and said.endswith("gpu: not measured\n")
