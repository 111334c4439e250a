"""benchmarks/chains.py: exact values against sampled episodes, and unbiased gradients."""

import pytest
import torch

from benchmarks import chains


@pytest.fixture(scope="module")
def sampled():
    """-> (world, J, exact values, episodes, scores) of two tasks"""
    world = chains.random_world(1, chain=2)
    j, values = chains.solve(world, world.logits)
    x = chains.sample(world, 20_000, torch.Generator().manual_seed(0))
    return world, float(j), values, x, chains.scores(world, x)


def test_the_values_are_the_means_of_what_is_sampled(sampled):
    _, j, values, x, _ = sampled
    ret = x.reward.sum(1)
    assert float(ret.mean()) == pytest.approx(j, abs=0.015)
    assert 0.05 < j < 0.95
    for t, task, phase in ((3, 0, 1), (4, 1, 0)):
        here = x.mask[:, t] & (x.task[:, t] == task) & (x.phase[:, t] == phase)
        assert here.sum() > 400
        wanted = values.flat[t, task, phase]
        assert float(ret[here].mean()) == pytest.approx(float(wanted), abs=0.07)
        low = here & (x.subgoal[:, t] == 1)
        wanted = values.low[t, task, phase, 1]
        assert float(ret[low].mean()) == pytest.approx(float(wanted), abs=0.1)


@pytest.mark.parametrize(
    "kind, lambdas, biased",
    [
        ("trajectory", None, False),
        ("flat GAE, V(s)", 1.0, False),
        ("flat GAE, V(s)", 0.5, True),  # it does not know the subgoal that the agent carries
        ("flat GAE, V(s, o_prev)", 0.5, False),
        ("HAE, closed form", (0.5, 0.5), False),
        ("HAE, value head", (0.5, 0.5), False),
        ("HAE, value head", (1.0, 1.0), False),
    ],
)
def test_exact_critics_give_unbiased_gradients(sampled, kind, lambdas, biased):
    world, _, values, x, score = sampled
    truth = torch.func.grad(lambda logits: chains.solve(world, logits)[0])(world.logits)
    advantage = chains.advantages(world, x, values, kind, lambdas)
    variance, bias = chains.moments(score, advantage, truth)
    assert (bias > 3 * variance / len(x.reward)) == biased
    _, none = chains.moments(score, 0 * advantage, truth)
    assert none == pytest.approx(1)  # an estimate of 0 is all bias


def test_the_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(chains, "CHAINS", (1,))
    monkeypatch.setattr(chains, "PAIRS", [(1.0, 1.0)])
    chains.main(["--worlds", "2", "--episodes", "50", "--json", str(tmp_path / "rows.jsonl")])
    said = capsys.readouterr().out
    assert all(kind in said for kind in chains.KINDS)
    assert said.splitlines()[-1].startswith("chains: ")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(chains.KINDS) + 4
