"""--task_sampling edge: tasks whose success is uncertain are drawn more often."""

import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

import train
from conftest import tiny_config
from script_tools import assert_same_run, flags, metrics_of
from support import task_sampling
from update_tools import iterate, make_episodes
from worlds import household


class Pool:
    """Begins tasks and counts that; the family of household's task n is n % 6."""

    split = "train"

    def __init__(self):
        self.begun = 0

    def reset(self, tasks):
        self.begun += 1
        return {
            slot: ("", {"task_type": household.TASK_TYPES[task % 6]})
            for slot, task in tasks.items()
        }


def a_run(lines=(), rank=0, processes=1, **changes):
    return SimpleNamespace(
        config=tiny_config(episodes=96, **changes),
        pool=Pool(),
        lines=list(lines),
        families={},
        accelerator=SimpleNamespace(process_index=rank, num_processes=processes),
    )


def line(*rates, tasks=20):
    """A log line in which family n succeeded in the share rates[n] of `tasks` tasks of its own."""
    return {
        "played": [
            [6 * k + n, household.TASK_TYPES[n], k < rate * tasks]
            for n, rate in enumerate(rates)
            for k in range(tasks)
        ]
    }


PAST = [line(1.0, 0.0, 0.5, 0.95, 0.2, 1.0)]


def test_uniform_is_off_by_default_and_draws_as_ever():
    assert tiny_config().task_sampling == "uniform"
    rng = random.Random(3)
    wanted = [rng.randrange(20_000) for _ in range(96)]
    run = a_run(PAST)
    assert train.draw_tasks(run, 3) == wanted and run.pool.begun == 0
    assert task_sampling.record(run.config, [1, 2]) == {}


def test_the_first_iteration_of_edge_is_uniform():
    run = a_run(task_sampling="edge")
    assert train.draw_tasks(run, 0) == train.draw_tasks(a_run(), 0) and run.pool.begun == 0


def test_uncertain_families_are_drawn_in_proportion():
    drawn = Counter()
    for iteration in range(30):
        run = a_run(PAST, task_sampling="edge")
        drawn.update(task % 6 for task in train.draw_tasks(run, iteration))
    chance = [task_sampling.FLOOR + 0.9 * 4 * p * (1 - p) for p in (1, 0, 0.5, 0.95, 0.2, 1)]
    for kind in range(6):
        share = chance[kind] / sum(chance)
        assert drawn[kind] / (30 * 96) == pytest.approx(share, abs=0.03)
    assert min(drawn.values()) > 30  # the floor


def test_a_task_that_recurs_counts_for_itself():
    """Of two tasks of one family, one mastered and one in between."""
    kind = household.TASK_TYPES[0]
    played = [[0, kind, True]] * 4 + [[6, kind, n < 2] for n in range(4)] + [[12, kind, False]] * 3
    chances = task_sampling.Chances(a_run([{"played": played}]))
    assert chances.of(0) == pytest.approx(0.1) and chances.of(6) == pytest.approx(1.0)
    family = 6 / 11
    assert chances.of(12) == pytest.approx(0.1 + 0.9 * 4 * family * (1 - family))
    assert chances.of(1) == pytest.approx(1.0)  # a family never played


def test_only_the_last_iterations_count():
    old = [line(0.5, 0, 0, 0, 0, 0)] * 3 + [line(0, 0.5, 0, 0, 0, 0)] * task_sampling.PAST
    drawn = Counter(task % 6 for task in train.draw_tasks(a_run(old, task_sampling="edge"), 0))
    assert drawn[1] > 4 * drawn[0]


def test_a_task_is_begun_once_at_most_to_learn_its_family():
    run = a_run([line(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)], task_sampling="edge")
    drawn = train.draw_tasks(run, 1)
    begun = run.pool.begun
    assert 0 < begun <= 6 * 96
    assert train.draw_tasks(run, 1) == drawn
    assert run.pool.begun == begun
    for k in range(task_sampling.PAST):  # played long ago
        run.lines.append({"played": [[20_000 + k, "x", True]]})
    train.draw_tasks(run, 2)
    assert set(range(120)) < set(run.families)


@pytest.mark.parametrize("method, group", [("hiper", 1), ("grpo", 8)])
def test_every_process_draws_the_same_and_takes_its_share(method, group):
    changes = {"task_sampling": "edge", "method": method, "group_size": group}
    whole = train.draw_tasks(a_run(PAST, **changes), 5)
    parts = [train.draw_tasks(a_run(PAST, rank, 3, **changes), 5) for rank in range(3)]
    groups = [whole[n : n + group] for n in range(0, 96, group)]
    assert all(len(set(tasks)) == 1 for tasks in groups)
    for rank in range(3):
        assert parts[rank] == sum(groups[rank::3], [])


def test_the_log_holds_what_was_played():
    episodes = [SimpleNamespace(index=7, task_type="x", success=True)]
    config = tiny_config(task_sampling="edge")
    assert task_sampling.record(config, episodes) == {"played": [[7, "x", True]]}


def test_a_run_that_was_stopped_draws_as_one_that_was_not(trained, tmp_path, monkeypatch):
    train_iteration = train.train_iteration
    for out in ("whole", "stopped"):
        shutil.copytree(trained.out / "start", tmp_path / out / "start")
    words = [flags(tmp_path / out, task_sampling="edge") for out in ("whole", "stopped")]
    train.main(words[0])

    def fragile(run, iteration):
        if iteration == 2:
            raise KeyError
        return train_iteration(run, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_iteration", fragile)
        with pytest.raises(KeyError):
            train.main(words[1])
    train.main(words[1])
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert all(len(line["played"]) == 4 for line in metrics_of(tmp_path / "whole"))


def test_the_log_holds_what_all_processes_played(tiny_policy, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(train, "gather_object", lambda episodes: episodes * 2)
    episodes = make_episodes(tiny_tokenizer)
    changes = dict(task_sampling="edge")
    metrics = iterate(
        tiny_policy, tiny_tokenizer, episodes, Accelerator(cpu=True), **changes
    ).metrics
    assert metrics["episodes"] == len(metrics["played"]) == 12
