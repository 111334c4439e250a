"""Theorems 4.1 to 4.3 of HiPER on a world whose trajectories are all enumerated (tiny_mdp.py).

All expectations are exact sums, nothing is sampled. Theorems 4.1 and 4.2 hold as stated, to
rounding. Theorem 4.3 (less variance than flat GAE) holds under conditions, which the tests of its
section name. What does not hold has a test too, with a counterexample. "Flat" is turn-level GAE:
one advantage for all of a turn's decisions, with the exact V(s_t) = E[return from t | s_t].
"""

import itertools
from functools import lru_cache

import pytest
import torch

from hae import discounted_reverse_cumsum, hae, switch_gain
from tiny_mdp import (
    ACTION,
    CARRIED,
    DECIDES,
    LENGTH,
    MASK,
    SEEN,
    SLICES,
    STATE,
    SUBGOAL,
    SWITCH,
    TURN,
    Advantages,
    Enumeration,
    T,
    probability,
    random_world,
)

LAMBDAS = (0.0, 0.5, 0.95, 1.0)
SEEDS = range(5)
GAMMAS = (1.0, 0.9)
LATER = DECIDES[0]  # [B, T] a switch is decided here: not at turn 0
OPENS = DECIDES[1]  # [B, T] a segment opens here
FORMS = ("value_head", "closed_form")
EXACT = dict(atol=1e-9, rtol=0)


@lru_cache
def tiny(seed, gamma, sharp=1.0):
    """A random world and policy. sharp scales the logits: 3 makes most decisions nearly certain."""
    world, logits = random_world(seed, gamma)
    return Enumeration(world, sharp * logits)


@pytest.fixture(
    params=[(seed, gamma) for seed in SEEDS for gamma in GAMMAS],
    ids="seed{0[0]}-gamma{0[1]}".format,
)
def m(request):
    return tiny(*request.param)


def ignoring_subgoals(m):
    """The same world with a policy whose actions ignore the subgoal: it carries no information."""
    logits = m.logits.clone()
    action = logits[SLICES["action"]].view(T, 2, 2, 2)
    logits[SLICES["action"]] = action[:, :, :1].expand(-1, -1, 2, -1).flatten()
    return Enumeration(m.world, logits)


def never_switching(m):
    logits = m.logits.clone()
    logits[SLICES["switch"]] = -1000.0  # sigmoid underflows to 0
    return Enumeration(m.world, logits)


def exact_advantages(m):
    """Q - V of each decision."""
    q_low = m.values.q_low[TURN, STATE, SUBGOAL, ACTION]
    return Advantages(
        switch=torch.where(SWITCH, m.v_high, m.v_keep) - m.v_switch,
        subgoal=m.v_low - m.v_high,
        action=(q_low - m.v_low) * MASK,
    )


def flat_advantages(m, lam, values=None):
    """Flat GAE: the same advantage for all three decisions."""
    adv = m.flat(lam, values)
    return Advantages(adv, adv, adv)


def noise_of(m, advantages):
    """Each advantage minus its mean given all that its decision saw and chose."""
    noise = []
    for adv, given, where in zip(advantages, SEEN, DECIDES, strict=True):
        noise.append(adv - m.mean(adv, *given, where=where))
    return Advantages(*noise)


def shift(x):
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)  # [B, T] x_{t+1}


def assert_none_above(small, large):
    """small <= large at every turn, up to rounding."""
    assert (small - large).max() < 1e-12


# ---- the enumeration itself ----


def test_probabilities_sum_to_one_and_both_ways_to_j_agree(m):
    assert len(LENGTH) == 1256
    assert set(LENGTH.tolist()) == {1, 2, 3}
    torch.testing.assert_close(m.p.sum(), torch.ones_like(m.j), **EXACT)
    torch.testing.assert_close(m.p @ m.returns[:, 0], m.j, **EXACT)
    # REINFORCE's gradient, from another computation.
    by_paths = torch.func.grad(lambda x: probability(m.world, x) @ m.returns[:, 0])(m.logits)
    torch.testing.assert_close(by_paths, m.grad_j, **EXACT)


def test_values_are_conditional_expectations_of_the_return(m):
    """V_high given SWITCH, V_low given the subgoal, V_switch given the carried one, Q_low."""
    v_high = m.mean(m.returns, STATE, where=OPENS)
    torch.testing.assert_close(m.v_high * OPENS, v_high, **EXACT)
    v_low = m.mean(m.returns, STATE, SUBGOAL)
    torch.testing.assert_close(m.v_low, v_low, **EXACT)
    keeps = LATER & ~SWITCH
    v_keep = m.mean(m.returns, STATE, CARRIED, where=keeps)
    torch.testing.assert_close(m.v_keep * keeps, v_keep, **EXACT)
    v_switch = m.mean(m.returns, STATE, CARRIED, where=LATER)
    torch.testing.assert_close(m.v_switch * LATER, v_switch, **EXACT)
    q_low = m.mean(m.returns, STATE, SUBGOAL, ACTION)
    expected = m.values.q_low[TURN, STATE, SUBGOAL, ACTION] * MASK
    torch.testing.assert_close(expected, q_low, **EXACT)


# ---- Theorem 4.1: the gradient has three terms ----


def test_policy_gradient_theorem(m):
    """E sum_t gamma^t [three score terms times Q - V] is autograd's grad J, for each decision."""
    exact = exact_advantages(m)
    bias = m.bias(*exact)
    for name, group in SLICES.items():
        assert m.grad_j[group].norm() > 1e-3, name  # the gradient is not zero
        torch.testing.assert_close(bias[group], torch.zeros_like(bias[group]), **EXACT)
    # A term moves its own logits and no others.
    for name, group in SLICES.items():
        zeros = {other: torch.zeros_like(exact.action) for other in SLICES}
        alone = Advantages(**(zeros | {name: getattr(exact, name)}))
        gradient = m.p @ m.gradient(*alone)
        torch.testing.assert_close(gradient[group], m.grad_j[group], **EXACT)
        assert gradient.count_nonzero() == gradient[group].count_nonzero()


# ---- Theorem 4.2: HAE is unbiased ----


@pytest.mark.parametrize("form", FORMS)
def test_hae_is_unbiased_for_every_lambda(m, form):
    for lam_low, lam_high in itertools.product(LAMBDAS, LAMBDAS):
        assert m.bias(*m.hae(lam_low, lam_high, form)).abs().max() < 1e-9, (lam_low, lam_high)


def test_expected_advantages_are_the_exact_ones(m):
    """Stronger than an unbiased gradient: each advantage's mean is Q - V.

    The mean is given all that the decision saw and chose.
    """
    exact = exact_advantages(m)
    for lam in LAMBDAS:
        advantages = m.hae(lam, lam, "value_head")
        for got, want, seen, where in zip(advantages, exact, SEEN, DECIDES, strict=True):
            torch.testing.assert_close(m.mean(got, *seen, where=where), want * where, **EXACT)


def test_switch_gain_is_the_advantage_without_noise(m):
    gain = switch_gain(SWITCH, m.beta, m.v_high, m.v_keep)
    exact = exact_advantages(m).switch
    torch.testing.assert_close(gain[LATER], exact[LATER], **EXACT)
    # The released code's form has noise.
    variance = m.variance(m.hae(1.0, 1.0, "value_head").switch, *SEEN[0], where=LATER)
    assert m.average(variance, LATER) > 1e-3


def test_truncation_is_unbiased_if_the_end_value_still_leaves_the_switch_open(m):
    """Episodes cut after two of three turns.

    It is not known yet whether the third turn would have kept its subgoal. So the exact value of
    the state after the last turn is V_switch(s, o), for the executor and the planner both. V_low
    assumes KEEP there and V_high assumes SWITCH. Each is biased by pi(the other choice) times the
    gain of switching.
    """
    early = []  # [P] logits of the first two turns
    for group in SLICES.values():
        rows = (group.stop - group.start) // T
        early.append(torch.arange(T).repeat_interleave(rows) < 2)
    early = torch.cat(early)
    inputs = (m.rewards, SWITCH, MASK, m.v_high, m.v_low, m.v_switch)
    first_two = [x[:, :2].contiguous() for x in inputs]

    def bias(end_high, end_low):
        worst = 0.0
        for lam in LAMBDAS:
            got = hae(
                *first_two,
                gamma=m.gamma,
                lam_low=lam,
                lam_high=lam,
                end_high=end_high[:, 2].contiguous(),
                end_low=end_low[:, 2].contiguous(),
            )
            advantages = (got.adv_switch, got.adv_subgoal, got.adv_action)
            padded = [torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in advantages]
            worst = max(worst, float(m.bias(*padded)[early].abs().max()))
        return worst

    assert bias(m.v_switch, m.v_switch) < 1e-9
    assert bias(m.v_high, m.v_keep) > 1e-3
    assert bias(m.v_switch, m.v_keep) > 1e-4
    assert bias(m.v_high, m.v_switch) > 1e-4


# ---- Theorem 4.3: variance ----


def test_flat_gae_is_unbiased_only_at_lambda_one(m):
    """V(s_t) does not see the carried subgoal, so flat GAE bootstraps from the wrong value.

    Below lambda = 1 flat GAE may have less variance than HAE, but of a wrong gradient. (At lambda
    0 it has none at all where V is constant and the reward comes late.)
    """
    assert m.bias(*flat_advantages(m, 1.0)).abs().max() < 1e-9
    for lam in (0.0, 0.5, 0.95):
        assert m.bias(*flat_advantages(m, lam)).norm() > 1e-4


def test_flat_gae_whose_critic_sees_the_carried_subgoal(m):
    """V(s_t, o_{t-1}), as in PPO with the subgoal in the prompt, is unbiased at every lambda.

    At lambda 1 its action noise is above HAE's for every lam_low. At one common lambda < 1 there is
    no order (at 0 flat GAE's noise is mostly the smaller).
    """
    for lam in LAMBDAS:
        assert m.bias(*flat_advantages(m, lam, m.v_switch)).abs().max() < 1e-9
    flat = m.variance(m.flat(1.0, m.v_switch), STATE, SUBGOAL, ACTION)
    for lam in LAMBDAS:
        executor = m.variance(m.hae(lam, 1.0).action, STATE, SUBGOAL, ACTION)
        assert_none_above(executor, flat)


def test_the_executors_variance_is_below_flat(m):
    """Var(A_low_t) is no larger than unbiased flat GAE's (lambda 1), for every lam_low and turn.

    This holds given s_t, or (s_t, o_t), or (s_t, o_t, a_t). Reason, given s_t: let G be the return
    and G' the return to the segment's end plus V_high there. By the law of total variance
        Var(G - V) = Var(G' - V_low) + E (G - G')^2 + Var(V_low(s_t, o_t) | s_t)
    because E[G | all up to the boundary] = G'. The second term is what boundaries save. The third
    is what the subgoal tells.
    """
    executor = m.hae(1.0, 1.0).action
    flat = m.flat(1.0)
    gap = m.variance(flat, STATE) - m.variance(executor, STATE)
    boundary = m.mean((m.returns - (executor + m.v_low)) ** 2, STATE)
    told = m.variance(m.v_low, STATE)
    torch.testing.assert_close(gap, boundary + told, **EXACT)
    # Strict: in a random world boundary and subgoal both carry information.
    assert boundary[MASK & (TURN < T - 1)].min() > 0
    assert told[MASK].min() > 0
    for given in ((STATE,), (STATE, SUBGOAL), (STATE, SUBGOAL, ACTION)):
        limit = m.variance(flat, *given)
        # The variance only falls as lambda does: deltas are uncorrelated.
        for lam in reversed(LAMBDAS):
            variance = m.variance(m.hae(lam, 1.0).action, *given)
            assert_none_above(variance, limit)
            limit = variance


def test_the_executors_variance_is_strictly_below_flat_for_either_reason_alone(m):
    """An informative subgoal without boundaries; boundaries with an uninformative subgoal."""
    for other in (never_switching(m), ignoring_subgoals(m)):
        flat = other.variance(other.flat(1.0), STATE)
        gap = flat - other.variance(other.hae(1.0, 1.0).action, STATE)
        assert gap.min() > -1e-12
        assert other.average(gap) > 1e-3


def test_the_planners_variance_is_at_most_flat(m):
    """Var(A_high) is no larger than flat GAE's at lambda 1, for every lam_high.

    This holds on turns that open a segment, given s_t or (s_t, o_t). At lam_high = 1 they are
    equal: both are the return minus a function of s_t. HAE's only gain there is that V_high is the
    right mean after SWITCH, and V(s_t) is not: E A^2 is smaller by (V_high - V)^2.
    """
    flat = m.flat(1.0)
    for given in ((STATE,), (STATE, SUBGOAL)):
        flat_variance = m.variance(flat, *given, where=OPENS)
        at_one = m.variance(m.hae(1.0, 1.0).subgoal, *given, where=OPENS)
        torch.testing.assert_close(at_one, flat_variance, **EXACT)
        limit = flat_variance
        for lam in reversed(LAMBDAS):
            variance = m.variance(m.hae(1.0, lam).subgoal, *given, where=OPENS)
            assert_none_above(variance, limit)
            limit = variance
        # Strict at lambda 0, the last one.
        assert m.average(limit, OPENS) < m.average(flat_variance, OPENS) - 1e-3
    flat_square = m.mean(flat**2, STATE, where=OPENS)
    hae_square = m.mean(m.hae(1.0, 1.0).subgoal ** 2, STATE, where=OPENS)
    gain = (m.v_high - m.v_flat) ** 2 * OPENS
    torch.testing.assert_close(flat_square - hae_square, gain, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_the_noise_in_the_gradient_is_below_flat(m, form):
    """The part of the gradient's variance that is noise is no larger for HAE than for flat GAE.

    The gradient's variance has two parts: the noise of each advantage about its mean given the
    decision, and the spread of these means. For tables with a row per turn, terms of different
    turns and decisions have no covariance in the trace. Then the noise is no larger for HAE at any
    lambdas than for flat GAE at lambda 1. The second part has no such order, see
    `test_where_theorem_4_3_does_not_hold`.
    """
    limit = m.gradient_variance(*noise_of(m, flat_advantages(m, 1.0)))
    for lam_low, lam_high in itertools.product(LAMBDAS, LAMBDAS):
        noise = noise_of(m, m.hae(lam_low, lam_high, form))
        assert m.gradient_variance(*noise) < limit - 1e-3


def test_equal_where_nothing_is_carried(m):
    """HAE is flat GAE where subgoals tell nothing and there are no boundaries.

    Actions ignore the subgoal and the agent never switches: one segment, V_low = V_high = V. Then
    HAE's action advantage is flat GAE entry by entry for every lambda, and the planner's is flat
    GAE at 1. With boundaries and an ignored subgoal, flat GAE is unbiased for every lambda. HAE is
    then flat GAE cut at the boundaries: no more variance at the same lambda, less if lambda > 0.
    """
    one = never_switching(ignoring_subgoals(m))
    reached = MASK & (one.p > 0)[:, None]
    planner_reached = reached[:, 0]
    for lam in LAMBDAS:
        advantages = one.hae(lam, lam)
        torch.testing.assert_close(advantages.action[reached], one.flat(lam)[reached], **EXACT)
        subgoal = advantages.subgoal[planner_reached, 0]
        torch.testing.assert_close(subgoal, one.flat(1.0)[planner_reached, 0], **EXACT)
    ignoring = ignoring_subgoals(m)
    for lam in LAMBDAS:
        assert ignoring.bias(*flat_advantages(ignoring, lam)).abs().max() < 1e-9
        executor = ignoring.variance(ignoring.hae(lam, lam).action, STATE, SUBGOAL, ACTION)
        flat = ignoring.variance(ignoring.flat(lam), STATE, SUBGOAL, ACTION)
        assert_none_above(executor, flat)
        gap = ignoring.average(flat) - ignoring.average(executor)
        assert gap > (1e-3 if lam else -1e-12)


def test_where_theorem_4_3_does_not_hold():
    """At one lambda < 1 HAE is not always below flat GAE; at lambda 1 the gradient is not always.

    (a) Planner: lam_high decays once per segment, flat GAE's lambda once per turn, so a segment's
        rewards count in full.
    (b) Executor: V_next depends on the sampled q_{t+1}. V(s_{t+1}) averages it out, with bias.
    (c) Gradient at lambda 1: V_low is the mean over actions. The baseline of least variance weighs
        them by the squared score, and V(s) may happen to lie nearer to that one. This is seen in
        policies that are nearly certain of most decisions.
    """
    m = tiny(0, 1.0)
    # (a)
    planner = m.variance(m.hae(0.5, 0.5).subgoal, STATE, where=OPENS)
    flat = m.variance(m.flat(0.5), STATE, where=OPENS)
    assert m.average(planner, OPENS) > 1.1 * m.average(flat, OPENS)
    # (b)
    executor = m.variance(m.hae(0.0, 0.0).action, STATE, SUBGOAL, ACTION)
    flat = m.variance(m.flat(0.0), STATE, SUBGOAL, ACTION)
    assert m.average(executor) > 1.1 * m.average(flat)
    # (c) Flat over HAE: more often above 1 than not, but not always.
    ratios = []
    for seed in range(20):
        m = tiny(seed, 1.0, 3.0)
        flat = m.gradient_variance(*flat_advantages(m, 1.0))
        ratios.append(flat / m.gradient_variance(*m.hae(1.0, 1.0)))
    assert min(ratios) < 0.99
    assert sum(ratio > 1 for ratio in ratios) >= 12


# ---- the exactness tests can fail: wrong estimators ----


def executor(m, lam, at_boundary, cut=True):
    """A_low with `at_boundary` [B, T] as the value after a segment's last turn.

    cut=False: the sum of deltas runs on past the boundary.
    """
    ends = shift(OPENS)  # [B, T] the next turn opens a segment
    v_next = torch.where(ends, at_boundary, shift(m.v_low))
    delta = (m.rewards + m.gamma * v_next - m.v_low) * MASK
    inside = ~ends if cut else torch.ones_like(ends)
    return discounted_reverse_cumsum(delta, m.gamma * lam * inside.double())


def planner(m, lam, per_turn):
    """A_high. per_turn: discount by gamma_k; else by gamma, whatever the segment's length."""
    ends = shift(OPENS)
    inside = (~ends).double()  # [B, T] 0 at a segment's last turn
    keep = m.gamma if per_turn else 1.0  # discount of a KEEP turn, between boundary values
    reward = discounted_reverse_cumsum(m.rewards, m.gamma * inside)  # R_k at b_k
    v_after = m.gamma * shift(m.v_high) * ends
    after = discounted_reverse_cumsum(v_after, keep * inside)  # gamma_k V_high(next) at b_k
    # The product over segment k is gamma_k lam.
    decay = torch.full_like(inside, keep).masked_fill(OPENS, m.gamma * lam)
    delta = (reward + after - m.v_high) * OPENS
    return discounted_reverse_cumsum(delta, decay) * OPENS


@pytest.mark.parametrize("lam", (0.0, 0.95, 1.0))
@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_estimators_are_told_apart(seed, lam):
    """The tests above would catch each of these mistakes.

    Biased, far beyond the tolerance above:
    (a) at a boundary the executor bootstraps from V_low(s, o_old), as if the old subgoal continued;
    (b) or from 0, as if the episode had ended;
    (c) the planner discounts a segment by gamma, not gamma_k (the same at gamma 1);
    (d) switch_gain takes `v_low` on SWITCH turns too, where it belongs to the new subgoal.
    Unbiased with exact critics, only noisier:
    (e) bootstrap from the new subgoal's V_low, whose mean is V_high;
    (f) the sum is not cut at the boundary, since the deltas beyond have mean zero.
    No test of bias can find (e) and (f); their variance does.
    """
    world, logits = random_world(seed, 0.9)
    # Larger rewards and logits, so that each mistake has a visible effect.
    m = Enumeration(world._replace(reward=3 * world.reward + 9), 2 * logits)
    right = m.hae(lam, lam)
    next_turn = (TURN + 1).clamp(max=T - 1)
    old_v_low = m.values.low[next_turn, STATE.roll(-1, 1), SUBGOAL]
    old_v_low = torch.where(shift(OPENS), old_v_low, 0.0)
    # Without a mistake, `executor` and `planner` are HAE.
    torch.testing.assert_close(executor(m, lam, shift(m.v_high)), right.action, **EXACT)
    torch.testing.assert_close(planner(m, lam, per_turn=True), right.subgoal, **EXACT)
    biased = {
        "a": right._replace(action=executor(m, lam, old_v_low)),
        "b": right._replace(action=executor(m, lam, torch.zeros_like(old_v_low))),
        "c": right._replace(subgoal=planner(m, lam, per_turn=False)),
        "d": right._replace(switch=switch_gain(SWITCH, m.beta, m.v_high, m.v_low)),
    }
    for name, wrong in biased.items():
        assert m.bias(*wrong).norm() > 1e-3, name
    noisy = {
        "e": right._replace(action=executor(m, lam, shift(m.v_low))),
        "f": right._replace(action=executor(m, lam, shift(m.v_high), cut=False)),
    }
    right_variance = m.variance(right.action, STATE, SUBGOAL, ACTION)
    for name, wrong in noisy.items():
        assert m.bias(*wrong).abs().max() < 1e-9, name
        wrong_variance = m.variance(wrong.action, STATE, SUBGOAL, ACTION)
        extra = m.average(wrong_variance - right_variance)
        if name == "f" and lam == 0.0:  # nothing to cut
            assert abs(extra) < 1e-12
        else:
            assert extra > 1e-4, name


# ---- critics that are wrong ----


def perturbed(m, **size):
    """The exact critics plus a fixed random error of the given size on some: high, low, switch."""
    g = torch.Generator().manual_seed(7)
    error = {}
    for name, value in m.values._asdict().items():
        error[name] = torch.randn(value.shape, generator=g, dtype=value.dtype)
    wrong = {name: getattr(m.values, name) + e * error[name] for name, e in size.items()}
    return m.values._replace(**wrong)


def bias_of(m, lam_low, lam_high, form="value_head", **size):
    """Norm of the bias of each group of logits."""
    bias = m.bias(*m.hae(lam_low, lam_high, form, perturbed(m, **size)))
    return {name: float(bias[group].norm()) for name, group in SLICES.items()}


def test_bias_of_wrong_critics(m):
    """Which critic's error biases which decision.

    At lam_high = 1 no error biases the planner. At lam_low = 1 V_low's errors do not bias the
    executor, but V_high's do, because it always bootstraps from V_high at a boundary. V_switch is
    only a baseline. V_high's errors bias the switch whatever the lambdas; in the closed form
    V_low's do as well.
    """
    none = 1e-9
    for lam in LAMBDAS:
        assert bias_of(m, lam, 1.0, high=0.1, low=0.1, switch=0.1)["subgoal"] < none
        assert bias_of(m, 1.0, lam, low=0.1, switch=0.1)["action"] < none
        assert max(bias_of(m, lam, lam, switch=0.1).values()) < none
        assert bias_of(m, lam, lam, low=0.1)["switch"] < none
        assert bias_of(m, lam, lam, "closed_form", low=0.1)["switch"] > 1e-4
        for form in FORMS:
            bias = bias_of(m, lam, lam, form, high=0.1)
            assert bias["switch"] > 1e-5
            assert bias["action"] > 1e-5
        if lam < 1:
            assert bias_of(m, 1.0, lam, high=0.1)["subgoal"] > 1e-5
            assert bias_of(m, lam, 1.0, low=0.1)["action"] > 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_bias_is_linear_in_the_critics_error(m, form):
    """Every advantage is affine in the critics: twice the error, twice the bias."""
    small_error = perturbed(m, high=0.1, low=0.1, switch=0.1)
    large_error = perturbed(m, high=0.2, low=0.2, switch=0.2)
    for lam_low, lam_high in itertools.product((0.5, 1.0), (0.5, 1.0)):
        small = m.bias(*m.hae(lam_low, lam_high, form, small_error))
        large = m.bias(*m.hae(lam_low, lam_high, form, large_error))
        assert small.norm() > 1e-4
        torch.testing.assert_close(large, 2 * small, **EXACT)
