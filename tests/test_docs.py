"""What README.md and docs/ say is so: files, flags, code lines, tests, and the example world."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import envs
import hiper
from config import FIELDS
from support import cloning, world_check
from support.arguments import read_config, read_train_arguments
from support.check_config import check

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
OTHER_FLAGS = {  # of eval.py, benchmarks, accelerate and pip
    *("split", "greedy", "json", "temperature", "planner", "executor", "run", "quick", "mixed"),
    *("plan", "help", "measured", "config_file", "num_processes", "multi_gpu", "machine_rank"),
    *("main_process_ip", "use_fsdp", "fsdp_version", "cpu", "no", "nproc_per_node"),
    *("html", "report", "track", "task", "tiny", "show", "start", "turns", "rollouts", "tasks"),
    *("require", "universal", "generate", "python"),
}


def commands(program):
    """The arguments of every `python PROGRAM ...` and `accelerate launch ... PROGRAM ...` line."""
    pattern = rf"^    (?:[^\n#]*(?:python|launch)[^\n#]*) {re.escape(program)}([^\n#]*)"
    return [
        match.split()
        for page in PAGES.values()
        for match in re.findall(pattern, page, re.MULTILINE)
    ]


def test_the_readme_is_a_front_door():
    assert len(README.split()) <= 1000
    assert (ROOT / "docs" / "method.svg").is_file()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The module of docs/custom_world.md, under a name that no user's file has."""
    [code] = re.findall(r"```python\n(.*?)```", PAGES["custom_world.md"], re.DOTALL)
    (tmp_path / "documented_corridor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "documented_corridor"
    sys.modules.pop("documented_corridor", None)


def test_the_example_world_keeps_the_interface_and_its_expert_wins(example):
    faults, summary = world_check.check_world(example, tasks=50)
    assert faults == []
    assert "the expert wins 48 of 48 tasks" in summary


def test_the_example_world_leaves_something_to_learn(example):
    """Its demonstrator, which the tiny agent clones, wins some of the tasks and not most."""
    config = read_config(["--env", example])
    settings = envs.world(example).DEMONSTRATOR
    with envs.EnvPool(example, "train") as pool:
        turns = cloning.demonstrations(pool, list(range(38)) * 10, config, **settings)
    won = sum(left == 0 for *_, left in turns) / 380
    assert 0.3 < won < 0.5


def test_the_script_that_uses_an_actor_runs(tiny_actor, tiny_tokenizer, tmp_path, capsys):
    [code] = re.findall(r"```python\n(.*?)```", PAGES["llm.md"], re.DOTALL)
    tiny_actor.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    exec(code.replace("runs/household-0/actor", str(tmp_path)), {})
    assert capsys.readouterr().out.split()[0] in ("True", "False")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_file_named_is_there(page):
    named = re.findall(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|txt|yaml|svg|jsonl))`", PAGES[page])
    named += re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    for name in set(named) - {"corridor.py", "corridor.yaml", "metrics.jsonl", "evals.jsonl"}:
        places = [ROOT / name, ROOT / "docs" / name, ROOT / "configs" / name]
        folders = ("configs/accelerate", "tests", "benchmarks")
        places += [ROOT / folder / name for folder in folders]
        assert any(place.exists() for place in places), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_can_be_read_and_meant(path):
    config = read_config([str(path), "--seed", "3"])
    check(config)
    assert config.seed == 3
    assert bool(config.model) == (not path.stem.startswith("tiny") and path.stem != "babyai")


@pytest.mark.parametrize("words", commands("train.py"), ids=" ".join)
def test_every_training_command_can_be_read_and_meant(words, monkeypatch):
    monkeypatch.setattr("support.arguments.check_tracker", lambda name: None)
    config, *_ = read_train_arguments(words)
    check(config)


def test_babyai_s_two_files_say_the_same():
    """configs/tiny-babyai.yaml is for --env babyai, configs/babyai.yaml to be named."""
    named = read_config([str(ROOT / "configs" / "babyai.yaml")])
    found = read_config(["--env", "babyai", "--env_options", '{"level": "GoToLocal"}'])
    assert named == found


def test_a_world_brings_its_own_settings():
    """Without a file configs/tiny-ENV.yaml holds, with a model configs/ENV-1.5b.yaml."""
    tiny = read_config(["--env=alfworld", "--episodes", "5"])
    assert tiny.max_new_tokens == 40
    assert tiny.episodes == 5
    assert tiny.short_prompt
    paper = read_config(["--env", "webshop", "--model", "x"])
    assert paper.iterations == 150
    assert paper.model == "x"
    assert paper.bootstrap
    assert paper.switch_advantage == "closed_form"
    assert not paper.short_prompt
    own_world = read_config(["--env", "corridor", "--model", "x"])
    assert own_world.lr == 1e-6
    assert own_world.history == 2
    assert read_config(["--env", "household"]) == read_config([])


def equation_rows():
    row = r"^\| [^|]+ \| ((?:`[\w.]+`(?:, )?)+) \| `(.+?)` \| `(test_\w+)` \|$"
    return re.findall(row, README, re.MULTILINE)


def test_the_equation_table_names_lines_and_tests_that_are_there():
    assert len(equation_rows()) >= 14
    for functions, line, test in equation_rows():
        for module, name in re.findall(r"`([\w.]+)\.(\w+)`", functions):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert f"def {name}(" in source, name
            assert line in source, line
        assert f"def {test}(" in TESTS, test


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_test_and_flag_named_is_there(page):
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in TESTS, name
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z_]*)", PAGES[page]):
        assert flag in {*FIELDS, *OTHER_FLAGS}, flag


def test_the_worked_example_is_what_hae_prints():
    [table] = re.findall(r"```text\n(turn  segment.*?)```", PAGES["theory.md"], re.DOTALL)
    done = subprocess.run(
        [sys.executable, "hae.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == table


def test_the_prompt_of_the_llm_page_is_what_a_model_reads():
    [prompt] = re.findall(r"```text\n(You act.*?)\n```", PAGES["llm.md"], re.DOTALL)
    assert prompt == hiper.plan_execute_prompt(
        "put a mug in table",
        "You arrive at desk 1. On it you see a mug 1.",
        "find mug",
        [("You are in the middle of a room.", "go to desk 1")],
        ["take mug 1 from desk 1", "go to shelf 1", "look"],
    )
    [answer] = re.findall(r"A valid answer: `(.*)`", PAGES["llm.md"])
    assert hiper.parse(answer).valid


def test_nothing_is_left_to_fill_in():
    for name, page in PAGES.items():
        assert "TODO" not in page, name
