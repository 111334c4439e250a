"""How noisy is HAE's credit beside flat GAE's? `python benchmarks/variance.py [--run runs/household-0] [--episodes N]`.

Part one, exact: the tiny worlds of tests/tiny_mdp.py, all trajectories enumerated, mean over random worlds and policies. The
gradient's standard deviation and bias against lambda (lam_low = lam_high, flat GAE at the same one), with exact critics and with
critics that carry a random error. What is provable here, and what is not, stands in tests/test_theorems.py.
Part two, sampled: household episodes of a trained run, and the spread of each advantage before it is normalised. One
trajectory per task says nothing about noise alone: this spread is noise and signal together.
"""

import argparse
import dataclasses
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from hae import gae
from tiny_mdp import DECIDES, SEEN, STATE, TURN, Enumeration, random_world

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
PAIRS = [(lam, lam) for lam in LAMBDAS] + [
    (1.0, 0.95)
]  # lam_low, lam_high; the last are the paper's
WORLDS = 20
LABELS = [f"{lam:.2f}" for lam in LAMBDAS] + ["1.00, 0.95"]
ERROR = 0.2  # size of the critics' random error, where they have one; the values' own spread is about 0.75


# ---- part one: the tiny worlds ----


def noise(m, three):
    """Standard deviation of each advantage about its mean, given all that its decision saw and chose -> switch, subgoal, action."""
    return [
        m.average(m.variance(x, *given, where=where), where) ** 0.5
        for x, given, where in zip(three, SEEN, DECIDES)
    ]


def measure(seed):
    """One world -> [3, lambdas, 8]: flat, gain, critic; for each of PAIRS the gradient's variance, three noises, four biases."""
    m = Enumeration(*random_world(seed))  # gamma 1, as in the paper
    g = torch.Generator().manual_seed(seed)
    wrong = {
        k: v + ERROR * torch.randn(v.shape, generator=g, dtype=v.dtype)
        for k, v in m.values._asdict().items()
    }
    every, high, low = (
        m.values._replace(**{k: wrong[k] for k in names.split()})
        for names in ("high low switch", "high", "low")
    )
    flat_error = (wrong["high"] - m.values.high)[
        TURN, STATE
    ]  # [B, T] one number per state and turn
    bias = lambda three: float(m.bias(*three).norm() / m.grad_j.norm())
    rows = {"flat": [], "gain": [], "critic": []}
    for pair in PAIRS:
        flat, off = [m.flat(pair[0])] * 3, [m.flat(pair[0], m.v_flat + flat_error)] * 3
        rows["flat"].append(
            (m.gradient_variance(*flat), *noise(m, flat), bias(flat), bias(off), 0, 0)
        )
        for form in ("gain", "critic"):
            three = m.hae(*pair, form)
            rows[form].append(
                (
                    m.gradient_variance(*three),
                    *noise(m, three),
                    bias(three),
                    *(bias(m.hae(*pair, form, values)) for values in (every, high, low)),
                )
            )
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def exact():
    """-> mean over worlds [3, lambdas, 8], and variance of flat GAE at lambda 1 over HAE's at the paper's lambdas [worlds]."""
    each = torch.stack([measure(seed) for seed in range(WORLDS)])  # [worlds, 3, lambdas, 8]
    ratio = each[:, 0, -1, 0] / each[:, 1, -1, 0]
    each[..., 0] = each[..., 0].sqrt()
    mean = each.mean(0).transpose(0, 1)  # [lambdas, 3, 8]
    print(
        f"{WORLDS} tiny worlds, gamma 1, exact critics. Std of one trajectory's gradient, and of each advantage's noise\n"
        "lambda      | gradient: flat   gain  critic | switch: flat critic | subgoal: flat   HAE | action: flat   HAE | flat's bias"
    )
    for lam, (f, g, c) in zip(LABELS, mean):
        print(
            f"{lam:11s} | {f[0]:14.3f} {g[0]:6.3f} {c[0]:7.3f} | {f[1]:12.3f} {c[1]:6.3f} | {f[2]:13.3f} {g[2]:5.3f} | "
            f"{f[3]:12.3f} {g[3]:5.3f} | {100 * f[4]:10.1f} %"
        )
    print(
        "The gain form's switch has no noise. HAE has no bias; flat GAE below 1 has: its critic does not see the subgoal.\n\n"
        f"Bias in % of |grad J|, critics with a random error of {ERROR}\n"
        "lambda      |  flat | HAE gain | HAE critic | critic, only V_high wrong | critic, only V_low wrong"
    )
    for lam, (f, g, c) in zip(LABELS, 100 * mean):
        print(f"{lam:11s} | {f[5]:5.1f} | {g[5]:8.1f} | {c[5]:10.1f} | {c[6]:25.1f} | {c[7]:24.1f}")
    return mean.transpose(0, 1), ratio


# ---- part two: a trained run ----


def play(folder, episodes):
    """Play training tasks with the last checkpoint -> {name: std of the advantage over (all its turns, those opening a segment)}."""
    import envs
    import train
    from config import UserError, read_config
    from credit import assign
    from rollout import batch_of, collect, score

    try:
        config = dataclasses.replace(
            read_config([str(folder / "config.json")]),
            kl=0.0,
            kl_rest=0.0,  # no reference model
            method="hiper",
            switch_advantage="critic",
            heads=3,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    if not (config.model or (folder / "start").exists()):
        sys.exit(f"error: {folder} lacks start/, the tokenizer and model that the run began with")
    accelerator = train.Accelerator(cpu=config.cpu)
    with envs.Runner(config.env, envs.world(config.env).SPLITS[0], config.env_workers) as runner:
        policy, tokenizer, _ = train.build(config, folder, runner, accelerator)
        saved = torch.load(
            folder / "checkpoint.pt", map_location=accelerator.device, weights_only=True
        )
        policy.load_state_dict(saved["policy"])
        train.set_seed(config.seed)
        tasks = random.Random(config.seed).choices(
            range(envs.size(config.env, runner.split)), k=episodes
        )
        played = collect(
            policy.actor,
            tokenizer,
            runner,
            tasks,
            slots=config.slots,
            temperature=config.temperature,
            style=config.style,
        )
    batch = batch_of(played, tokenizer)
    old, ends = (
        score(policy, x, tokens=config.tokens_per_batch) for x in (batch.samples, batch.ends)
    )
    shown = assign(batch, old, config, lambda adv, where: adv, ends).shown
    end = ends.v_high * (batch.truncated & config.bootstrap)  # [B]
    spread = {
        "HAE action": (shown["A_action"], batch.mask),
        "HAE subgoal": (shown["A_subgoal"], batch.switch & batch.mask),
        "HAE switch, critic": (
            shown["A_switch"],
            batch.mask & (torch.arange(batch.mask.shape[1]) > 0),
        ),
    }
    for lam in sorted({1.0, 0.95, config.lam_low}, reverse=True):
        for name in ("v_high", "v_switch"):
            adv, _ = gae(
                batch.rewards,
                batch.mask,
                batch.grid(getattr(old, name)),
                gamma=config.gamma,
                lam=lam,
                end_value=end,
            )
            spread[f"flat GAE {lam:g}, V_{name[2:]}"] = adv, batch.mask
    std = lambda adv, where: float(adv[where].std())
    spread = {
        name: (std(adv, where), std(adv, where & batch.switch))
        for name, (adv, where) in spread.items()
    }
    print(
        f"\n{folder}, iteration {saved['iteration']}: {episodes} episodes, won {sum(e.won for e in played) / episodes:.0%}; "
        f"gamma {config.gamma}, lam_low {config.lam_low}, lam_high {config.lam_high}\n"
        "std of the advantage     | all its turns | those that open a segment"
    )
    for name, (everywhere, opening) in spread.items():
        print(f"{name:24s} | {everywhere:13.3f} | {opening:10.3f}")
    print(
        "V_high as a flat critic is read on KEEP turns too, where nothing trains it; V_switch is trained on every turn."
    )
    return spread


# ---- the picture ----


def picture(mean, spread, path):
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width, n = 2 + bool(spread), len(LAMBDAS)
    figure, axes = plt.subplots(1, width, figsize=(5 * width, 5), layout="constrained")
    for i, (name, style) in enumerate(
        {"flat GAE": ".:k", "HAE, gain": ".-b", "HAE, critic": ".-g"}.items()
    ):
        axes[0].plot(LAMBDAS, mean[i, :n, 0], style, label=name + ("" if i else ", biased below 1"))
        axes[1].plot(LAMBDAS, 100 * mean[i, :n, 5], style, label=name)
    for i, j, style, label in (
        (0, 4, "x:y", "flat GAE, but critic exact"),
        (2, 6, "--c", "HAE, critic, only V_high wrong"),
        (2, 7, "--m", "HAE, critic, only V_low wrong"),
    ):
        axes[1].plot(LAMBDAS, 100 * mean[i, :n, j], style, label=label)
    for axis, title in zip(
        axes,
        ("std of the gradient, exact critics", f"bias in % of |grad J|, critics wrong by {ERROR}"),
    ):
        axis.set(
            title=f"{WORLDS} tiny worlds: {title}",
            xlabel="lambda (lam_low = lam_high)",
            ylim=(0, 1.1 * axis.get_ylim()[1]),
        )
        axis.title.set_fontsize(10)
        axis.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2
        )
    if spread:
        names = list(spread)[::-1]
        axes[2].barh(
            names,
            [spread[k][0] for k in names],
            color=["tab:gray" if "flat" in k else "tab:blue" for k in names],
        )
        axes[2].set_title("trained run: std of advantages (noise and signal)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="the --out folder of a training run, for part two")
    parser.add_argument("--episodes", type=int, default=256, help="episodes of part two")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the picture"
    )
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error("--episodes must be 1 or more")
    if args.run and not all(
        (args.run / name).exists() for name in ("config.json", "checkpoint.pt")
    ):
        sys.exit(
            f"error: {args.run} lacks config.json or checkpoint.pt: give the --out of a training run that has saved"
        )
    torch.set_num_threads(1)
    mean, ratio = exact()
    spread = play(args.run, args.episodes) if args.run else {}
    if not spread:
        print(
            "\nPart two needs a trained agent: make one with `python train.py` (ten minutes), then give `--run runs/household-0`."
        )
    picture(mean, spread, args.out / "variance.png")
    print(
        f"\n{args.out / 'variance.png'}\ngradient variance on the tiny worlds, flat GAE at lambda 1 over HAE (gain) at the paper's "
        f"lambdas: {ratio.min():.2f} to {ratio.max():.2f}, mean\nvariance: {ratio.log().mean().exp():.2f}x"
    )


if __name__ == "__main__":
    main()
