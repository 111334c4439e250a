"""How fast is hae.py, compared to loops? About a minute on two CPU cores.

    python benchmarks/hae.py

It also measures a GPU where there is one. Each reference is written as such code usually is, and
checked to give the same numbers:
    loop     over trajectories and turns, on tensor elements: one backward pass for all recurrences
    floats   the same loop on Python floats (`.tolist()` first, one tensor at the end)
    gae      flat GAE as a loop over turns, vectorised over the batch; compared to our `gae`
    floor    time to read all inputs and write all outputs once, at the copy bandwidth measured here
Times are the best of several runs. Trajectories have T/2 to T turns, at random. A fifth of the
turns are SWITCH. The last line gives the time of `loop` over that of hae at 128 x 50 on the CPU.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this file's own name is hae, too
from hae import HAE, gae, hae  # noqa: E402

SIZES = [(32, 50), (128, 50), (512, 50), (1024, 50), (4096, 50), (128, 1000)]
GAMMA = 0.99
LAM_LOW = 0.95
LAM_HIGH = 0.9
SETTINGS = dict(gamma=GAMMA, lam_low=LAM_LOW, lam_high=LAM_HIGH)
MAX_LOOP_TURNS = 6400  # turns of a batch that `loop` is timed on


# ---- the references ----


def loop_row(r, switch, n, v_high, v_low, v_switch, end_high, end_low, out):
    """One trajectory, last turn first. r, switch, v_* and the six parts of out are rows [T]."""
    adv_action, adv_subgoal, adv_switch, ret_low, ret_high, ret_switch = out
    a_high = 0.0
    # What the turn after this one passes back.
    v_next = end_low
    g_next = end_high
    a_next = 0.0
    length = 0
    for t in reversed(range(n)):
        a_low = r[t] + GAMMA * v_next - v_low[t] + GAMMA * LAM_LOW * a_next
        g = r[t] + GAMMA * g_next
        adv_action[t] = a_low
        ret_low[t] = a_low + v_low[t]
        adv_switch[t] = g - v_switch[t]
        ret_switch[t] = g
        v_next = v_low[t]
        g_next = g
        a_next = a_low
        length += 1
        if switch[t] or t == 0:  # a segment opens
            a_high = g - v_high[t] + GAMMA**length * LAM_HIGH * a_high
            adv_subgoal[t] = a_high
            ret_high[t] = a_high + v_high[t]
            v_next = v_high[t]
            g_next = v_high[t]
            a_next = 0.0
            length = 0
    return out


def loop(x, rows):
    """On tensor elements -> HAE of the first `rows` trajectories."""
    out = [torch.zeros_like(x["rewards"][:rows]) for _ in HAE._fields]
    for b in range(rows):
        loop_row(
            r=x["rewards"][b],
            switch=x["switch"][b],
            n=int(x["mask"][b].sum()),
            v_high=x["v_high"][b],
            v_low=x["v_low"][b],
            v_switch=x["v_switch"][b],
            end_high=x["end_high"][b],
            end_low=x["end_low"][b],
            out=[part[b] for part in out],
        )
    return HAE(*out)


def loop_floats(x):
    """The same on Python floats."""
    like = x["rewards"]
    names = ("rewards", "switch", "v_high", "v_low", "v_switch", "end_high", "end_low")
    lists = {name: x[name].tolist() for name in names}
    turns = x["mask"].sum(1).tolist()
    results = []
    for b in range(len(like)):
        row = {name: values[b] for name, values in lists.items()}
        r = row.pop("rewards")
        out = [[0.0] * like.shape[1] for _ in HAE._fields]
        results.append(loop_row(r=r, n=turns[b], out=out, **row))
    return HAE(*torch.tensor(results, dtype=like.dtype, device=like.device).unbind(1))


def gae_loop(rewards, mask, values, end_value):
    """Turn by turn, vectorised over the batch."""
    adv = torch.zeros_like(rewards)
    a_next = torch.zeros_like(end_value)  # [B]
    v_next = end_value  # [B]
    for t in reversed(range(rewards.shape[1])):
        on = mask[:, t]
        a = rewards[:, t] + GAMMA * v_next - values[:, t] + GAMMA * LAM_LOW * a_next
        a_next = torch.where(on, a, a_next)
        v_next = torch.where(on, values[:, t], v_next)
        adv[:, t] = a_next * on
    return adv, (adv + values) * mask


# ---- inputs, timing, checks ----


def batch(B, T, device, dtype=torch.float32):
    """The keyword arguments of hae."""
    g = torch.Generator().manual_seed(0)
    x = {}
    for name in ("rewards", "v_high", "v_low", "v_switch"):
        x[name] = torch.randn(B, T, generator=g, dtype=dtype)
    x["switch"] = torch.rand(B, T, generator=g) < 0.2
    x["mask"] = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1), generator=g)
    for name in ("end_high", "end_low"):
        x[name] = torch.randn(B, generator=g, dtype=dtype)
    return {name: value.to(device) for name, value in x.items()}


def best(function, *args, repeats=3, **kwargs):
    """Seconds of the fastest of at least `repeats` calls in a quarter second, after one warm-up."""
    function(*args, **kwargs)
    times = []
    while len(times) < repeats or sum(times) < 0.25:
        synchronize()
        start = time.perf_counter()
        function(*args, **kwargs)
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def assert_close(got, want, atol, what):
    for name, a, b in zip(HAE._fields, got, want, strict=False):  # gae has two results
        message = f"{what}, {name}: {{}}".format
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=message)


def check(B, T, device):
    """All references give hae.py's numbers.

    In float64 to 1e-9; `loop`, which is slow, on some rows in the float32 that is timed.
    """
    x = batch(B, T, device, torch.float64)
    assert_close(hae(**x, **SETTINGS), loop_floats(x), 1e-9, "floats")
    args = (x["rewards"], x["mask"], x["v_low"])
    flat = gae(*args, gamma=GAMMA, lam=LAM_LOW, end_value=x["end_low"])
    assert_close(flat, gae_loop(*args, x["end_low"]), 1e-9, "gae")
    x = batch(B, T, device)
    rows = min(B, max(1, MAX_LOOP_TURNS // T // 4))
    ours = [part[:rows] for part in hae(**x, **SETTINGS)]
    assert_close(ours, loop(x, rows), 1e-3, "loop")


# ---- the table ----


def measure(B, T, device, loop_turns):
    """{what: seconds} at one size. `loop` is timed on some rows and scaled up to B."""
    x = batch(B, T, device)
    rows = min(B, max(1, loop_turns // T))
    args = (x["rewards"], x["mask"], x["v_low"])
    return {
        "hae": best(hae, **x, **SETTINGS),
        "unchecked": best(hae, **x, **SETTINGS, validate=False),
        "loop": best(loop, x, rows, repeats=2) * B / rows,
        "floats": best(loop_floats, x, repeats=2),
        "gae": best(gae, *args, gamma=GAMMA, lam=LAM_LOW, end_value=x["end_low"]),
        "gae loop": best(gae_loop, *args, x["end_low"]),
        "bytes": sum(v.nbytes for v in x.values()) + len(HAE._fields) * x["rewards"].nbytes,
        "scaled": rows < B,
    }


def table(device):
    """Print one line per size -> {(B, T): what `measure` returns}."""
    block = torch.zeros(2, 2**24, device=device)  # 64 MiB are copied: as much read as written
    bandwidth = block.nbytes / best(block[0].copy_, block[1])
    loop_turns = MAX_LOOP_TURNS if device == "cpu" else MAX_LOOP_TURNS // 8
    print(
        f"{device}, copy bandwidth {bandwidth / 1e9:.1f} GB/s. Milliseconds; in brackets the ratio "
        "to hae (checked) or gae."
    )
    print("   B x T     | hae (ns a turn)  | unchecked  | floor      |", end="")
    print(" loop                | floats           | gae    | its loop")
    found = {}
    for B, T in SIZES:
        check(B, T, device)
        found[B, T] = measure(B, T, device, loop_turns)
        print(format_row(B, T, found[B, T], bandwidth), flush=True)
    print(f"* timed on rows with {loop_turns} turns in all and scaled up to the batch")
    print_growth(found)
    return found


def format_row(B, T, seconds, bandwidth):
    ms = {name: 1e3 * value for name, value in seconds.items()}
    per_turn = seconds["hae"] / (B * T) * 1e9
    floor = seconds["bytes"] / bandwidth * 1e3
    star = "*" if seconds["scaled"] else " "
    cells = [
        f"{B:5d} x {T:<4d}",
        f"{ms['hae']:6.2f} ({per_turn:6.0f}) ",
        f"{ms['unchecked']:10.2f}",
        f"{floor:10.3f}",
        f"{ms['loop']:9.1f}{star}({ms['loop'] / ms['hae']:6.0f}x)",
        f"{ms['floats']:7.2f} ({ms['floats'] / ms['hae']:5.1f}x)",
        f"{ms['gae']:6.2f}",
        f"{ms['gae loop']:6.2f} ({ms['gae loop'] / ms['gae']:.1f}x)",
    ]
    return " | ".join(cells)


def print_growth(found):
    """How the times grow with the batch and with the number of turns."""

    def growth(name, small, large):
        return found[large][name] / found[small][name]

    hae_rows = growth("hae", (32, 50), (4096, 50))
    loop_rows = growth("loop", (32, 50), (4096, 50))
    hae_turns = growth("hae", (128, 50), (128, 1000))
    loop_turns = growth("loop", (128, 50), (128, 1000))
    print(
        f"128 times the rows (32 to 4096): hae takes {hae_rows:.0f} times as long, "
        f"(B T)^{math.log(hae_rows, 128):.2f}, the loop {loop_rows:.0f} times.\n"
        f"20 times the turns (50 to 1000): hae {hae_turns:.0f} times, the loop "
        f"{loop_turns:.0f} times.\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(min(2, os.cpu_count()))
    if torch.cuda.is_available():
        table("cuda")
    seconds = table("cpu")[128, 50]
    print(
        f"128 x 50 on the CPU, {torch.get_num_threads()} threads: {seconds['hae'] * 1e3:.2f} ms, "
        f"the loop {seconds['loop'] * 1e3:.0f} ms"
    )
    print(f"hae: {seconds['loop'] / seconds['hae']:.0f}x")
