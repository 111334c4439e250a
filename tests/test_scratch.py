"""scratch.py: what the demonstrator shows and how it is cloned."""
import copy

import pytest
import torch

import envs
import hiper
import household
import scratch
from rollout import Style, encode

STYLE = Style(history=0, brief=True, show_admissible=False)


def shown(tasks=range(12), style=STYLE, **changes):
    with envs.Runner("household", "train", 1) as runner:
        return scratch.demonstrations(runner, tasks, style=style, **{"plan_noise": 0.0, "slips": 0.0, "seed": 0, **changes})


def followed(turns):
    """Shares of the turns whose (subgoal is the plan's, action is the subgoal's), playing what was shown from the first task on."""
    right, turns = [], iter(turns)
    for index in range(12):
        env = household.make("train", index)
        env.reset()
        subgoal = ""
        while not env.done:
            _, said, _ = next(turns)
            decision = hiper.parse(said)
            _, wanted, _ = env.expert(subgoal)
            subgoal = decision.subgoal
            right.append((subgoal == wanted, decision.action == env.expert(subgoal)[2]))
            env.step(decision.action)
    assert next(turns, None) is None
    return [sum(column) / len(right) for column in zip(*right)]


def test_without_noise_he_wins_and_counts_down_to_it():
    turns = shown()
    assert followed(turns) == [1.0, 1.0]
    left = [t for *_, t in turns]
    assert left.count(0) == 12 and all(a == b + 1 or a == 0 for a, b in zip(left, left[1:]))


def test_noise_in_planning_and_in_acting_are_apart():
    plan, act = followed(shown(plan_noise=0.8))
    assert plan < 0.95 and act == 1.0
    plan, act = followed(shown(act_noise=0.5))
    assert 0.3 < act < 0.8
    assert None in {t for *_, t in shown(act_noise=1.0)}               # who only errs does not arrive: no return to learn from


def test_slips_are_not_shown():
    turns = shown(slips=0.5)
    assert len(turns) > len(shown())                                   # they cost time,
    for prompt, said, _ in turns:                                      # and still what is shown is what the page calls for
        assert hiper.parse(said).valid
        at = prompt.split("At ")[1].split(":")[0].split(" closed")[0]
        assert hiper.parse(said).action != f"go to {at}"


def test_a_worker_lost_while_he_is_asked_again(monkeypatch):
    """The second question, for a random subgoal, finds the process gone: the first answer stands."""
    ask, asked = envs.Runner.expert, []

    def lossy(self, subgoals):
        asked.append(subgoals)
        return dict.fromkeys(subgoals) if len(asked) % 2 == 0 else ask(self, subgoals)
    monkeypatch.setattr(envs.Runner, "expert", lossy)
    assert followed(shown(plan_noise=1.0)) == [1.0, 1.0]


def test_names_are_one_token():
    tokenizer = scratch.train_tokenizer(["go to drawer 1, take mug 2", "[SEP] B09S3BN15C [SEP] Shirt", "click[B09S3BN15C]",
                                         "size [SEP] x-large [SEP] xx-large", "click[x-large]", "click[large]"] * 3)
    for text in (" drawer 1", " mug 2", "B09S3BN15C"):
        assert len(tokenizer(text)["input_ids"]) == 1
    pieces = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert "x-large" in pieces("with size: x-large, and") and "x-large" in pieces("<action>click[x-large]</action>")
    assert "x-large" not in pieces("xx-large") and "large" in pieces("[SEP] large [SEP]")
    assert tokenizer("B09S3BN15C")["input_ids"][0] in tokenizer("click[B09S3BN15C]")["input_ids"]


@pytest.mark.parametrize("tokens", [150, 10 ** 6])
def test_cloning_does_not_depend_on_the_micro_batches(tiny_tokenizer, tokens):
    turns = shown(range(3))[:16]
    torch.manual_seed(0)
    start = hiper.ActorCritic(scratch.tiny_model(tiny_tokenizer, "sdpa"), "shared")
    policy, reference = copy.deepcopy(start), copy.deepcopy(start)
    settings = dict(epochs=1, lr=1e-3, seed=0, gamma=0.9, success_reward=10.0, batch=8)
    loss = scratch.clone(policy, tiny_tokenizer, turns, tokens=tokens, **settings)
    expected = scratch.clone(reference, tiny_tokenizer, turns, tokens=400, **settings)
    assert loss == pytest.approx(expected, rel=1e-4)
    for (name, a), b in zip(policy.named_parameters(), reference.parameters()):
        assert torch.allclose(a, b, atol=2e-4), name


def test_cloning_cuts_long_prompts_as_playing_does(tiny_tokenizer, monkeypatch):
    turns, seen = shown(range(2))[:8], []
    samples_of = scratch.samples_of
    monkeypatch.setattr(scratch, "samples_of", lambda prompts, *rest: seen.append(prompts) or samples_of(prompts, *rest))
    policy = hiper.ActorCritic(scratch.tiny_model(tiny_tokenizer), "shared")
    scratch.clone(policy, tiny_tokenizer, turns, epochs=1, lr=1e-3, seed=0, gamma=0.9, success_reward=10.0, max_prompt=20)
    assert seen == [encode(tiny_tokenizer, [prompt for prompt, *_ in turns], 20)] and max(map(len, seen[0])) == 20
