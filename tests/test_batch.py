"""support/batch.py and support/scoring.py: what training makes of episodes, and micro-batches."""

import random

import pytest
import torch

import hiper
from conftest import tiny_config
from hiper import ActorCritic, format_plan, format_response
from rollout import AgentState, Episode, Turn, make_batch
from sample_texts import VALID, bytes_tokenizer, encode, said, soup
from support import cloning
from support.batch import append_keep_block, make_samples
from support.scoring import compute_logprobs_and_values, micro_batches

BYTES = bytes_tokenizer()


def episode_of(texts, tokenizer, *, index=0, truncated=False, pages=None):
    """An Episode as `collect` makes it: the agent said `texts`, one a turn."""
    config = tiny_config()
    info = {"task": f"task {index}", "task_type": "", "admissible": [], "won": False, "score": 0.0}
    pages = pages or [f"page {index}.{t}" for t in range(len(texts) + 1)]
    state = AgentState(config, index, pages[0], info)
    for t, text in enumerate(texts):
        last = t == len(texts) - 1
        outcome = (pages[t + 1], 0.0, last and not truncated, last and truncated, info)
        ids = encode(tokenizer, [state.prompt(), text])
        state.record_turn(*ids, hiper.parse(text), outcome)
    return state.to_episode(encode(tokenizer, state.prompt()))


SCRIPTS = [
    [format_response(True, "a", "x"), format_response(False, "a", "x"), said("SWITCH", "b")],
    [format_response(False, "a", "x")],
    ["junk", format_response(False, "a", "lose")],
    [format_response(False, "a", "x")],
]


@pytest.fixture
def episodes(tiny_tokenizer):
    return [
        episode_of(script, tiny_tokenizer, index=b % 3, truncated=b % 2 == 1)
        for b, script in enumerate(SCRIPTS)
    ]


# ---- batches -----------------------------------------------------------------------------------


def test_a_batch_says_what_the_episodes_say(episodes, tiny_tokenizer):
    batch = make_batch(episodes, tiny_tokenizer)
    places = list(zip(batch.episode_idx.tolist(), batch.turn_idx.tolist(), strict=True))
    assert places == [(b, t) for b, e in enumerate(episodes) for t in range(len(e.turns))]
    assert batch.mask.shape == (4, 3)
    assert batch.mask.dtype == batch.switch.dtype == batch.truncated.dtype == torch.bool
    for b, e in enumerate(episodes):
        n = len(e.turns)
        rest = 3 - n
        assert batch.mask[b].tolist() == [True] * n + [False] * rest
        rewards = [turn.reward for turn in e.turns]
        assert batch.rewards[b].tolist() == pytest.approx(rewards + [0.0] * rest)
        opens = [turn.is_segment_start for turn in e.turns]
        assert batch.switch[b].tolist() == opens + [False] * rest
        assert batch.final_states.prompts[b] == e.final_prompt
        kept = tiny_tokenizer.decode(batch.final_states.responses[b])
        assert kept == format_plan(e.turns[-1].subgoal, switch=False)
    assert batch.rewards.abs().sum() > 0
    assert batch.truncated.tolist() == [False, True, False, True]
    turns = [turn for e in episodes for turn in e.turns]
    assert batch.samples.prompts == [turn.prompt for turn in turns]
    assert batch.samples.responses == [turn.response for turn in turns]
    assert batch.samples.lengths.tolist() == [len(turn.response) for turn in turns]
    assert batch.prev_subgoals == [turn.prev_subgoal for turn in turns]
    assert batch.prev_subgoals == ["", "a", "a", "", "", "", ""]


def test_the_ways_between_turns_and_grid(episodes, tiny_tokenizer):
    batch = make_batch(episodes, tiny_tokenizer)
    x = torch.arange(1.0, len(batch.episode_idx) + 1)
    assert torch.equal(batch.to_turns(batch.to_grid(x)), x)
    assert not batch.to_grid(x)[~batch.mask].any()
    assert batch.to_grid(x)[2].tolist() == [5, 6, 0]
    grid = torch.randn(4, 3, requires_grad=True)  # they carry gradients
    batch.to_turns(grid).sum().backward()
    assert torch.equal(grid.grad, batch.mask.float())


def test_groups_are_by_draw(tiny_tokenizer):
    """A task that is drawn twice makes two groups: its index says nothing."""
    texts = [format_response(True, "a", "x")]
    episodes = [episode_of(texts, tiny_tokenizer, index=i) for i in (5, 5, 5, 5, 2, 2)]
    assert make_batch(episodes, tiny_tokenizer).group.tolist() == [0, 1, 2, 3, 4, 5]
    assert make_batch(episodes, tiny_tokenizer, group_size=2).group.tolist() == [0, 0, 1, 1, 2, 2]
    assert make_batch(episodes, tiny_tokenizer, 3).group.tolist() == [0, 0, 0, 1, 1, 1]


def test_equal_observations_have_equal_numbers(tiny_tokenizer):
    texts = [format_response(True, "a", "x")] * 3
    pages = (["hall", "attic", "hall", ""], ["attic", "cellar", "attic", ""])
    episodes = [episode_of(texts, tiny_tokenizer, pages=list(p)) for p in pages]
    assert make_batch(episodes, tiny_tokenizer).state.tolist() == [[0, 1, 0], [1, 2, 1]]


def test_final_states_are_valued_after_the_prompt_and_after_the_kept_subgoal(
    tiny_policy, tiny_tokenizer
):
    scripts = [
        [format_response(True, "find a mug", "x"), format_response(False, "", "x")],
        ["junk"],  # never had a subgoal
    ]
    episodes = [episode_of(script, tiny_tokenizer) for script in scripts]
    batch = make_batch(episodes, tiny_tokenizer)
    kept = tiny_tokenizer.decode(batch.final_states.responses[1])
    assert kept == format_plan("None", switch=False)
    got = compute_logprobs_and_values(tiny_policy, batch.final_states, [[0, 1]], logprobs=False)
    for b, e in enumerate(episodes):
        keep = encode(tiny_tokenizer, format_plan(e.turns[-1].subgoal, switch=False))
        with torch.no_grad():
            out = tiny_policy.critic(input_ids=torch.tensor([e.final_prompt + keep]))
            values = tiny_policy.value_heads(out.last_hidden_state[0])  # [P + L, 3]
        end = len(e.final_prompt) - 1
        assert got.v_high[b].item() == pytest.approx(values[end, 0].item(), abs=1e-5)
        assert got.v_switch[b].item() == pytest.approx(values[end, 2].item(), abs=1e-5)
        assert got.v_low[b].item() == pytest.approx(values[-1, 1].item(), abs=1e-5)  # </subgoal>
        assert values[:, 1].unique().numel() > 3


def test_an_end_token_that_is_also_the_pad_is_kept_and_trained(tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    assert end == tiny_tokenizer.pad_token_id
    words = encode(tiny_tokenizer, "no action at all")
    turns = [
        Turn(
            prompt=[5],
            response=answer,
            decision=hiper.parse(""),
            is_segment_start=True,
            prev_subgoal="",
            subgoal="",
            observation="",
            reward=0.0,
        )
        for answer in (words + [end], [end], words)
    ]
    episode = Episode(
        index=0,
        task="",
        task_type="",
        turns=turns,
        success=False,
        task_score=0.0,
        truncated=False,
        final_prompt=[5],
        restarts=0,
    )
    samples = make_batch([episode], tiny_tokenizer).samples
    want = [len(words) + 1, 1, len(words)]
    assert samples.lengths.tolist() == want
    assert samples.masks.action.sum(1).tolist() == want
    assert samples.response_mask().sum(1).tolist() == want


# ---- samples -----------------------------------------------------------------------------------


def ragged_samples(n=5, seed=0):
    rng = random.Random(seed)
    texts = [VALID, "junk", said(), "", said("SWITCH", "é.", "x")][:n]
    texts += [soup(rng)[:60] for _ in range(n - 5)]
    prompts = [[rng.randrange(257) for _ in range(rng.randrange(1, 30))] for _ in texts]
    return make_samples(prompts, encode(BYTES, texts), BYTES)


def test_samples_hold_masks_and_places_of_the_sampled_ids():
    samples = ragged_samples(12)
    width = max(map(len, samples.responses))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in samples.responses])
    assert samples.lengths.tolist() == [len(row) for row in samples.responses]
    for got, want in zip(
        samples.masks, hiper.decision_masks(ids, samples.lengths, BYTES), strict=True
    ):
        assert torch.equal(got, want)
    want = hiper.subgoal_positions(ids, samples.lengths, BYTES)
    assert torch.equal(samples.subgoal_pos, want)
    for n, row in enumerate(samples.responses):
        want = [True] * len(row) + [False] * (width - len(row))
        assert samples.response_mask()[n].tolist() == want
        assert samples.total_lengths()[n] == len(samples.prompts[n]) + len(row)


def test_model_inputs_are_right_padded_and_in_the_order_asked_for():
    samples = ragged_samples()
    rows = [4, 0, 3]
    ids, prompt_lengths, lengths, subgoal_pos = samples.model_inputs(rows, "cpu")
    whole = [samples.prompts[n] + samples.responses[n] for n in rows]
    assert ids.shape == (3, max(map(len, whole)))
    for k, (n, sequence) in enumerate(zip(rows, whole, strict=True)):
        assert ids[k, : len(sequence)].tolist() == sequence
        assert not ids[k, len(sequence) :].any()
        assert prompt_lengths[k] == len(samples.prompts[n])
        assert lengths[k] == samples.lengths[n]
        assert subgoal_pos[k] == samples.subgoal_pos[n]


def test_append_keep_block_says_keep_and_the_carried_subgoal(tiny_tokenizer):
    samples = append_keep_block([[1], [2, 3]], ["find a mug", ""], tiny_tokenizer)
    texts = [tiny_tokenizer.decode(row) for row in samples.responses]
    assert texts == [
        "<switch>KEEP</switch><subgoal>find a mug</subgoal>",
        "<switch>KEEP</switch><subgoal>None</subgoal>",
    ]
    assert samples.prompts == [[1], [2, 3]]
    tags = [row[n] for row, n in zip(samples.responses, samples.subgoal_pos, strict=True)]
    assert tiny_tokenizer.convert_ids_to_tokens(tags) == ["</subgoal>"] * 2


# ---- scoring -----------------------------------------------------------------------------------


def random_policy(critic="shared"):
    torch.manual_seed(0)
    policy = ActorCritic(cloning.tiny_model(BYTES, hidden=32, layers=1), critic)
    torch.nn.init.normal_(policy.value_heads.weight)
    torch.nn.init.normal_(policy.value_heads.bias)
    return policy


def test_scores_do_not_depend_on_the_micro_batches():
    policy = random_policy()
    samples = ragged_samples(12)
    with torch.no_grad():
        whole = policy(*samples.model_inputs(list(range(12)), "cpu"))
    for tokens in (1, 150, 400, 10**6):
        batches = micro_batches(samples.total_lengths(), tokens)
        got = compute_logprobs_and_values(policy, samples, batches)
        for a, b in zip(got, whole, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
            assert not a.requires_grad


def test_what_is_not_asked_for_is_zero():
    policy = random_policy()
    samples = ragged_samples()
    rows = [[0, 1, 2, 3, 4]]
    whole = compute_logprobs_and_values(policy, samples, rows)
    logprobs = compute_logprobs_and_values(policy, samples, rows, values=False)
    values = compute_logprobs_and_values(policy, samples, rows, logprobs=False)
    assert torch.equal(logprobs.logprobs, whole.logprobs)
    assert torch.equal(values.v_low, whole.v_low)
    assert not any(x.any() for x in (*logprobs[2:], *values[:2]))
    assert [x.shape for x in logprobs] == [x.shape for x in values] == [x.shape for x in whole]


def test_micro_batches_partition_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randrange(1, 60) for _ in range(rng.randrange(40))]
        tokens = rng.randrange(1, 400)
        cuts = micro_batches(lengths, tokens)
        assert sorted(n for cut in cuts for n in cut) == list(range(len(lengths)))
        for cut in cuts:
            assert cut
            assert len(cut) == 1 or len(cut) * max(lengths[n] for n in cut) <= tokens
        for cut, after in zip(cuts, cuts[1:], strict=False):  # and no cut comes early
            assert (len(cut) + 1) * lengths[after[0]] > tokens
    assert micro_batches([], 10) == []
    assert micro_batches([5, 5], 10) == [[0, 1]]


def test_micro_batches_of_some_rows():
    lengths = [9, 1, 8, 2, 7]
    assert micro_batches(lengths, 16, [4, 3, 2]) == [[3, 4], [2]]
    assert micro_batches(lengths, 16, []) == []
