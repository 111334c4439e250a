"""support/terminal.py: bars where there is a terminal, lines where there is none."""

import io
import random
from types import SimpleNamespace

import pytest
import torch

from support import terminal
from support.metrics import summarize
from update_tools import make_episode, plain_config


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_screen(monkeypatch):
    """stderr and stdout become one terminal -> what is written to it.

    No fixture: pytest takes both back between a test's fixtures and the test.
    """
    written = Terminal()
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setattr("sys.stdout", written)
    return written


def process(main=True):
    return SimpleNamespace(is_main_process=main)


def tell(episodes, iteration=0, main=True, **changes):
    """What one iteration of a run shows."""
    config = plain_config(**{"iterations": 2, "save_every": 10, **changes})
    accelerator = process(main)
    bar = terminal.training_bar(iteration, config, accelerator)
    run = SimpleNamespace(config=config, accelerator=accelerator)
    metrics = {**summarize(episodes), "iteration": iteration, "turns_per_second": 7}
    raw = {"A_action": torch.zeros(2, 5)}
    terminal.tell_iteration(bar, run, [metrics], episodes, SimpleNamespace(raw=raw))
    return bar


@pytest.fixture
def episodes(tiny_tokenizer):
    return [make_episode(random.Random(n), tiny_tokenizer, 5 - n) for n in range(2)]


def test_playing_shows_what_one_cares_about(monkeypatch, episodes):
    screen = open_screen(monkeypatch)
    seen = []
    playing = terminal.Playing(process(), [3, 4, 5], "unseen", seen.append)
    for episode in episodes:
        playing(episode)
    assert seen == episodes
    playing.bar.refresh()
    last = screen.getvalue().split("\r")[-1]
    numbers = summarize(episodes)
    wanted = f"success {numbers['success']:.0%}, {numbers['switches_per_episode']:.1f} switches per"
    assert last.startswith("unseen")
    assert "2/3" in last
    assert " left, " + wanted in last
    assert "turns/s" in last
    playing(episodes[0])
    assert screen.getvalue().split("\r")[-2].strip() == ""  # it cleans up behind itself


def test_training_shows_its_bar_and_no_lines(monkeypatch, episodes):
    screen = open_screen(monkeypatch)
    bar = tell(episodes, iteration=1)
    assert bar.disable  # closed after the last iteration
    shown = screen.getvalue()
    assert "hiper" in shown
    assert "2/2" in shown
    assert "7 turns/s" in shown
    assert "iteration 2/2" not in shown


def test_without_a_terminal_each_iteration_is_a_line(episodes, capsys):
    tell(episodes)
    playing = terminal.Playing(process(), [3], "unseen")
    playing(episodes[0])
    said = capsys.readouterr()
    assert said.err == ""
    line, *episode = said.out.splitlines()
    assert line.startswith("iteration 1/2: success ")
    assert line.endswith("7 turns/s")
    assert episode[0].startswith("task ")  # iteration 0 shows one in full


def test_a_log_file_gets_its_lines_where_only_stderr_is_a_terminal(episodes, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", Terminal())
    tell(episodes)
    assert "iteration 1/2: success" in capsys.readouterr().out


def test_other_processes_are_quiet(monkeypatch, episodes):
    screen = open_screen(monkeypatch)
    tell(episodes, main=False)
    terminal.Playing(process(main=False), [3], "unseen")(episodes[0])
    assert screen.getvalue() == ""
