"""scratch.py: what the demonstrator shows and how it is cloned."""

import copy

import pytest
import torch

import envs
import hiper
from worlds import household
from support import cloning as scratch
from rollout import Style, encode

STYLE = Style(history=0, brief=True, show_admissible=False)


def shown(tasks=range(12), style=STYLE, **changes):
    with envs.Runner("household", "train", 1) as runner:
        return scratch.demonstrations(
            runner, tasks, style=style, **{"plan_noise": 0.0, "slips": 0.0, "seed": 0, **changes}
        )


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
    assert None in {
        t for *_, t in shown(act_noise=1.0)
    }  # who only errs does not arrive: no return to learn from


def test_slips_are_not_shown():
    turns = shown(slips=0.5)
    assert len(turns) > len(shown())  # they cost time,
    for prompt, said, _ in turns:  # and still what is shown is what the page calls for
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
    tokenizer = scratch.train_tokenizer(
        [
            "go to drawer 1, take mug 2",
            "[SEP] B09S3BN15C [SEP] Shirt",
            "click[B09S3BN15C]",
            "size [SEP] x-large [SEP] xx-large",
            "click[x-large]",
            "click[large]",
        ]
        * 3
    )
    for text in (" drawer 1", " mug 2", "B09S3BN15C"):
        assert len(tokenizer(text)["input_ids"]) == 1
    pieces = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert "x-large" in pieces("with size: x-large, and") and "x-large" in pieces(
        "<action>click[x-large]</action>"
    )
    assert "x-large" not in pieces("xx-large") and "large" in pieces("[SEP] large [SEP]")
    assert tokenizer("B09S3BN15C")["input_ids"][0] in tokenizer("click[B09S3BN15C]")["input_ids"]


@pytest.mark.parametrize("tokens", [150, 10**6])
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


def test_cloning_s_first_step_is_that_of_its_loss(tiny_tokenizer, monkeypatch):
    """Mean nats of the answers' tokens, by the model's own logits; the norm is that before clipping."""
    turns, norms = shown(range(2))[:6], []
    policy = hiper.ActorCritic(scratch.tiny_model(tiny_tokenizer), "shared")
    start, clip = copy.deepcopy(policy), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)))
    scratch.clone(
        policy,
        tiny_tokenizer,
        turns,
        epochs=1,
        lr=1e-3,
        seed=0,
        gamma=0.9,
        success_reward=10.0,
        batch=6,
        value_weight=0.0,
    )
    answered = []
    for prompt, said, _ in turns:
        asked = len(tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(
            tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
            + tiny_tokenizer(said, add_special_tokens=False)["input_ids"]
        )
        logp = (
            start.actor(input_ids=ids[None])
            .logits[0, :-1]
            .log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        )
        answered.append(logp[asked - 1 :])
    (-torch.cat(answered).mean()).backward()
    assert norms[0].item() == pytest.approx(
        torch.cat([p.grad.flatten() for p in start.parameters() if p.grad is not None])
        .norm()
        .item(),
        rel=1e-4,
    )


def test_blunders_mostly_lead_nowhere_and_are_not_shown():
    turns = shown(blunders=0.5)
    assert len(turns) > 1.3 * len(shown()) and all(hiper.parse(said).valid for _, said, _ in turns)
    assert sum("Nothing happens" in prompt for prompt, *_ in turns) > 5 and not any(
        "Nothing happens" in prompt for prompt, *_ in shown()
    )


def test_disguises_come_after_what_they_disguise(monkeypatch):
    """As often as asked; and a world without them says so."""
    plain = shown(range(2))
    with pytest.raises(RuntimeError, match="no other names"):
        shown(range(2), disguises=1)
    monkeypatch.setattr(
        household,
        "disguise",
        lambda episodes, rng: [
            [("x" + prompt, said, left) for prompt, said, left in turns] for turns in episodes
        ],
        raising=False,
    )
    assert shown(range(2), disguises=2) == plain + 2 * [
        ("x" + prompt, said, left) for prompt, said, left in plain
    ]


def test_cloning_cuts_long_prompts_as_playing_does(tiny_tokenizer, monkeypatch):
    turns, seen = shown(range(2))[:8], []
    samples_of = scratch.samples_of
    monkeypatch.setattr(
        scratch,
        "samples_of",
        lambda prompts, *rest: seen.append(prompts) or samples_of(prompts, *rest),
    )
    policy = hiper.ActorCritic(scratch.tiny_model(tiny_tokenizer), "shared")
    scratch.clone(
        policy,
        tiny_tokenizer,
        turns,
        epochs=1,
        lr=1e-3,
        seed=0,
        gamma=0.9,
        success_reward=10.0,
        max_prompt=20,
    )
    assert (
        seen == [encode(tiny_tokenizer, [prompt for prompt, *_ in turns], 20)]
        and max(map(len, seen[0])) == 20
    )
