"""What the README says is so: its world runs, its files and configurations exist."""
import re
from pathlib import Path

import pytest

import envs
import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_corridor_world_can_be_played(tmp_path, monkeypatch):
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
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
    named = set(re.findall(r"`((?:tests/)?[\w.-]+\.(?:py|txt)|configs/[\w.-]+)`", README)) - {"corridor.py"}
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configurations_are_read(path):
    read = config.read_config([str(path), "--seed", "3"])
    assert read.seed == 3 and read.env == "alfworld"


def test_functions_of_the_equation_table_exist():
    import hae
    import hiper
    for module, name in re.findall(r"`(hae|hiper)\.(?!py`)(\w+)`", README):
        assert hasattr({"hae": hae, "hiper": hiper}[module], name), name
