"""How fast is hae.py? `python benchmarks/hae.py`, about a minute on two CPU cores; uses a GPU too where there is one.

Against it stand, written as such code is usually written, and each checked to give the same numbers:
    loop    over trajectories and turns, on tensor elements: one backward pass that carries all three recurrences
    quick   the same loop on plain Python floats (`.tolist()` first, one tensor at the end): the fairest quick loop
    gae     flat GAE, a loop over turns that is vectorised over the batch, against our `gae`
    floor   the time to read all inputs and write all outputs once, at the copy bandwidth measured here on 64 MiB
Times are the best of several runs. Trajectories are T/2 to T turns long, at random; a fifth of the turns are SWITCH.
"""

import math
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this file's own name is hae, too

import torch

from hae import HAE, gae, hae

SIZES = [(32, 50), (128, 50), (512, 50), (1024, 50), (4096, 50), (128, 1000)]
GAMMA, LAM_LOW, LAM_HIGH = 0.99, 0.95, 0.9
SETTINGS = dict(gamma=GAMMA, lam_low=LAM_LOW, lam_high=LAM_HIGH)
MOST = 6400  # turns of a batch that `loop` is timed on


# ---- the references ----


def loop_row(r, switch, n, v_high, v_low, v_switch, end_high, end_low, out):
    """One trajectory, last turn first; r, switch, v_* and out's six parts are rows [T] of tensors or lists."""
    a_low = g = a_high = 0.0
    v_next, g_next, carry, length = (
        end_low,
        end_high,
        0.0,
        0,
    )  # what the turn after this one hands back
    for t in reversed(range(n)):
        a_low = r[t] + GAMMA * v_next - v_low[t] + GAMMA * LAM_LOW * carry
        g = r[t] + GAMMA * g_next
        out[0][t], out[2][t] = a_low, g - v_switch[t]
        out[3][t], out[5][t] = a_low + v_low[t], g
        v_next, g_next, carry, length = v_low[t], g, a_low, length + 1
        if switch[t] or t == 0:  # a segment opens: the planner's turn
            a_high = g - v_high[t] + GAMMA**length * LAM_HIGH * a_high
            out[1][t], out[4][t] = a_high, a_high + v_high[t]
            v_next, g_next, carry, length = v_high[t], v_high[t], 0.0, 0
    return out


def loop(x, rows):
    """`loop`: tensor elements, as peers write it -> HAE of the first `rows` trajectories."""
    out = [torch.zeros_like(x["rewards"][:rows]) for _ in HAE._fields]
    for b in range(rows):
        loop_row(
            x["rewards"][b],
            x["switch"][b],
            int(x["mask"][b].sum()),
            x["v_high"][b],
            x["v_low"][b],
            x["v_switch"][b],
            x["end_high"][b],
            x["end_low"][b],
            [o[b] for o in out],
        )
    return HAE(*out)


def quick(x):
    """`quick`: the same on Python floats."""
    T, like = x["rewards"].shape[1], x["rewards"]
    lists = [x[k].tolist() for k in ("rewards", "switch")] + [x["mask"].sum(1).tolist()]
    lists += [x[k].tolist() for k in ("v_high", "v_low", "v_switch", "end_high", "end_low")]
    rows = [loop_row(*row, [[0.0] * T for _ in HAE._fields]) for row in zip(*lists)]
    return HAE(*torch.tensor(rows, dtype=like.dtype, device=like.device).unbind(1))


def gae_loop(rewards, mask, values, end_value):
    """Turn by turn, vectorised over the batch."""
    adv, carry, T = torch.zeros_like(rewards), torch.zeros_like(end_value), rewards.shape[1]
    v_next = end_value  # [B]
    for t in reversed(range(T)):
        on = mask[:, t]
        carry = torch.where(
            on, rewards[:, t] + GAMMA * v_next - values[:, t] + GAMMA * LAM_LOW * carry, carry
        )
        v_next = torch.where(on, values[:, t], v_next)
        adv[:, t] = carry * on
    return adv, (adv + values) * mask


def batch(B, T, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = {
        k: torch.randn(B, T, generator=g, dtype=dtype)
        for k in ("rewards", "v_high", "v_low", "v_switch")
    }
    x["switch"] = torch.rand(B, T, generator=g) < 0.2
    x["mask"] = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1), generator=g)
    x |= {k: torch.randn(B, generator=g, dtype=dtype) for k in ("end_high", "end_low")}
    return {k: v.to(device) for k, v in x.items()}


def best(f, seconds=0.25, least=3):
    """Seconds of the fastest of at least `least` runs in about `seconds`, after one that does not count."""
    f()
    times = []
    while len(times) < least or sum(times) < seconds:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def agree(got, want, atol, what):
    for name, a, b in zip(HAE._fields, got, want):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda m: f"{what}, {name}: {m}")


def check(B, T, device):
    """All references say what hae.py says: in float64 to 1e-9, and the slow loop in the float32 that is timed."""
    x, y, rows = batch(B, T, device, torch.float64), batch(B, T, device), max(1, MOST // T // 4)
    agree(hae(**x, **SETTINGS), quick(x), 1e-9, "quick")
    agree([o[:rows] for o in hae(**y, **SETTINGS)], loop(y, min(rows, B)), 1e-3, "loop")
    args = x["rewards"], x["mask"], x["v_low"]
    agree(
        gae(*args, gamma=GAMMA, lam=LAM_LOW, end_value=x["end_low"]),
        gae_loop(*args, x["end_low"]),
        1e-9,
        "gae",
    )


def table(device):
    """Print one line per size -> {(B, T): (seconds of hae, seconds of loop)}."""
    block = torch.zeros(2, 2**24, device=device)  # 64 MiB are copied: as much read as written
    bandwidth = block.nbytes / best(lambda: block[0].copy_(block[1]))
    print(
        f"{device}, copy bandwidth {bandwidth / 1e9:.1f} GB/s. Milliseconds, in brackets times ours (hae checked, gae)"
    )
    heads = "hae (ns a turn)", "unchecked", "floor", "loop", "quick", "gae", "its loop"
    print(
        "   B x T    ",
        *(f"{head:>{width}}" for head, width in zip(heads, (17, 10, 10, 19, 16, 6, 8))),
        sep=" | ",
    )
    found, most = {}, MOST if device == "cpu" else MOST // 8
    for B, T in SIZES:
        check(B, T, device)
        x, rows = batch(B, T, device), min(B, max(1, most // T))
        args = x["rewards"], x["mask"], x["v_low"]
        full, bare = (
            best(lambda: hae(**x, **SETTINGS)),
            best(lambda: hae(**x, **SETTINGS, validate=False)),
        )
        slow, fair = (
            best(lambda: loop(x, rows), least=2) * B / rows,
            best(lambda: quick(x), least=2),
        )
        flat = best(lambda: gae(*args, gamma=GAMMA, lam=LAM_LOW, end_value=x["end_low"]))
        turns = best(lambda: gae_loop(*args, x["end_low"]))
        floor = (
            sum(v.nbytes for v in x.values()) + len(HAE._fields) * x["rewards"].nbytes
        ) / bandwidth
        print(
            f"{B:5d} x {T:<4d} | {full * 1e3:6.2f} ({full / B / T * 1e9:8.0f}) | {bare * 1e3:10.2f} | {floor * 1e3:10.3f} |"
            f" {slow * 1e3:9.1f}{'*' if rows < B else ' '}({slow / full:6.0f}x) | {fair * 1e3:7.2f} ({fair / full:5.1f}x) |"
            f" {flat * 1e3:6.2f} | {turns * 1e3:6.2f} ({turns / flat:.1f}x)",
            flush=True,
        )
        found[B, T] = full, slow
    print(f"* timed on rows with {most} turns in all and scaled up to the batch")
    rows, length = (
        [b / a for a, b in zip(found[small], found[large])]  # growth of (hae, loop)
        for small, large in (((32, 50), (4096, 50)), ((128, 50), (128, 1000)))
    )
    print(
        f"128 times the rows (32 to 4096) cost hae {rows[0]:.0f} times as much, (B T)^{math.log(rows[0], 128):.2f}, the loop "
        f"{rows[1]:.0f} times; 20 times the turns (50 to 1000) {length[0]:.0f} and {length[1]:.0f} times\n"
    )
    return found


if __name__ == "__main__":
    torch.set_num_threads(min(2, os.cpu_count()))
    if torch.cuda.is_available():
        table("cuda")
    full, slow = table("cpu")[128, 50]
    print(
        f"128 x 50 on the CPU, {torch.get_num_threads()} threads: {full * 1e3:.2f} ms, the loop {slow * 1e3:.0f} ms"
    )
    print(f"hae: {slow / full:.0f}x")
