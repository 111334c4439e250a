"""support/cloning.py and demonstrations.py: what is shown, the tokenizer, how it is cloned."""

import copy
import dataclasses
import re

import pytest
import torch
from accelerate import Accelerator

import envs
import hiper
import rollout
from config import ConfigError
from conftest import tiny_config
from support import cloning, env_workers
from support.cloning import (
    Recipe,
    clone,
    clone_expert,
    demonstrated_tasks,
    demonstrations,
    tiny_model,
    train_tokenizer,
)
from support.generation import tokenize_prompts, tokenize_texts
from worlds import household

CONFIG = tiny_config()
WITHOUT_EXPERT = """\
from worlds.household import SPLITS, size, Household


class NoExpert:
    def __init__(self, *arguments):
        env = Household(*arguments)
        self.reset, self.step, self.close = env.reset, env.step, env.close


def make(split="train", index=0):
    return NoExpert(split, index, 18)
"""


def demonstrate(tasks=range(12), history=0, **noise):
    config = tiny_config(history=history)
    with envs.EnvPool("household", "train", workers=1) as pool:
        return demonstrations(pool, list(tasks), config, **noise)


def shares_that_follow(examples):
    """Shares of the turns whose (subgoal is the plan's, action is the subgoal's).

    Plays what was shown, from the first task on.
    """
    followed = []
    rest = iter(examples)
    for index in range(12):
        env = household.make("train", index)
        env.reset()
        subgoal = ""
        while not env.done:
            _, response, *_ = next(rest)
            decision = hiper.parse(response)
            _, wanted, _ = env.expert(subgoal)
            subgoal = decision.subgoal
            followed.append((subgoal == wanted, decision.action == env.expert(subgoal)[2]))
            env.step(decision.action)
    assert next(rest, None) is None
    return [sum(column) / len(followed) for column in zip(*followed, strict=True)]


# ---- demonstrations ----------------------------------------------------------------------------


def test_without_noise_the_expert_wins_and_counts_down_to_it():
    examples = demonstrate()
    assert shares_that_follow(examples) == [1.0, 1.0]
    left = [turns_left for *_, turns_left in examples]
    assert left.count(0) == 12
    pairs = zip(left, left[1:], strict=False)
    assert all(now == after + 1 or now == 0 for now, after in pairs)


def test_noise_in_planning_leaves_the_actions():
    plan, act = shares_that_follow(demonstrate(random_subgoals=0.8))
    assert plan < 0.95
    assert act == 1.0


def test_noise_in_acting_is_not_shown():
    examples = demonstrate(action_noise=0.5)
    assert len(examples) > len(demonstrate())  # it costs turns,
    for prompt, response, *_ in examples:  # and what is shown is what the page calls for
        assert hiper.parse(response).valid
        here = prompt.split("At ")[1].split(":")[0].split(" closed")[0]
        assert hiper.parse(response).action != f"go to {here}"


def test_an_episode_that_only_errs_has_no_return_to_learn_from():
    lefts = {turns_left for *_, turns_left in demonstrate(action_noise=1.0)}
    assert None in lefts


def test_wrong_actions_mostly_change_nothing_and_are_not_shown():
    examples = demonstrate(wrong_actions=0.5)
    plain = demonstrate()
    assert len(examples) > 1.3 * len(plain)
    assert all(hiper.parse(response).valid for _, response, *_ in examples)
    assert sum("Nothing happens" in prompt for prompt, *_ in examples) > 5
    assert not any("Nothing happens" in prompt for prompt, *_ in plain)


def test_the_history_tells_what_happened(monkeypatch):
    """Not what was shown, where noise put another action in its place."""
    step = envs.EnvPool.step
    taken = []

    def watched(self, actions):
        taken.append(actions[0])
        return step(self, actions)

    monkeypatch.setattr(envs.EnvPool, "step", watched)
    examples = demonstrate([0], history=2, action_noise=0.5, wrong_actions=0.2)
    shown = [hiper.parse(response).action for _, response, *_ in examples]
    assert shown != taken
    for t, (prompt, *_) in enumerate(examples):
        assert re.findall("You did: (.*)", prompt) == taken[max(0, t - 2) : t]


def test_a_worker_lost_while_the_expert_is_asked_again(monkeypatch):
    """The second question, for a random subgoal, finds the process gone: the first one stands."""
    ask = envs.EnvPool.expert
    asked = []

    def lossy(self, subgoals):
        asked.append(subgoals)
        return dict.fromkeys(subgoals) if len(asked) % 2 == 0 else ask(self, subgoals)

    monkeypatch.setattr(envs.EnvPool, "expert", lossy)
    assert shares_that_follow(demonstrate(random_subgoals=1.0)) == [1.0, 1.0]


def test_a_demonstration_lost_in_a_step_is_left_out(monkeypatch):
    step = envs.EnvPool.step

    def lossy(self, actions):
        return {**step(self, actions), 1: None} if 1 in actions else step(self, actions)

    plain = demonstrate(range(3))
    others = demonstrate([0]) + demonstrate([2])
    monkeypatch.setattr(envs.EnvPool, "step", lossy)
    assert demonstrate(range(3)) == others
    assert len(others) < len(plain)


@pytest.mark.parametrize("method", ["step", "expert"])
def test_a_demonstration_lost_once_is_begun_anew(monkeypatch, method):
    """All but the second call of a worker's are answered."""
    call = env_workers.LocalEnvs.call
    calls = []

    def lossy(self, name, arguments):
        answers, lost = call(self, name, arguments)
        calls.append(name)
        if name == method and calls.count(name) == 3:
            answers.pop(1)
            lost = {1: "died"}
        return answers, lost

    plain = [demonstrate([n]) for n in range(3)]
    monkeypatch.setattr(env_workers.LocalEnvs, "call", lossy)
    assert demonstrate(range(3)) == plain[0] + plain[2] + plain[1]


def test_disguises_come_after_what_they_disguise(monkeypatch):
    """As often as asked."""
    plain = demonstrate(range(2))

    def disguise(episodes, rng):
        return [[("x" + prompt, *rest) for prompt, *rest in turns] for turns in episodes]

    monkeypatch.setattr(household, "disguise", disguise, raising=False)
    disguised = [("x" + prompt, *rest) for prompt, *rest in plain]
    assert demonstrate(range(2), disguises=2) == plain + 2 * disguised


def test_a_world_without_disguises_says_so():
    with pytest.raises(ConfigError, match="has no `disguise`"):
        demonstrate(range(2), disguises=1)


def test_a_world_without_an_expert_says_so(tmp_path, monkeypatch):
    (tmp_path / "testing_no_expert.py").write_text(WITHOUT_EXPERT)
    monkeypatch.syspath_prepend(tmp_path)
    with envs.EnvPool("testing_no_expert") as pool:
        with pytest.raises(ConfigError, match="has no expert to clone: give --model"):
            demonstrations(pool, [0], CONFIG)


def test_an_expert_that_never_begins_is_one_sentence(monkeypatch):
    monkeypatch.setattr(household.Household, "expert", lambda self, subgoal: None)
    with pytest.raises(ConfigError, match="expert of world 'household' gives no advice"):
        demonstrate(range(2))


def test_an_unknown_setting_of_the_demonstrator_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(household, "DEMONSTRATOR", {"noise": 0.1})
    with envs.EnvPool("household") as pool:
        with pytest.raises(ConfigError, match="DEMONSTRATOR of world 'household'.*'noise'"):
            clone_expert(tiny_config(), tmp_path, pool, Accelerator(cpu=True))


def test_demonstrated_tasks():
    assert demonstrated_tasks(10, 4, 0) == [0, 1, 2, 3]
    assert demonstrated_tasks(3, 4, 0) == [0, 1, 2, 0]
    assert demonstrated_tasks(100, 6, 3) == [0, 0, 33, 33, 66, 66]
    assert demonstrated_tasks(2, 4, 3) == [0, 0, 1, 1]


# ---- tokenizer ---------------------------------------------------------------------------------

TEXTS = [
    "go to drawer 1, take mug 2",
    "[SEP] B09S3BN15C [SEP] Shirt",
    "click[B09S3BN15C]",
    "size [SEP] x-large [SEP] xx-large",
    "click[x-large]",
    "click[large]",
]


def test_names_are_one_token():
    tokenizer = train_tokenizer(TEXTS * 3)
    for text in (" drawer 1", " mug 2", "B09S3BN15C"):
        assert len(tokenizer(text)["input_ids"]) == 1
    assert tokenizer("B09S3BN15C")["input_ids"][0] in tokenizer("click[B09S3BN15C]")["input_ids"]


def test_options_are_one_token_where_they_stand_alone():
    tokenizer = train_tokenizer(TEXTS * 3)

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert "x-large" in pieces("with size: x-large, and")
    assert "x-large" in pieces("<action>click[x-large]</action>")
    assert "x-large" not in pieces("xx-large")
    assert "large" in pieces("[SEP] large [SEP]")


# ---- cloning -----------------------------------------------------------------------------------


def new_policy(tokenizer):
    torch.manual_seed(0)
    return hiper.ActorCritic(tiny_model(tokenizer, "sdpa"), "shared")


@pytest.mark.parametrize("tokens", [150, 10**6])
def test_cloning_does_not_depend_on_the_micro_batches(tiny_tokenizer, tokens):
    recipe = Recipe(lr=1e-3, epochs=1, batch=8)
    examples = demonstrate(range(3))[:16]
    policy = new_policy(tiny_tokenizer)
    reference = copy.deepcopy(policy)
    config = tiny_config(gamma=0.9, micro_batch_tokens=tokens)
    loss = clone(policy, tiny_tokenizer, examples, config, recipe)
    config = dataclasses.replace(config, micro_batch_tokens=400)
    expected = clone(reference, tiny_tokenizer, examples, config, recipe)
    assert loss == pytest.approx(expected, rel=1e-4)
    pairs = zip(policy.named_parameters(), reference.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        assert torch.allclose(mine, theirs, atol=2e-4), name


def test_cloning_s_first_step_is_that_of_its_loss(tiny_tokenizer, monkeypatch):
    """Mean nats of the responses' tokens, by the model's own logits; norm before clipping."""
    monkeypatch.setattr(cloning, "VALUE_WEIGHT", 0.0)
    clip = torch.nn.utils.clip_grad_norm_
    norms = []

    def clip_and_note(*arguments):
        norms.append(clip(*arguments))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)
    examples = demonstrate(range(2))[:6]
    policy = new_policy(tiny_tokenizer)
    start = copy.deepcopy(policy)
    recipe = Recipe(lr=1e-3, epochs=1, batch=6)
    clone(policy, tiny_tokenizer, examples, tiny_config(gamma=0.9), recipe)
    logprobs = []
    for prompt, response, *_ in examples:
        prompt_ids = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response_ids = tiny_tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(prompt_ids + response_ids)
        every = start.actor(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = every[torch.arange(len(ids) - 1), ids[1:]]
        logprobs.append(chosen[len(prompt_ids) - 1 :])
    (-torch.cat(logprobs).mean()).backward()
    gradients = [p.grad.flatten() for p in start.parameters() if p.grad is not None]
    assert norms[0].item() == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)


def test_a_step_without_a_finite_gradient_is_skipped(tiny_tokenizer, monkeypatch):
    """The second of three. Where all are skipped, it is said."""
    clip = torch.nn.utils.clip_grad_norm_
    norms = []

    def clip_and_harm(parameters, limit):
        parameters = list(parameters)
        if len(norms) in harmed:
            parameters[0].grad[0, 0] = float("nan")
        norms.append(clip(parameters, limit))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_harm)
    examples = demonstrate(range(3))[:12]
    recipe = Recipe(lr=1e-3, epochs=1, batch=4)
    policy = new_policy(tiny_tokenizer)
    start = copy.deepcopy(policy.state_dict())
    harmed = [1]
    assert clone(policy, tiny_tokenizer, examples, CONFIG, recipe) > 0
    assert norms[1].isnan() and norms[2].isfinite()
    assert all(weight.isfinite().all() for weight in policy.parameters())
    assert any(not torch.equal(w, start[name]) for name, w in policy.state_dict().items())
    harmed = range(3, 6)
    with pytest.raises(FloatingPointError, match="cloning found no finite gradient"):
        clone(policy, tiny_tokenizer, examples, CONFIG, recipe)


def test_a_clone_with_nan_is_not_saved(monkeypatch, tmp_path):
    def harm(policy, *_):
        policy.value_heads.weight.data[0, 0] = float("nan")
        return 0.0

    monkeypatch.setattr(cloning, "clone", harm)
    with envs.EnvPool("household") as pool:
        with pytest.raises(FloatingPointError, match="value_heads.weight has become NaN"):
            clone_expert(tiny_config(bc_episodes=2), tmp_path, pool, Accelerator(cpu=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("history, room", [(0, 20), (2, 90), (2, 20)])
def test_cloning_shortens_prompts_as_playing_does(tiny_tokenizer, monkeypatch, history, room):
    """The same prompts, whole, without their history or cut, where the shown actions are played."""
    make_samples = cloning.make_samples
    cloned = []

    def recorded(prompts, *rest):
        cloned.extend(prompts)
        return make_samples(prompts, *rest)

    monkeypatch.setattr(cloning, "make_samples", recorded)
    examples = demonstrate([0], history=history)
    config = tiny_config(max_prompt_tokens=room, history=history)
    clone(new_policy(tiny_tokenizer), tiny_tokenizer, examples, config)

    responses = iter(tokenize_texts(tiny_tokenizer, [response for _, response, *_ in examples]))
    monkeypatch.setattr(rollout, "respond", lambda *_: [next(responses)])
    with envs.EnvPool("household", "train", workers=1) as pool:
        [episode] = rollout.collect(None, tiny_tokenizer, pool, [0], config)
    assert episode.success
    assert cloned == [turn.prompt for turn in episode.turns]
    whole = tokenize_prompts(tiny_tokenizer, [prompt for prompt, *_ in examples])
    assert any(len(prompt) > room for prompt in whole)


def test_cloning_s_value_heads_learn_the_returns(tiny_tokenizer, monkeypatch):
    """10 gamma^(turns left), 0 without success. The heads start at 0, so the gradient of each
    bias is minus twice the mean return, in however many micro-batches."""
    gradients = []

    def clip(parameters, limit):
        gradients.append(policy.value_heads.bias.grad / cloning.VALUE_WEIGHT)
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    left = (2, 1, 0, None, None, 3)
    shown = demonstrate(range(2))[:6]
    examples = [(*texts, turns) for (*texts, _), turns in zip(shown, left, strict=True)]
    policy = new_policy(tiny_tokenizer)
    config = tiny_config(gamma=0.9, micro_batch_tokens=150)
    clone(policy, tiny_tokenizer, examples, config, Recipe(lr=1e-3, epochs=1, batch=6))
    mean = (8.1 + 9 + 10 + 7.29) / 6
    assert gradients[0].tolist() == pytest.approx([-2 * mean] * 3, rel=1e-4)


def test_cloning_takes_each_turn_once_a_pass_in_random_order():
    batches = cloning._shuffled_batches(12, Recipe(lr=1e-3, epochs=2, batch=4), seed=0)
    assert [len(rows) for rows in batches] == [4] * 6
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(12))
    assert len({tuple(first), tuple(second), tuple(range(12))}) == 3


def test_cloning_s_rate_rises_for_30_steps_and_falls_to_a_twentieth(tiny_tokenizer, monkeypatch):
    rates = []
    scheduler = torch.optim.lr_scheduler.LambdaLR

    def recorded(optimizer, ramp):
        rates.extend(map(ramp, range(40)))
        return scheduler(optimizer, ramp)

    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", recorded)
    examples = demonstrate(range(8))[:40]
    recipe = Recipe(lr=1e-3, epochs=1, batch=1)
    clone(new_policy(tiny_tokenizer), tiny_tokenizer, examples, tiny_config(), recipe)
    wanted = {0: 1 / 30, 14: (1 - 0.95 * 14 / 40) / 2, 29: 1 - 0.95 * 29 / 40, 39: 0.05 + 0.95 / 40}
    assert {step: rates[step] for step in wanted} == pytest.approx(wanted)


def test_a_random_subgoal_is_a_switch_where_the_expert_switches():
    """On KEEP turns the carried subgoal is repeated."""
    rest = iter(demonstrate(random_subgoals=0.8))
    for index in range(12):
        env = household.make("train", index)
        env.reset()
        subgoal = ""
        while not env.done:
            decision = hiper.parse(next(rest)[1])
            switches = env.expert(subgoal)[0]
            assert decision.switch == switches
            assert switches or decision.subgoal == subgoal
            subgoal = decision.subgoal
            env.step(decision.action)
    assert next(rest, None) is None


def test_noise_in_acting_also_takes_actions_of_earlier_turns():
    """Some of them fail by now."""
    assert any("Nothing happens" in prompt for prompt, *_ in demonstrate(action_noise=0.5))


def test_another_seed_errs_in_other_ways():
    def noisy(seed):
        with envs.EnvPool("household", "train", workers=1) as pool:
            return demonstrations(pool, range(6), tiny_config(seed=seed), random_subgoals=0.5)

    assert noisy(0) == noisy(0) != noisy(1)


def test_an_episode_is_shown_up_to_where_the_expert_has_no_advice(monkeypatch):
    advise = household.Household.expert

    def two_turns(self, subgoal):
        return advise(self, subgoal) if self.steps < 2 else None

    monkeypatch.setattr(household.Household, "expert", two_turns)
    assert [left for *_, left in demonstrate([0])] == [None, None]


def test_the_thought_of_the_flat_prompt_is_the_subgoal():
    with envs.EnvPool("household", "train", workers=1) as pool:
        flat = demonstrations(pool, range(3), tiny_config(prompt="flat", method="ppo"))
        plans = demonstrations(pool, range(3), tiny_config())
    assert len(flat) == len(plans)
    for (_, thought, *_), (_, plan_of_it, *_) in zip(flat, plans, strict=True):
        decision = hiper.parse(plan_of_it)
        assert thought == hiper.format_flat_response(decision.subgoal, decision.action)
