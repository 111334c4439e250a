"""support/play.py: a person plays a world in the terminal."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import envs
from support import play

ROOT = Path(__file__).parent.parent
HOSTILE = """
SPLITS = ("train",)
def size(split): return 2
class World:
    def reset(self, seed=None): return "hall\\x1b[2J", self.info()
    def step(self, action): return f"you said {action}", 1.0, True, False, self.info(True)
    def close(self): pass
    def info(self, won=False):
        return {"task": "go \\x1b[31m", "task_type": "a", "admissible": ["say <a word>"],
                "won": won, "score": float(won)}
def make(split="train", index=0): return World()
"""


@pytest.fixture
def played(monkeypatch, capsys):
    """Play a world with these answers -> (exit code, what was printed)."""

    def run(name, *answers, words=()):
        left = list(answers)

        def answer(prompt=""):
            print(prompt, end="")
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", answer)
        code = play.main(name, [str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_the_hints_win_the_game(played):
    """A player who does what the expert says wins, so the hints follow the player's subgoal."""
    env = envs.make("household", "unseen", 7)
    _, info = env.reset()
    answers, subgoal, won = [], "", False
    while not won:
        switch, subgoal, action = env.expert(subgoal)
        answers += ["?", str(info["admissible"].index(action) + 1)]
        *_, info = env.step(action)
        won = info["won"]
    steps = len(answers) // 2
    code, said = played("household", *answers, words=["--split", "unseen", "--task", 7])
    assert code == 0
    assert f"Task 7 of 0 to 299 in unseen: {env.task}" in said
    assert f"SWITCH to '{env.obj}" in said or "SWITCH to '" in said
    assert "KEEP '" in said
    assert f"Won after {steps} steps, score 1.00" in said


def test_what_is_asked_for_at_the_prompt(played):
    code, said = played("household", "99", "fly", "", ":n", ":r", ":q", "?")
    assert code == 0
    assert "There are actions 1 to 7." in said
    assert "Nothing happens." in said
    assert said.count("Task 0 of 0 to 19999 in train") == 1
    assert said.count("Task 1 of 0 to 19999 in train") == 2  # next, and again from its start
    assert said.endswith("> ")


def test_the_end_of_an_episode(played):
    answers = ["fly"] * 16 + ["?", ":n", ":q"]
    _, said = played("household", *answers)
    assert "Out of steps after 15 steps, score 0.00" in said
    assert "The episode has ended: :r restarts it" in said
    assert "The expert has no advice here." in said
    assert "Task 1 of" in said


def test_a_world_of_ones_own(played, tmp_path, monkeypatch):
    """Control characters are shown as text; what stands in <> is asked for; no expert is needed."""
    (tmp_path / "hall_to_play.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    code, said = played("hall_to_play", "?", "1", "hello", ":q")
    assert code == 0
    assert "\x1b" not in said
    assert "hall\\x1b[2J" in said
    assert "This world has no expert." in said
    assert "a word: " in said
    assert "you said say hello" in said
    assert "Won after 1 steps, score 1.00" in said


def test_options_of_the_world(played):
    _, said = played("household", "fly", "fly", words=["--env_options", '{"max_steps": 2}'])
    assert "Out of steps after 2 steps" in said


def test_webshop_is_played_too(played, monkeypatch):
    pytest.importorskip("rapidfuzz", reason="WebShop needs requirements-webshop.txt")
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    code, said = played("webshop", "?", "1", "red shoes", ":q", words=["--split", "test"])
    assert code == 0
    assert "search[" in said
    assert "Back to Search" in said


@pytest.mark.parametrize(
    "name, words, wanted",
    [
        ("household", ["--split", "x"], "choose train or seen or unseen"),
        ("household", ["--task", "300", "--split", "seen"], "tasks 0 to 299"),
        ("household", ["--task", "-1"], "tasks 0 to"),
        ("no_such_world", [], "no_such_world"),
        ("household", ["--env_options", "[1]"], "--env_options must be a JSON object"),
        ("household", ["--env_options", "[1]"], ", not '[1]'"),
        ("household", ["--env_options", '{"floor": 1}'], "floor"),
    ],
)
def test_what_cannot_be_played_is_one_sentence(played, name, words, wanted):
    code, said = played(name, words=words)
    assert code == 2
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert wanted in said


def test_a_level_of_babyai(played):
    pytest.importorskip("minigrid", reason="pip install -r requirements-babyai.txt")
    code, said = played("babyai", "?", words=["--env_options", '{"level": "PutNextLocal"}'])
    assert code == 0 and "put the" in said


@pytest.mark.parametrize("name", ["household", "webshop", "alfworld", "babyai"])
def test_the_command(name, monkeypatch):
    """`python -m worlds.NAME` reads the terminal; here it is told to leave, or finds no data."""
    optional = {
        "webshop": ("rapidfuzz", "WebShop needs the package rapidfuzz"),
        "babyai": ("minigrid", "babyai needs minigrid"),
    }
    package, missing = optional.get(name, ("torch", ""))
    monkeypatch.setenv("ALFWORLD_DATA", "nowhere")
    done = subprocess.run(
        [sys.executable, "-m", f"worlds.{name}"],
        input=":q\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if name == "alfworld":
        assert done.returncode == 2 and "there is no folder nowhere" in done.stderr
    elif not importlib.util.find_spec(package):
        assert done.returncode == 2 and missing in done.stderr
        assert f"pip install -r requirements-{name}.txt" in done.stderr
    else:
        assert done.returncode == 0 and "Task 0 of" in done.stdout
