"""Settings: what is read from flags and files, what is refused, and that each is used."""

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from config import FIELDS, Config, ConfigError
from support.arguments import CONFIGS, GROUPS, read_config
from support.check_config import check

ROOT = Path(__file__).parent.parent
FLOATS = [name for name, entry in FIELDS.items() if entry.type is float]


def test_every_setting_is_read_and_explained():
    """A setting that nothing reads is worse than none. Reading it in config.py's own checks does
    not count, reading it in a property there does."""
    files = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"), *(ROOT / "worlds").glob("*.py")]
    code = "\n".join(path.read_text() for path in files if path.name != "config.py")
    for field in dataclasses.fields(Config):
        assert field.metadata["help"], field.name
        used = re.search(rf"\bconfig\.{field.name}\b", code)
        in_property = f"self.{field.name} " in (ROOT / "config.py").read_text()
        assert used or in_property, field.name


def test_help_names_every_group_flag_and_choice(capsys):
    with pytest.raises(SystemExit) as exit:
        read_config(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert all(title in said for title in GROUPS.values())
    for name, entry in FIELDS.items():
        assert f"--{name} " in said
        assert all(choice in said for choice in entry.metadata["choices"] or ()), name


def test_there_are_fewer_than_50_settings():
    assert len(FIELDS) < 50
    assert GROUPS.keys() <= FIELDS.keys()


def test_what_the_code_reads_of_a_config_exists():
    code = "\n".join(
        path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]
    )
    read = set(re.findall(r"\bconfig\.([a-z_]+)\b", code))
    known = set(FIELDS) | {name for name, value in vars(Config).items() if name[0] != "_"}
    assert read <= known | {"hidden_size", "json", "py", "tmp", "to_dict", "vocab_size"}


def test_a_config_knows_the_files_it_was_read_from(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    for words, source in {
        "": "tiny.yaml",
        "--env alfworld": "tiny.yaml, tiny-alfworld.yaml",
        f"{tmp_path}/mine.yaml": "tiny.yaml, mine.yaml",
        "--model x": "the defaults",
        "--model x --env alfworld": "alfworld-1.5b.yaml",
        f"{tmp_path}/mine.yaml --model x": "mine.yaml",
    }.items():
        assert read_config(words.split()).source == source
    assert "source" not in dataclasses.asdict(Config())


def test_a_config_file_and_flags_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 1e-4\nshort_prompt: false\nmodel: some/name\nepisodes: 7\nbootstrap: yes\n"
        "eval_episodes: 8\n"
    )
    got = read_config([str(file), "--episodes", "9", "--seed", "3"])
    assert got.lr == 1e-4
    assert got.short_prompt is False
    assert got.model == "some/name"
    assert got.episodes == 9
    assert got.bootstrap is True
    assert got.eval_episodes == 8
    assert got.out == "runs/household-3"
    assert read_config([str(file), "--out", "x"]).out == "x"
    (tmp_path / "run.json").write_text(json.dumps({"lr": 0.5, "env_options": {"max_steps": 4}}))
    got = read_config([str(tmp_path / "run.json")])
    assert got.lr == 0.5
    assert got.env_options == {"max_steps": 4}
    assert read_config(["--env_options", '{"max_steps": 4}']).env_options == {"max_steps": 4}
    file.write_text("")
    assert read_config([str(file)]) == read_config([])
    file.write_text("out:\n")  # YAML's null is not a folder called None
    assert read_config([str(file)]).out == "runs/household-0"


def test_defaults_are_the_paper_s_with_a_model_and_the_tiny_agent_s_without(tmp_path):
    """And a world has its own file, unless another is given."""
    assert replace(read_config(["--model", "x"]), model="") == Config()
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    assert tiny.keys() <= FIELDS.keys()
    assert read_config([]) == Config(**tiny)
    for env in ("alfworld", "webshop"):
        own = yaml.safe_load((CONFIGS / f"tiny-{env}.yaml").read_text())
        assert read_config(["--env", env]) == Config(**{**tiny, **own, "env": env})
        paper = yaml.safe_load((CONFIGS / f"{env}-1.5b.yaml").read_text())
        paper.update(env=env, model="x")
        assert read_config(["--env", env, "--model", "x"]) == Config(**paper)
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert read_config([str(empty), "--env", "webshop"]) == Config(**{**tiny, "env": "webshop"})


def test_a_group_is_one_episode_where_there_is_a_critic_else_eight():
    assert [Config(method=method).group_size for method in ("hiper", "ppo")] == [1, 1]
    assert [Config(method=method).group_size for method in ("rloo", "grpo", "gigpo")] == [8, 8, 8]
    assert Config(method="grpo", group_size=4).group_size == 4


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite(name, value):
    config = read_config([f"--{name}={value}"])
    assert not math.isfinite(getattr(config, name))
    with pytest.raises(ConfigError, match=f"--{name} must be"):
        check(config)


@pytest.mark.parametrize("name", [name for name, e in FIELDS.items() if e.metadata["low"] == 0])
def test_values_below_0_are_refused(name):
    with pytest.raises(ConfigError, match=f"--{name} must be at least 0"):
        check(replace(read_config([]), **{name: -1}))


@pytest.mark.parametrize("name", [n for n, e in FIELDS.items() if e.metadata["high"] is not None])
def test_values_above_the_bound_are_refused(name):
    high = FIELDS[name].metadata["high"]
    with pytest.raises(ConfigError, match=f"--{name} must be at most {high}"):
        check(replace(read_config([]), **{name: high * 2}))


@pytest.mark.parametrize("name", [n for n, e in FIELDS.items() if e.metadata["choices"]])
def test_choices_are_kept(name):
    with pytest.raises(ConfigError, match=f"--{name} must be .*'magic'"):
        check(replace(read_config([]), **{name: "magic"}))


def test_the_defaults_are_allowed():
    check(read_config([]))
    for env in ("household", "alfworld", "webshop"):
        check(read_config(["--env", env, "--model", "x"]))
        check(read_config(["--env", env]))


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("--seed x", "a whole number"),
        ("--lr x", "a number"),
        ("--bootstrap maybe", "true or false"),
        ("--env_options [1]", "a JSON object"),
    ],
)
def test_a_value_of_another_type_is_refused(words, wanted):
    with pytest.raises(ConfigError, match=f"{words.split()[0]} must be {wanted}"):
        read_config(words.split())


@pytest.mark.parametrize(
    "words, said",
    [
        ('{"turn": -0.3}', "turn must be a number of at least 0"),
        ('{"ratio": true}', "ratio must be a number"),
        ('{"drift": NaN}', "drift must be a number"),
        ('{"keep": 0.3}', "holds some of turn, ratio, drift, not 'keep'"),
        ("0.3", "must be a JSON object"),
    ],
)
def test_keep_penalties_are_checked(words, said):
    with pytest.raises(ConfigError, match=said):
        check(read_config(["--keep_penalties", words]))


@pytest.mark.parametrize(
    "episodes, group, processes, slots", [(128, 1, 1, 100), (128, 1, 8, 16), (24, 8, 2, 16)]
)
def test_each_process_plays_its_share_of_the_episodes(episodes, group, processes, slots):
    config = Config(num_envs=100, episodes=episodes, group_size=group)
    assert config.slots(processes) == slots
