"""hae.py against a slow, obvious oracle, against the released code's outputs, and at its limits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hae import HAE, discounted_reverse_cumsum, gae, hae, normalize, switch_gain

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.npz"))


# ---- the oracle: HiPER's equations as sums over explicit segments, one trajectory at a time ----


def boundaries(switch, n):
    """0 = b_0 < ... < b_K = n."""
    return [t for t in range(n) if t == 0 or switch[t]] + [n]


def oracle_row(r, switch, n, v_high, v_low, v_switch, gamma, lam_low, lam_high, end_high, end_low):
    """All of HAE for one trajectory of n turns; lists of floats in, lists of floats out."""
    b = boundaries(switch, n)
    out = {name: [0.0] * len(r) for name in HAE._fields}
    for k in range(len(b) - 1):
        v_after = v_high[b[k + 1]] if b[k + 1] < n else end_high  # V_high(s_{b_{k+1}})
        delta = {}
        for t in range(b[k], b[k + 1]):
            if t + 1 < b[k + 1]:
                v_next = v_low[t + 1]
            elif t + 1 < n:
                v_next = v_high[t + 1]
            else:
                v_next = end_low
            delta[t] = r[t] + gamma * v_next - v_low[t]
        for t in range(b[k], b[k + 1]):
            left = b[k + 1] - t
            a_low = sum((gamma * lam_low) ** i * delta[t + i] for i in range(left))
            g = sum(gamma**i * r[t + i] for i in range(left)) + gamma**left * v_after
            out["adv_action"][t] = a_low
            out["adv_switch"][t] = g - v_switch[t]
            out["ret_low"][t] = a_low + v_low[t]
            out["ret_switch"][t] = g
    a_next = 0.0
    for k in reversed(range(len(b) - 1)):
        v_after = v_high[b[k + 1]] if b[k + 1] < n else end_high
        gamma_k = gamma ** (b[k + 1] - b[k])
        reward_k = sum(gamma ** (t - b[k]) * r[t] for t in range(b[k], b[k + 1]))
        a_next = reward_k + gamma_k * v_after - v_high[b[k]] + gamma_k * lam_high * a_next
        out["adv_subgoal"][b[k]] = a_next
        out["ret_high"][b[k]] = a_next + v_high[b[k]]
    return out


def oracle(x, gamma=1.0, lam_low=1.0, lam_high=0.95):
    """`oracle_row` on every row of a `batch`, as a float64 HAE."""
    rows = []
    for b in range(len(x["rewards"])):
        result = oracle_row(
            r=x["rewards"][b].tolist(),
            switch=x["switch"][b].tolist(),
            n=int(x["mask"][b].sum()),
            v_high=x["v_high"][b].tolist(),
            v_low=x["v_low"][b].tolist(),
            v_switch=x["v_switch"][b].tolist(),
            gamma=gamma,
            lam_low=lam_low,
            lam_high=lam_high,
            end_high=x["end_high"][b].item(),
            end_low=x["end_low"][b].item(),
        )
        rows.append(result)
    columns = ([row[name] for row in rows] for name in HAE._fields)
    return HAE(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def oracle_gae(r, n, v, gamma, lam, end):
    """Flat GAE of one trajectory of n turns, padded with zeros to the length of r."""
    v = v[:n] + [end]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    adv = [sum((gamma * lam) ** i * delta[t + i] for i in range(n - t)) for t in range(n)]
    return adv + [0.0] * (len(r) - n)


# ---- helpers ----


def batch(seed=0, B=5, T=13, p=0.3, dtype=torch.float64):
    """A ragged batch of random trajectories, as the keyword arguments of hae."""
    g = torch.Generator().manual_seed(seed)
    x = {}
    for name in ("rewards", "v_high", "v_low", "v_switch"):
        x[name] = torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype)
    x["switch"] = torch.rand(B, T, generator=g) < p
    n = torch.randint(1, T + 1, (B,), generator=g)  # [B]
    n[0] = T
    x["mask"] = torch.arange(T) < n[:, None]  # [B, T]
    truncated = torch.rand(B, generator=g) < 0.5  # [B]
    for name in ("end_high", "end_low"):
        x[name] = (torch.randn(B, generator=g, dtype=torch.float64) * truncated).to(dtype)
    return x


def opens_segment(x):
    """[B, T] True where a segment starts."""
    first = torch.arange(x["mask"].shape[1]) == 0
    return x["mask"] & (x["switch"] | first)


def close(got, want, atol=1e-10):
    for name, a, b in zip(HAE._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def zero_ends():
    return dict(end_high=torch.zeros(5).double(), end_low=torch.zeros(5).double())


# ---- equations ----


@pytest.mark.parametrize("seed", range(40))
def test_hae_is_the_oracle(seed):
    g = np.random.default_rng(seed)
    B = int(g.integers(1, 9))
    T = 1 if seed % 8 == 0 else int(g.integers(2, 34))
    x = batch(seed, B, T, p=g.choice([0.0, 0.1, 0.4, 1.0]))
    settings = {}
    for name in ("gamma", "lam_low", "lam_high"):
        settings[name] = float(g.choice([0.0, 1.0, g.random()], p=[0.1, 0.2, 0.7]))
    close(hae(**x, **settings), oracle(x, **settings))


def test_three_turns_by_hand():
    """SWITCH, KEEP, SWITCH, truncated; gamma 1/2, both lambdas 1/2."""
    got = hae(
        row(1, 2, 4),
        torch.tensor([[True, False, True]]),
        torch.ones(1, 3).bool(),
        v_high=row(3, 100, 6),
        v_low=row(1, 2, 5),
        v_switch=row(1, 1, 1),
        gamma=0.5,
        lam_low=0.5,
        lam_high=0.5,
        end_high=torch.tensor([8.0]).double(),
        end_low=torch.tensor([2.0]).double(),
    )
    # delta_low_0 = 1 + 2/2 - 1 = 1
    # delta_low_1 = 2 + 6/2 - 2 = 3, bootstrap V_high(s_2) = 6
    # delta_low_2 = 4 + 2/2 - 5 = 0, bootstrap end_low = 2
    assert got.adv_action.tolist() == [[1 + 0.25 * 3, 3, 0]]
    assert got.ret_low.tolist() == [[2.75, 5, 5]]
    # G_0 = 1 + 2/2 + 6/4 = 3.5
    # G_1 = 2 + 6/2 = 5
    # G_2 = 4 + 8/2 = 8, bootstrap end_high = 8
    assert got.ret_switch.tolist() == [[3.5, 5, 8]]
    assert got.adv_switch.tolist() == [[2.5, 4, 7]]
    # delta_high_0 = 3.5 - 3 = 0.5 and delta_high_1 = 8 - 6 = 2
    # A_high_0 = 0.5 + (1/4) (1/2) 2 = 0.75, because segment 0 lasts two turns
    assert got.adv_subgoal.tolist() == [[0.75, 0, 2]]
    assert got.ret_high.tolist() == [[3.75, 0, 8]]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_outputs_of_the_released_code(path):
    """The release bootstraps a truncated end, where `bootstrap_truncated`, from its own values.

    The executor takes V_low of the last turn. The planner and the switch's G_t take V_high at the
    first turn of the last segment.
    """
    z = {name: torch.as_tensor(value) for name, value in np.load(path).items()}
    B, _ = z["mask"].shape
    truncated = ~z["terminated"] & z["bootstrap_truncated"]  # [B]
    n = z["mask"].sum(1)  # [B]
    first = [boundaries(z["switch"][b], int(n[b]))[-2] for b in range(B)]  # b_{K-1} of each row
    got = hae(
        z["rewards"],
        z["switch"],
        z["mask"],
        z["v_high"],
        z["v_low"],
        z["v_switch"],
        gamma=float(z["gamma"]),
        lam_low=float(z["lam_low"]),
        lam_high=float(z["lam_high"]),
        end_high=z["v_high"][range(B), first] * truncated,
        end_low=z["v_low"][range(B), n - 1] * truncated,
    )
    names = ("adv_low", "adv_high", "adv_switch", "ret_low", "ret_high", "ret_switch")
    close(got, [z[name] for name in names], atol=2e-4)


def test_all_golden_files_are_here():
    assert len(GOLDEN) == 7


@pytest.mark.parametrize("seed", range(8))
def test_gae_is_the_oracle(seed):
    x = batch(seed, T=1 + 4 * seed)
    gamma = 0.9
    lam = seed / 7
    adv, ret = gae(
        x["rewards"], x["mask"], x["v_low"], gamma=gamma, lam=lam, end_value=x["end_low"]
    )
    rows = []
    for b in range(5):
        expected = oracle_gae(
            r=x["rewards"][b].tolist(),
            n=int(x["mask"][b].sum()),
            v=x["v_low"][b].tolist(),
            gamma=gamma,
            lam=lam,
            end=x["end_low"][b].item(),
        )
        rows.append(expected)
    want = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(adv, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(ret, (want + x["v_low"]) * x["mask"], atol=1e-10, rtol=0)


def test_the_defaults_do_not_discount():
    x = batch()
    close(hae(**x), hae(**x, gamma=1.0, lam_low=1.0, lam_high=0.95), atol=0)
    flat = x["rewards"], x["mask"], x["v_low"]
    assert torch.equal(gae(*flat)[0], gae(*flat, gamma=1.0, lam=1.0)[0])


@pytest.mark.parametrize("T", [1, 2, 3, 8, 33])
def test_discounted_reverse_cumsum_is_the_loop(T):
    g = torch.Generator().manual_seed(T)
    d, c = torch.randn(2, 3, T, generator=g, dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64)
    want = []
    for t in reversed(range(T)):
        x = d[:, t] + c[:, t] * x
        want.insert(0, x)
    got = discounted_reverse_cumsum(d, c)
    torch.testing.assert_close(got, torch.stack(want, 1), atol=1e-10, rtol=0)


# ---- limits ----


def test_one_segment_is_flat_gae():
    x = batch(1) | dict(switch=torch.zeros(5, 13).bool())
    got = hae(**x, gamma=0.9, lam_low=0.7)
    adv, ret = gae(x["rewards"], x["mask"], x["v_low"], gamma=0.9, lam=0.7, end_value=x["end_low"])
    torch.testing.assert_close(got.adv_action, adv)
    torch.testing.assert_close(got.ret_low, ret)


def test_switch_every_turn():
    """Each segment is one turn.

    The executor sees one-step errors toward V_high. The planner is flat GAE on V_high.
    """
    x = batch(2) | dict(switch=torch.ones(5, 13).bool())
    x["end_low"] = x["end_high"]
    got = hae(**x, gamma=0.9, lam_low=0.7, lam_high=0.8)
    flat = dict(rewards=x["rewards"], mask=x["mask"], values=x["v_high"], end_value=x["end_high"])
    one_step, _ = gae(**flat, gamma=0.9, lam=0.0)
    planner, _ = gae(**flat, gamma=0.9, lam=0.8)
    torch.testing.assert_close(got.adv_action, one_step + (x["v_high"] - x["v_low"]) * x["mask"])
    torch.testing.assert_close(got.adv_subgoal, planner)


def test_lambda_one_is_monte_carlo_minus_baseline():
    x = batch(3) | zero_ends()
    got = hae(**x, gamma=1.0, lam_low=1.0, lam_high=1.0)
    to_go = (x["rewards"] * x["mask"]).flip(1).cumsum(1).flip(1)  # [B, T]
    torch.testing.assert_close(got.adv_subgoal, (to_go - x["v_high"]) * opens_segment(x))
    # G_t is the Monte Carlo return of the segment.
    torch.testing.assert_close(got.adv_action, (got.ret_switch - x["v_low"]) * x["mask"])


def test_lambda_zero_is_one_step():
    x = batch(4)
    got = hae(**x, gamma=0.9, lam_low=0.0, lam_high=0.0)
    start = opens_segment(x)
    # The paper's target R_k + gamma_k V_high(next).
    torch.testing.assert_close(got.ret_high, got.ret_switch * start)
    for b in range(5):
        n = int(x["mask"][b].sum())
        for t in range(n):
            if t + 1 == n:
                v_next = x["end_low"][b]
            elif start[b, t + 1]:
                v_next = x["v_high"][b, t + 1]
            else:
                v_next = x["v_low"][b, t + 1]
            torch.testing.assert_close(got.ret_low[b, t], x["rewards"][b, t] + 0.9 * v_next)


def test_terminated_is_not_truncated():
    x = batch(5)
    terminated = hae(**(x | dict(end_high=None, end_low=None)))
    close(terminated, hae(**(x | zero_ends())), atol=0)
    two = torch.full((5,), 2.0).double()
    truncated = hae(**(x | dict(end_high=two, end_low=two)), gamma=0.5)
    terminated = hae(**(x | zero_ends()), gamma=0.5)
    last = x["mask"].sum(1) - 1
    for name in ("adv_action", "adv_switch", "ret_low", "ret_switch"):
        gap = getattr(truncated, name) - getattr(terminated, name)
        torch.testing.assert_close(gap[range(5), last], torch.ones(5).double())


def test_credit_stops_at_the_boundary():
    """A reward after a boundary changes earlier planner advantages, not the previous executor's."""
    switch = torch.tensor([[True, False, False, False, True, False, False, False, False]])
    x = batch(6, B=1, T=9) | dict(switch=switch)
    before = hae(**x)
    after = hae(**(x | dict(rewards=x["rewards"] + torch.eye(9).double()[6])))
    torch.testing.assert_close(after.adv_action[:, :4], before.adv_action[:, :4], atol=0, rtol=0)
    torch.testing.assert_close(after.adv_switch[:, :4], before.adv_switch[:, :4], atol=0, rtol=0)
    torch.testing.assert_close(after.adv_action[:, 4:7], before.adv_action[:, 4:7] + 1)
    planner_gain = row(0.95, 1)[0]
    torch.testing.assert_close(
        after.adv_subgoal[0, [0, 4]], before.adv_subgoal[0, [0, 4]] + planner_gain
    )


# ---- invariances ----


def test_permuting_rows_permutes_results():
    x = batch(7)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {name: value[order] for name, value in x.items()}
    close(hae(**permuted), [value[order] for value in hae(**x)], atol=0)


def test_duplicating_a_row_changes_no_other():
    x = batch(8)
    order = torch.tensor([0, 1, 1, 2, 3, 4])
    duplicated = {name: value[order] for name, value in x.items()}
    close(hae(**duplicated), [value[order] for value in hae(**x)], atol=0)


def test_padding_changes_nothing():
    x = batch(9)
    wide = {k: v if v.ndim == 1 else torch.nn.functional.pad(v, (0, 20)) for k, v in x.items()}
    got = hae(**wide)
    close([v[:, :13] for v in got], hae(**x), atol=1e-14)
    assert all((v[:, 13:] == 0).all() for v in got)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_garbage_off_the_mask_is_harmless(garbage):
    x = batch(10)
    dirty = dict(x)
    for name in ("rewards", "v_high", "v_low", "v_switch"):
        dirty[name] = x[name].masked_fill(~x["mask"], garbage)
    dirty["switch"] = x["switch"] | ~x["mask"]
    close(hae(**dirty), hae(**x), atol=0)
    got = gae(dirty["rewards"], x["mask"], dirty["v_low"])
    want = gae(x["rewards"], x["mask"], x["v_low"])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_zero_where_undefined():
    x = batch(11)
    got = hae(**x)
    assert all((v[~x["mask"]] == 0).all() for v in got)
    keep = ~x["switch"]
    keep[:, 0] = False
    assert (got.adv_subgoal[keep] == 0).all()
    assert (got.ret_high[keep] == 0).all()


def test_turn_zero_opens_a_segment_whatever_switch_says():
    x = batch(12)
    first = torch.arange(13) == 0
    with_switch = hae(**(x | dict(switch=x["switch"] | first)))
    with_keep = hae(**(x | dict(switch=x["switch"] & ~first)))
    close(with_switch, with_keep, atol=0)


def test_without_v_switch():
    x = batch(13)
    full = hae(**x)
    bare = hae(**(x | dict(v_switch=None)))
    assert (bare.adv_switch == 0).all()
    close(bare, full._replace(adv_switch=torch.zeros_like(full.adv_switch)), atol=0)


@pytest.mark.parametrize(
    "dtype, atol",
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
)
def test_dtype_is_kept(dtype, atol):
    x = batch(14, dtype=dtype)
    got = hae(**x)
    assert {v.dtype for v in got} == {dtype}
    close([v.double() for v in got], oracle(x), atol=atol)
    adv, ret = gae(x["rewards"], x["mask"], x["v_low"])
    gain = switch_gain(x["switch"], x["rewards"].sigmoid(), x["v_high"], x["v_low"])
    assert {adv.dtype, ret.dtype, gain.dtype, normalize(adv, x["mask"]).dtype} == {dtype}


def test_half_precision_is_computed_in_float32():
    x = batch(15, dtype=torch.bfloat16)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    close(hae(**x), [v.bfloat16() for v in hae(**wide)], atol=0)


def test_gradients_do_not_flow_and_inputs_are_not_modified():
    x = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in batch(16).items()}
    copy = {k: v.detach().clone() for k, v in x.items()}
    got = hae(**x)
    adv, ret = gae(x["rewards"], x["mask"], x["v_low"], end_value=x["end_low"])
    gain = switch_gain(x["switch"], x["rewards"], x["v_high"], x["v_low"])
    normalized = normalize(x["rewards"], x["mask"])
    assert not any(v.requires_grad for v in (*got, adv, ret, gain, normalized))
    assert all(torch.equal(x[k], copy[k]) for k in x)


def test_nothing_is_read_back_from_the_device():
    """Reading a meta tensor raises, because it has no values. So the kernels never wait."""
    x = {k: v.to("meta") for k, v in batch(17).items()}
    got = hae(**x, validate=False)
    gae(x["rewards"], x["mask"], x["v_low"], end_value=x["end_low"], validate=False)
    switch_gain(x["switch"], x["rewards"], x["v_high"], x["v_low"])
    normalize(got.adv_action, x["mask"])
    with pytest.raises(RuntimeError):
        hae(**x)  # the validation does read


# ---- switch_gain and normalize ----


def test_switch_gain_by_hand():
    """(q - beta) (3 - 1); a certain decision has no advantage."""
    switch = torch.tensor([[True, False, True]])
    got = switch_gain(switch, row(0.25, 0.25, 1.0), row(3, 3, 3), row(1, 1, 1))
    assert got.tolist() == [[1.5, -0.5, 0.0]]


def test_switch_gain_has_mean_zero_under_the_policy():
    beta, high, keep = torch.rand(3, 4, 6, dtype=torch.float64)
    yes = switch_gain(torch.full((4, 6), True), beta, high, keep)
    no = switch_gain(torch.full((4, 6), False), beta, high, keep)
    mean = beta * yes + (1 - beta) * no
    torch.testing.assert_close(mean, torch.zeros(4, 6).double(), atol=1e-12, rtol=0)


def test_normalize():
    x = batch(18)
    x["rewards"][~x["mask"]] = float("nan")
    got = normalize(x["rewards"], x["mask"])
    n = x["mask"].sum()
    assert (got[~x["mask"]] == 0).all()
    assert abs(got.sum() / n) < 1e-12
    assert abs(got.square().sum() / n - 1) < 1e-6
    flat = normalize(x["rewards"][x["mask"]], torch.ones(n).bool())  # any shape
    torch.testing.assert_close(flat, got[x["mask"]])


@pytest.mark.parametrize("where", [[False] * 7, [True] + [False] * 6, [True] * 7])
def test_normalize_only_centres_equal_advantages(where):
    got = normalize(torch.full((1, 7), 1000.1), torch.tensor([where]))
    assert got.abs().max() < 1e-3  # rounding only: a division would make it 1


# ---- errors name their argument ----


def nan_at(x, t=0):
    x = x.clone()
    x[(0,) * x.ndim if t == 0 else (0, t)] = float("nan")
    return x


BAD = {
    "rewards-integer": ("rewards", lambda x: x["rewards"].long()),
    "rewards-flat": ("rewards", lambda x: x["rewards"][0]),
    "rewards-empty": ("rewards", lambda x: x["rewards"][:, :0]),
    "rewards-list": ("rewards", lambda x: x["rewards"].tolist()),
    "rewards-nan": ("rewards", lambda x: nan_at(x["rewards"])),
    "switch-float": ("switch", lambda x: x["switch"].double()),
    "switch-shape": ("switch", lambda x: x["switch"][:, 1:]),
    "mask-int": ("mask", lambda x: x["mask"].long()),
    "mask-gap": ("mask", lambda x: x["mask"] & (torch.arange(13) != 1)),
    "mask-empty-row": ("mask", lambda x: x["mask"] & (torch.arange(5) != 2)[:, None]),
    "v_high-dtype": ("v_high", lambda x: x["v_high"].float()),
    "v_high-shape": ("v_high", lambda x: x["v_high"][:4]),
    "v_high-device": ("v_high", lambda x: x["v_high"].to("meta")),
    "v_high-none": ("v_high", lambda x: None),
    "v_high-nan": ("v_high", lambda x: nan_at(x["v_high"], 3)),
    "v_low-inf": ("v_low", lambda x: nan_at(x["v_low"]).nan_to_num(nan=float("inf"))),
    "v_switch-nan": ("v_switch", lambda x: nan_at(x["v_switch"])),
    "v_switch-shape": ("v_switch", lambda x: x["v_switch"][..., None]),
    "end_high-shape": ("end_high", lambda x: x["end_high"][:, None]),
    "end_high-nan": ("end_high", lambda x: nan_at(x["end_high"])),
    "end_low-dtype": ("end_low", lambda x: x["end_low"].float()),
    "end_low-number": ("end_low", lambda x: 0.0),
    "gamma": ("gamma", lambda x: 1.01),
    "lam_low": ("lam_low", lambda x: -0.1),
    "lam_high": ("lam_high", lambda x: float("nan")),
}


@pytest.mark.parametrize("case", BAD)
def test_hae_names_the_bad_argument(case):
    x = batch(19)
    name, spoil = BAD[case]
    with pytest.raises(ValueError, match=rf"^{name} must"):
        hae(**(x | {name: spoil(x)}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("rewards", torch.zeros(2, 3).long()),
        ("mask", torch.ones(2, 3)),
        ("values", torch.zeros(2, 2)),
        ("values", torch.full((2, 3), float("nan"))),
        ("end_value", torch.zeros(3)),
        ("gamma", 2.0),
        ("lam", -1.0),
    ],
)
def test_gae_names_the_bad_argument(name, value):
    x = dict(rewards=torch.zeros(2, 3), mask=torch.ones(2, 3).bool(), values=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"^{name} must"):
        gae(**(x | {name: value}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("switch", torch.zeros(2)),
        ("p_switch", torch.zeros(2).long()),
        ("v_high", torch.zeros(3)),
        ("v_keep", torch.zeros(2).double()),
    ],
)
def test_switch_gain_names_the_bad_argument(name, value):
    x = dict(
        switch=torch.zeros(2).bool(),
        p_switch=torch.zeros(2),
        v_high=torch.zeros(2),
        v_keep=torch.zeros(2),
    )
    with pytest.raises(ValueError, match=rf"^{name} must"):
        switch_gain(**(x | {name: value}))


@pytest.mark.parametrize(
    "name, value",
    [("adv", torch.zeros(2).long()), ("where", torch.ones(2)), ("where", torch.ones(3).bool())],
)
def test_normalize_names_the_bad_argument(name, value):
    x = dict(adv=torch.zeros(2), where=torch.ones(2).bool())
    with pytest.raises(ValueError, match=rf"^{name} must"):
        normalize(**(x | {name: value}))


# ---- the file as a reader meets it ----


def test_demo_is_short():
    command = [sys.executable, ROOT / "hae.py"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = output.splitlines()
    assert 11 < len(lines) <= 25
    assert "flat GAE" in lines[0]
    assert lines[-1] == (
        "Segment 2 ends in a state with V_high 0.30. HAE gives its actions negative advantages; "
        "flat GAE gives them positive ones, because segment 3 earned a reward."
    )
