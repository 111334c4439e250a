"""hiper.py: losses, token advantages, log-probs and the actor-critic against slow oracles."""

import copy
import math
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

import hiper
from config import ConfigError
from conftest import tiny_config
from hiper import ActorCritic
from sample_texts import VALID, bytes_tokenizer, encode, oracle_blocks, said, soup
from support import cloning
from support.batch import make_samples
from support.loading import check_output_layer, load_actor
from support.tokens import response_text

BYTES = bytes_tokenizer()


# ---- losses against hand-written scalars -------------------------------------------------------


def test_token_advantages():
    masks = hiper.Masks(
        switch=torch.tensor([[1, 0, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 0]]).bool(),
        subgoal=torch.tensor([[0, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 0, 0]]).bool(),
        action=torch.tensor([[0, 0, 0, 1, 0]] * 2 + [[1, 1, 1, 1, 0]]).bool(),  # unreadable
    )  # [3, 5] each
    where = {
        "switch": torch.tensor([True, True, True]),
        "subgoal": torch.tensor([True, False, True]),
        "action": torch.tensor([True, True, True]),
    }
    advantages = {
        "switch": torch.tensor([1.0, 2.0, 3.0]),
        "subgoal": torch.tensor([10.0, 20.0, 30.0]),
        "action": torch.tensor([-100.0, -200.0, -300.0]),
    }
    adv, trained = hiper.token_advantages(masks, where, advantages)
    assert adv.tolist() == [[1, 10, 10, -100, 0], [2, 0, 0, -200, 0], [-300, -300, -300, -300, 0]]
    assert trained.tolist() == [
        [True] * 4 + [False],
        [True, False, False, True, False],
        [True] * 4 + [False],
    ]
    assert trained.dtype == torch.bool


@pytest.mark.parametrize("kind", hiper.DECISIONS)
def test_a_decision_that_is_not_taken_has_no_tokens(kind):
    columns = torch.eye(3).bool()[:, None]  # [3, 1, 3]: token k belongs to decision k
    masks = hiper.Masks(*columns)
    taken = {other: torch.tensor([other != kind]) for other in hiper.DECISIONS}
    advantages = {other: torch.tensor([float(k + 1)]) for k, other in enumerate(hiper.DECISIONS)}
    adv, trained = hiper.token_advantages(masks, taken, advantages)
    missing = hiper.DECISIONS.index(kind)
    assert trained.tolist() == [[k != missing for k in range(3)]]
    assert adv.tolist() == [[k + 1 if k != missing else 0 for k in range(3)]]


@pytest.mark.parametrize(
    "ratio, adv, loss, clipped",
    [
        (1.0, 3.0, -3.0, False),
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),  # inside
        (1.5, 2.0, -2.4, True),
        (0.5, -2.0, 1.6, True),  # further than wanted: no gradient
        (0.5, 2.0, -1.0, False),
        (1.5, -2.0, 3.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)  # the wrong way: pulled back in full
def test_policy_loss(ratio, adv, loss, clipped):
    logp = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.5]], dtype=torch.float64)
    got, active = hiper.policy_loss(logp, old, torch.tensor([[adv]]), clip_range=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert active.tolist() == [[clipped]]
    assert got.shape == (1, 1)
    assert logp.grad.item() == pytest.approx(0 if clipped else -ratio * adv)


@pytest.mark.parametrize(
    "logp, adv, clip, loss",
    [(1.0, 1.0, None, -1.2), (1.0, 1.0, 0.5, -1.5), (-1.0, -1.0, 0.5, 0.5)],
)
def test_policy_loss_clips_at_its_argument(logp, adv, clip, loss):
    given = {} if clip is None else {"clip_range": clip}
    got, _ = hiper.policy_loss(torch.tensor([logp]), torch.zeros(1), torch.tensor([adv]), **given)
    assert got.item() == pytest.approx(loss)


def test_k3_estimates_kl_with_the_right_sign():
    pi = torch.tensor([0.7, 0.2, 0.09, 0.01]).double()
    ref = torch.tensor([0.25, 0.25, 0.3, 0.2]).double()
    kl = (pi * (pi / ref).log()).sum().item()
    other_way = (ref * (ref / pi).log()).sum().item()
    k3 = hiper.kl_k3(pi.log(), ref.log())
    assert (k3 > 0).all()
    assert (hiper.kl_k3(pi.log(), pi.log()) == 0).all()
    assert k3[0].item() == pytest.approx(0.25 / 0.7 - 1 - math.log(0.25 / 0.7))
    assert (pi * k3).sum().item() == pytest.approx(kl)  # the exact expectation under pi
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(pi, 20000, replacement=True, generator=generator)
    sampled = k3[drawn].mean().item()
    assert abs(sampled - kl) < 0.05 < abs(other_way - kl) / 2


@pytest.mark.parametrize(
    "value, old, target, clip, loss, grad",
    [
        (2.0, 1.0, 5.0, 0, 4.5, -3.0),
        (2.0, 1.0, 5.0, 0.5, 6.125, 0.0),  # moved too far: the clipped error is worse
        (1.2, 1.0, 5.0, 0.5, 7.22, -3.8),
        (2.0, 1.0, -1.0, 0.5, 4.5, 3.0),  # inside; too far the wrong way
        (0.0, 1.0, -5.0, 0.5, 15.125, 0.0),
        (0.0, 1.0, -5.0, 2.0, 12.5, 5.0),
    ],
)
def test_value_loss(value, old, target, clip, loss, grad):
    value = torch.tensor([value], requires_grad=True)
    got = hiper.value_loss(value, torch.tensor([old]), torch.tensor([target]), clip)
    got.sum().backward()
    assert got.tolist() == pytest.approx([loss])
    assert value.grad.item() == pytest.approx(grad, abs=1e-6)


def test_value_loss_clips_at_a_half_by_default():
    got = hiper.value_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([5.0]))
    assert got.item() == pytest.approx(6.125)


# ---- actor-critic ------------------------------------------------------------------------------


@pytest.fixture
def actor():
    torch.manual_seed(0)
    return cloning.tiny_model(BYTES, hidden=32, layers=1)


def policy_of(actor, critic="shared"):
    policy = ActorCritic(actor, critic)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(policy.value_heads.weight, generator=generator)
    generator = torch.Generator().manual_seed(2)
    torch.nn.init.normal_(policy.value_heads.bias, generator=generator)
    return policy


def ragged_samples(n=5, seed=0, texts=None):
    """Ragged random samples on the byte tokenizer: valid answers, junk, an empty response."""
    rng = random.Random(seed)
    if texts is None:
        texts = [VALID, "junk", said(), "", said("SWITCH", "é.", "x")][:n]
        texts += [soup(rng)[:60] for _ in range(n - 5)]
    prompts = [[rng.randrange(257) for _ in range(rng.randrange(1, 30))] for _ in texts]
    return make_samples(prompts, encode(BYTES, texts), BYTES)


def forward(policy, batch, rows=None, **kwargs):
    rows = list(range(len(batch.prompts))) if rows is None else rows
    return policy(*batch.model_inputs(rows, "cpu"), **kwargs)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_scores_match_a_full_forward_row_by_row(actor, critic):
    policy = policy_of(actor, critic)
    batch = ragged_samples()
    scores = forward(policy, batch)
    assert scores.logprobs.shape == scores.entropy.shape == batch.masks.switch.shape
    assert scores.logprobs.dtype == torch.float32
    exact = cloning.tiny_model(BYTES, hidden=32, layers=1).double()  # the same weights in float64
    exact.load_state_dict(actor.state_dict())
    weight, bias = policy.value_heads.weight.double(), policy.value_heads.bias.double()
    for n, (prompt, answer) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        out = exact(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        logp = out.logits[0].log_softmax(-1)  # [P + L, V]
        p, length = len(prompt), len(answer)
        want = [logp[p + j - 1, answer[j]].item() for j in range(length)]
        spread = [-(logp[p + j - 1].exp() * logp[p + j - 1]).sum().item() for j in range(length)]
        assert scores.logprobs[n, :length].tolist() == pytest.approx(want, abs=1e-5)
        assert scores.entropy[n, :length].tolist() == pytest.approx(spread, abs=1e-5)
        assert not scores.logprobs[n, length:].any()
        assert not scores.entropy[n, length:].any()
        hidden = out.hidden_states[-1][0]  # [P + L, H] after the last norm
        raw = response_text(answer, BYTES).encode().decode("latin-1")  # a character per byte
        blocks = oracle_blocks(raw)
        assert ("subgoal" in blocks) == ("</subgoal>" in raw)
        place = p - 1
        if "subgoal" in blocks:
            place = p + blocks["subgoal"][3] - 2  # the last token before the block's final `>`
        values = hidden @ weight.T + bias  # [P + L, 3]
        assert scores.v_high[n].item() == pytest.approx(values[p - 1, 0].item(), abs=1e-5)
        assert scores.v_low[n].item() == pytest.approx(values[place, 1].item(), abs=1e-5)
        assert scores.v_switch[n].item() == pytest.approx(values[p - 1, 2].item(), abs=1e-5)
        alone = forward(policy, batch, [n])
        for whole, one in zip(scores, alone, strict=True):
            mine = whole[n, : one.shape[1]] if one.ndim == 2 else whole[n]
            assert torch.allclose(mine, one[0], atol=1e-5)


def test_parts_not_asked_for_are_none(actor):
    policy = policy_of(actor)
    batch = ragged_samples()
    whole = forward(policy, batch)
    logprobs = forward(policy, batch, values=False)
    values = forward(policy, batch, logprobs=False)
    assert logprobs[2:] == (None,) * 3
    assert values[:2] == (None,) * 2
    assert torch.equal(logprobs.logprobs, whole.logprobs)
    assert torch.equal(values.v_low, whole.v_low)


def test_a_value_is_found_by_the_name_of_its_head(actor):
    output = forward(policy_of(actor), ragged_samples(), logprobs=False)
    for head in ("high", "low", "switch"):
        assert output.value(head) is getattr(output, f"v_{head}")


def test_values_see_what_they_may_see(actor):
    policy = policy_of(actor)
    texts = [
        said(action="look"),
        said(action="fly"),
        said(subgoal="a pot"),
        said("SWITCH", "a pan"),
        VALID,
    ]
    one, *others = [forward(policy, ragged_samples(texts=[text])) for text in texts]
    for other in others:
        assert torch.allclose(one.v_high, other.v_high, atol=1e-5)
        assert torch.allclose(one.v_switch, other.v_switch, atol=1e-5)
    assert torch.allclose(one.v_low, others[0].v_low, atol=1e-5)  # nothing of the action
    assert not any(torch.allclose(one.v_low, other.v_low, atol=1e-3) for other in others[1:])
    second = ragged_samples(texts=[said()])
    second.prompts[0][-1] ^= 1
    assert not torch.allclose(one.v_high, forward(policy, second).v_high, atol=1e-3)


def test_heads_start_at_zero_and_a_separate_critic_is_a_copy(actor):
    policy = ActorCritic(actor, "separate")
    values = forward(policy, ragged_samples(), logprobs=False)
    assert not any(value.any() for value in (values.v_high, values.v_low, values.v_switch))
    for a, b in zip(policy.critic.parameters(), actor.base_model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert ActorCritic(actor).critic is None
    for word in ("", "None", "Shared", None):
        with pytest.raises(ValueError, match="separate, shared or none"):
            ActorCritic(actor, word)


def test_without_a_critic_there_are_no_values(actor):
    policy = ActorCritic(actor, "none")
    assert policy.value_heads is None
    assert policy.critic is None
    batch = ragged_samples()
    output = forward(policy, batch)
    assert output[2:] == (None,) * 3
    assert torch.equal(output.logprobs, forward(policy_of(actor), batch).logprobs)


def has_gradient(module):
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_loss_reaches_its_own_backbone(actor, critic):
    policy = policy_of(actor, critic)
    scores = forward(policy, ragged_samples(), logprobs=False)
    (scores.v_high + scores.v_low + scores.v_switch).pow(2).sum().backward()
    assert has_gradient(policy.value_heads)
    assert has_gradient(actor) == (critic == "shared")
    assert critic == "shared" or has_gradient(policy.critic)
    policy.zero_grad(set_to_none=True)
    forward(policy, ragged_samples(), values=False).logprobs.sum().backward()
    assert has_gradient(actor)
    assert not has_gradient(policy.value_heads)
    assert critic == "shared" or not has_gradient(policy.critic)


def test_entropy_has_no_gradient(actor):
    assert not forward(policy_of(actor), ragged_samples()).entropy.requires_grad


# ---- log-probs ---------------------------------------------------------------------------------


class CountingHead(torch.nn.Linear):
    """An output layer that counts its calls and the rows of the largest."""

    most = 0
    calls = 0

    def forward(self, x):
        self.most = max(self.most, len(x))
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("chunk, rows", [(1, 1), (11, 1), (33, 3), (10**6, 13)])
def test_chunks_change_nothing_but_memory(chunk, rows):
    torch.manual_seed(0)
    head = CountingHead(8, 11)
    hidden = torch.randn(13, 8, requires_grad=True)
    targets = torch.randint(11, (13,))
    weights = torch.randn(13)
    logp, entropy = hiper.logprobs_and_entropy(hidden, targets, head, chunk)
    assert head.most == rows
    assert not entropy.requires_grad
    calls = head.calls
    (logp * weights).sum().backward()
    assert head.calls == (calls if rows == 13 else 2 * calls)  # chunks are computed again, not kept
    exact = hidden.detach().double().requires_grad_()
    matrix = head.weight.detach().double().requires_grad_()
    want = (exact @ matrix.T + head.bias.detach().double()).log_softmax(-1)  # [13, 11]
    chosen = want[torch.arange(13), targets]
    (chosen * weights).sum().backward()
    for got, reference in [
        (logp, chosen),
        (entropy, -(want.exp() * want).sum(-1)),
        (hidden.grad, exact.grad),
        (head.weight.grad, matrix.grad),
    ]:
        assert torch.allclose(got.double(), reference, atol=1e-5)


def test_no_tokens_at_all(actor):
    logp, entropy = hiper.logprobs_and_entropy(
        torch.zeros(0, 32), torch.zeros(0).long(), actor.get_output_embeddings()
    )
    assert logp.shape == entropy.shape == (0,)
    # a micro-batch of empty answers
    output = forward(policy_of(actor), ragged_samples(texts=["", VALID]), [0])
    assert output.logprobs.shape == (1, 0)


SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = ("qwen2", "qwen3", "llama", "mistral", "olmo2", "phi3", "qwen3_moe", "mixtral", "gpt2")


@pytest.mark.parametrize("kind", MODELS)
def test_logprobs_are_those_of_the_model_s_own_forward(kind):
    """Embeddings are looked up first and passed on, which must not change any architecture."""
    torch.manual_seed(0)
    actor = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL)).eval()
    batch = ragged_samples()
    with torch.no_grad():
        got = forward(ActorCritic(actor, "none"), batch)
        for n, (prompt, answer) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
            logits = actor(input_ids=torch.tensor([prompt + answer])).logits[0]
            want = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # [L, V]
            want = want.gather(-1, torch.tensor(answer, dtype=torch.long)[:, None]).squeeze(-1)
            assert torch.allclose(got.logprobs[n, : len(answer)], want, atol=1e-5)


# ---- half precision ----------------------------------------------------------------------------


def test_bf16_weights_give_float32_scores(actor):
    policy = policy_of(actor.bfloat16())
    batch = ragged_samples()
    scores = forward(policy, batch)
    assert all(x.dtype == torch.float32 for x in scores)
    ids = batch.model_inputs([0, 1, 2, 3, 4], "cpu")[0]
    hidden = actor.base_model(input_ids=ids).last_hidden_state[0]
    p = len(batch.prompts[0])
    answer = torch.tensor(batch.responses[0])
    # the logits are bf16, the softmax over them is not
    logits = actor.lm_head(hidden[p - 1 : p - 1 + len(answer)]).double()
    want = logits.log_softmax(-1).gather(-1, answer[:, None]).squeeze(-1)
    assert torch.allclose(scores.logprobs[0, : len(answer)].double(), want, atol=1e-4)


def test_entropy_of_a_large_vocabulary_whose_logits_are_far_from_zero():
    """Logits near 20 at 152,064 tokens: float32 loses nothing that can be kept."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 152_064)
    torch.nn.init.normal_(layer.weight, std=0.9)
    torch.nn.init.constant_(layer.bias, 20.0)
    hidden = torch.randn(6, 8)
    with torch.no_grad():
        _, entropy = hiper.logprobs_and_entropy(hidden, torch.arange(6), layer)
        exact = layer.double()(hidden.double()).log_softmax(-1)
    want = -(exact.exp() * exact).sum(-1)
    assert (entropy.double() - want).abs().max() < 3e-5


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_heads_compute_in_float32_under_autocast(actor, critic):
    """Near 10 bfloat16 has steps of 0.06, and advantages are differences of values."""
    policy = policy_of(actor, critic)
    torch.nn.init.constant_(policy.value_heads.bias, 10.0)
    batch = ragged_samples()
    backbone = policy.critic if critic == "separate" else actor.base_model
    ids, prompt_lengths, _, subgoal_pos = batch.model_inputs([0, 1, 2, 3, 4], "cpu")
    rows = torch.arange(5)
    weight, bias = policy.value_heads.weight.double(), policy.value_heads.bias.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = forward(policy, batch, logprobs=False)
        hidden = hiper.last_hidden_state(backbone, ids).double()
    at_prompt = hidden[rows, prompt_lengths - 1] @ weight.T + bias  # [N, 3]
    at_subgoal = hidden[rows, prompt_lengths + subgoal_pos] @ weight.T + bias
    for value, want in [
        (got.v_high, at_prompt[:, 0]),
        (got.v_low, at_subgoal[:, 1]),
        (got.v_switch, at_prompt[:, 2]),
    ]:
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), want, atol=1e-5, rtol=0)
        assert not torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_bf16_reference_equals_a_float32_policy_of_the_same_weights(actor, attention, tmp_path):
    """Under autocast the residual stream is float32 for both, so the KL at the start is 0."""
    copy.deepcopy(actor).bfloat16().save_pretrained(tmp_path)  # as published checkpoints are
    config = tiny_config(attention=attention)
    actor = load_actor(tmp_path, config, torch.float32)
    reference = load_actor(tmp_path, config, torch.bfloat16)
    batch = ragged_samples()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = forward(ActorCritic(actor, "none"), batch).logprobs
        theirs = forward(ActorCritic(reference, "none"), batch).logprobs
    assert next(reference.parameters()).dtype == torch.bfloat16
    assert next(actor.parameters()).dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert not hiper.kl_k3(ours, theirs).any()
    assert ours.any()
    assert ours.dtype == torch.float32


def test_the_residual_stream_is_float32_under_autocast_only(actor):
    ids = torch.tensor([[1, 2, 3]])
    half = copy.deepcopy(actor.base_model).bfloat16()
    with torch.no_grad():
        assert hiper.last_hidden_state(half, ids).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert hiper.last_hidden_state(half, ids).dtype == torch.float32


def test_a_model_that_changes_its_logits_after_the_output_layer_is_refused(tiny_actor):
    """Its log-probabilities would be wrong: Granite divides its logits."""
    check_output_layer(tiny_actor, tiny_config())
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    granite = GraniteForCausalLM(GraniteConfig(vocab_size=64, logits_scaling=4.0, **shape))
    with pytest.raises(ConfigError, match="not supported"):
        check_output_layer(granite.eval(), tiny_config(model="granite"))
