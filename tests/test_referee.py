"""benchmarks/referee.py: the true advantages, and the correlation of estimates with them."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import envs
from benchmarks import referee
from benchmarks.variance import restore
from config import DECISIONS, ConfigError
from rollout import make_batch
from support.distributed import make_accelerator
from support.loading import load_run
from worlds import household

TEXT = "<switch>SWITCH</switch><subgoal>find egg</subgoal><action>go to sink 1</action>"


@pytest.fixture(scope="module")
def run(trained):
    config, _, _ = load_run(trained.out)
    with envs.EnvPool(config.env, **envs.world_options(config)) as pool:
        yield restore(config, trained.out, pool, make_accelerator())[0]


def test_a_copy_is_played_without_a_trace_in_the_original(run):
    torch.manual_seed(0)
    player = referee.new_player(run, 0)
    referee.play(run, [player.copy()], [""])
    assert player.env.steps == 0
    assert player.state.turns == [] and not player.state.ended


def test_a_world_without_a_step_limit_gets_the_pool_s(run, monkeypatch):
    world = ModuleType("limitless")
    world.SPLITS, world.size = household.SPLITS, household.size
    world.make = lambda split, index: household.make(split, index, max_steps=50)
    monkeypatch.setitem(sys.modules, "limitless", world)
    config = replace(run.config, env="limitless")
    limitless = SimpleNamespace(**{**vars(run), "config": config})
    player = referee.new_player(limitless, 0, max_steps=2)
    referee.play(limitless, [player], [""])
    assert len(player.state.turns) == 2
    assert player.state.ended and player.state.truncated
    assert referee.new_player(limitless, 0).limit == envs.MAX_STEPS
    assert referee.new_player(run, 0).limit is None


def test_snapshots_are_of_the_state_before_each_turn(run):
    torch.manual_seed(0)
    players, before = referee.play_batch(run, [0, 1])
    assert len(players) == 2 * referee.GROUP
    for (n, t), then in before.items():
        turn = players[n].state.turns[t]
        assert len(then.state.turns) == t == then.env.steps
        assert then.state.observation == turn.observation
        assert then.state.subgoal == turn.prev_subgoal


def test_what_is_kept_is_kept(run):
    """The first response begins as written; the later ones are the agent's own."""
    torch.manual_seed(0)
    players, before = referee.play_batch(run, [0])
    begun = [
        words for _, words in referee.alternatives(before[0, 0], players[0].state.turns[0], TEXT)
    ]
    assert begun == [
        "",
        "<switch>SWITCH</switch>",
        "<switch>SWITCH</switch><subgoal>find egg</subgoal>",
        "",
    ]
    player = before[0, 0].copy()
    referee.play(run, [player], [begun[2]])
    first, second = player.state.turns[:2]
    assert first.subgoal == "find egg"
    assert run.tokenizer.decode(second.response).count("find egg") < 2


def test_a_turn_that_ends_the_episode_has_a_known_value(run):
    """Q3 is its reward in every repetition, and nothing is played after it."""
    torch.manual_seed(0)
    players, before = referee.play_batch(run, [0])
    last = len(players[0].state.turns) - 1
    turn = replace(players[0].state.turns[last], response=run.tokenizer(TEXT)["input_ids"])
    q = referee.measure(run, before[0, last], turn, 4)
    assert q.shape == (4, 4)
    assert torch.equal(q[3], torch.full((4,), turn.reward))


def test_correlation_is_corrected_for_the_noise_of_the_truth():
    """y = x + e seen through noise of twice its size: 0.8 is found again, within its interval."""
    torch.manual_seed(0)
    truth = torch.randn(4000)
    estimates = 0.8 * truth + 0.6 * torch.randn(4000)
    halves = truth[:, None] + 2 * torch.randn(4000, 2)
    tasks = torch.arange(4000) // 20
    assert referee.reliability(halves) == pytest.approx(1 / 3, abs=0.03)
    judged = estimates, halves, tasks
    value, low, high = referee.with_interval(referee.corrected_correlation, *judged, draws=200)
    assert value == pytest.approx(0.8, abs=0.05)
    assert low < value < high and high - low < 0.2
    value, low, high = referee.with_interval(referee.relative_error, *judged, draws=200)
    assert value == pytest.approx(0.4, abs=0.1)  # 0.2 ** 2 + 0.6 ** 2
    assert low < value < high and high - low < 0.4


def test_intervals_know_that_the_reliability_is_estimated():
    """A perfect estimate of a truth seen twice: the noise of the reliability alone."""
    torch.manual_seed(0)
    truth = torch.randn(100)
    halves = truth[:, None] + torch.randn(100, 2)
    trust = referee.reliability(halves)

    def fixed(estimates, halves):
        return referee.correlation(estimates, halves.mean(1)) / trust**0.5

    found = [
        referee.with_interval(statistic, truth, halves, torch.arange(100) // 4, draws=300)
        for statistic in (fixed, referee.corrected_correlation)
    ]
    assert found[0][0] == found[1][0]
    assert found[0][1:] != found[1][1:]


def test_noise_alone_has_no_correlation_and_no_error():
    torch.manual_seed(1)
    halves = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [2.0, -2.0]])
    for statistic in (referee.corrected_correlation, referee.relative_error):
        found = referee.with_interval(statistic, torch.rand(3), halves, torch.zeros(3), draws=9)
        assert all(x != x for x in found)


def test_the_error_is_without_the_noise_of_the_truth():
    """An estimate that is off by a third of the truth's spread, and one of 0."""
    torch.manual_seed(0)
    truth = torch.randn(20_000)
    halves = truth[:, None] + torch.randn(20_000, 2)
    near = truth + torch.randn(20_000) / 3
    assert referee.relative_error(near, halves) == pytest.approx(1 / 9, abs=0.02)
    assert referee.relative_error(0 * truth, halves) == pytest.approx(1, abs=0.02)


def test_too_few_turns_are_refused(run):
    """The barely trained agent of the tests writes hardly any valid turn."""
    args = SimpleNamespace(tasks=1, turns=1, rollouts=2)
    with pytest.raises(ConfigError, match="--turns"):
        referee.judge(run, args)


def test_the_measured_turns_are_in_the_result(run, monkeypatch, capsys):
    """An agent that writes one valid turn for ever: nothing but noise, shown as such."""
    ids = run.tokenizer(TEXT)["input_ids"]
    monkeypatch.setattr(
        referee, "respond", lambda actor, tokenizer, prompts, *_: [ids] * len(prompts)
    )
    result = referee.judge(run, SimpleNamespace(tasks=2, turns=5, rollouts=2))
    for kind, columns in result["measured"].items():
        assert {len(column) for column in columns.values()} == {result["turns"][kind]}
        assert set(referee.ESTIMATORS) < set(columns)
        assert len(set(columns["task"])) <= 2 and len(columns["halves"][0]) == 2
    assert json.dumps(result)
    referee.show(result)
    assert "error of HAE 0.9 0.7" in capsys.readouterr().out


def test_every_estimator_gives_each_decision_an_advantage(run):
    torch.manual_seed(0)
    players, _ = referee.play_batch(run, [0])
    episodes = [p.state.to_episode(p.state.turns[-1].prompt) for p in players]
    batch = make_batch(episodes, run.tokenizer, referee.GROUP)
    found = referee.estimate(run, batch)
    assert set(found) == set(referee.ESTIMATORS)
    for by_kind in found.values():
        assert {kind: grid.shape for kind, grid in by_kind.items()} == dict.fromkeys(
            DECISIONS, batch.mask.shape
        )
