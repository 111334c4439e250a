"""What the README says is so: its world runs, its files and configurations exist."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import envs
import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_corridor_world_can_be_played(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "readme_corridor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with envs.Runner("readme_corridor", "unseen") as runner:
        for index in range(envs.size("readme_corridor", "unseen")):
            runner.reset({0: index})
            subgoal, ended = "", False
            while not ended:
                _, subgoal, action = runner.expert({0: subgoal})[0]
                _, reward, ended, truncated, info = runner.step({0: action})[0]
            assert info["won"] and reward == 1.0 and not truncated


def test_every_file_named_is_there():
    named = set(re.findall(r"`((?:tests/)?[\w.-]+\.(?:py|txt)|configs/[\w.-]+)`", README)) - {
        "corridor.py"
    }
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configurations_are_read(path):
    read = config.read_config([str(path), "--seed", "3"])
    assert (
        read.seed == 3
        and read.env == path.stem.split("-")[0]
        and bool(read.model) == ("-" in path.stem)
    )


def test_a_world_brings_its_own_settings():
    """`--env alfworld` alone is configs/alfworld.yaml, with --model the paper's; a file that is named, and flags, win."""
    tiny, paper = (
        config.read_config(["--env=alfworld", "--episodes", "5"]),
        config.read_config(["--env", "webshop", "--model", "x"]),
    )
    assert (tiny.max_response, tiny.episodes) == (40, 5) and (
        paper.iterations,
        paper.model,
        paper.demos,
    ) == (150, "x", 0)
    named = config.read_config([str(ROOT / "configs" / "alfworld-1.5b.yaml"), "--env", "webshop"])
    assert named.lr == 1e-6 and named.env == "webshop"
    assert (
        config.read_config(["--env", "household"]) == config.read_config([])
        and config.read_config(["--env", "moon"]).env == "moon"
    )


EQUATIONS = re.findall(
    r"^\| [^|]+ \| ((?:`[\w.]+`(?:, )?)+) \| `(.+?)` \| `(test_\w+)` \|$", README, re.M
)


def test_the_equation_table_names_lines_and_tests_that_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(EQUATIONS) >= 14
    for functions, line, test in EQUATIONS:
        for module, name in re.findall(r"`(\w+)\.(\w+)`", functions):
            assert f"def {name}(" in (ROOT / f"{module}.py").read_text(), name
        assert line in (ROOT / f"{module}.py").read_text(), line
        assert f"def {test}(" in tests, test


def test_other_tests_named_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_the_worked_example_is_what_hae_prints():
    (table,) = re.findall(r"```text\n(turn  segment.*?)```", README, re.S)
    assert (
        subprocess.run(
            [sys.executable, "hae.py"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == table
    )


def test_flags_named_exist():
    fields = {field.name for field in dataclasses.fields(config.Config)}
    own = {
        "swap",
        "split",
        "episodes",
        "greedy",
        "json",
        "quick",
        "run",
        "help",
        "plan",
        "config_file",
        "measured",
        "mixed",
    }  # eval's and the benchmarks'
    for flag in re.findall(r"--([a-z_]+)", README):
        assert flag in fields | own, flag
