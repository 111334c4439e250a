"""How noisy are HAE's advantages, compared to flat GAE's?

    python benchmarks/variance.py                           # part one, 20 seconds of one core
    python benchmarks/variance.py --run runs/household-0    # and part two

Part one is exact: the tiny worlds of tests/tiny_mdp.py, all trajectories enumerated, mean over
random worlds and policies. It prints the gradient's standard deviation and bias for each lambda
(lam_low = lam_high, flat GAE at the same one), with exact critics and with critics that have a
random error. tests/test_theorems.py says what is proven of this and what is not.

Part two is sampled: household episodes of a trained run, and the spread of each advantage before it
is normalised. With one trajectory per task this spread is noise and signal together.

The last line gives flat GAE's gradient variance over HAE's in part one.
"""

import argparse
import dataclasses
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from hae import gae  # noqa: E402
from tiny_mdp import DECIDES, SEEN, STATE, TURN, Enumeration, random_world  # noqa: E402

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
PAIRS = [(lam, lam) for lam in LAMBDAS] + [(1.0, 0.95)]  # lam_low, lam_high; last: the paper's
LABELS = [f"{lam:.2f}" for lam in LAMBDAS] + ["1.00, 0.95"]
WORLDS = 20
ERROR = 0.2  # size of the critics' random error; the values' own spread is about 0.75
ESTIMATORS = ("flat", "closed_form", "value_head")
COLUMNS = (
    "gradient",  # standard deviation of one trajectory's gradient, exact critics
    "switch",  # standard deviation of the switch advantage's noise, as the next two
    "subgoal",
    "action",
    "bias",  # over |grad J|, exact critics
    "bias_all_wrong",  # the same, all critics with a random error
    "bias_high_wrong",  # only V_high with an error; HAE only
    "bias_low_wrong",  # only V_low with an error; HAE only
)


# ---- part one: the tiny worlds ----


def noise(m, advantages):
    """Standard deviation of each advantage about its mean given all its decision saw and chose."""
    stds = []
    for adv, given, where in zip(advantages, SEEN, DECIDES, strict=True):
        variance = m.variance(adv, *given, where=where)
        stds.append(m.average(variance, where) ** 0.5)
    return stds


def relative_bias(m, advantages):
    return float(m.bias(*advantages).norm() / m.grad_j.norm())


def measure(seed):
    """One world -> [estimators, pairs of lambdas, columns], with variances of the gradient."""
    m = Enumeration(*random_world(seed))  # gamma 1, as in the paper
    g = torch.Generator().manual_seed(seed)
    wrong = {}
    for name, value in m.values._asdict().items():
        wrong[name] = value + ERROR * torch.randn(value.shape, generator=g, dtype=value.dtype)
    all_wrong = m.values._replace(**{name: wrong[name] for name in ("high", "low", "switch")})
    high_wrong = m.values._replace(high=wrong["high"])
    low_wrong = m.values._replace(low=wrong["low"])
    # Flat GAE's critic gets V_high's error.
    flat_wrong = m.v_flat + (wrong["high"] - m.values.high)[TURN, STATE]  # [B, T]
    rows = {name: [] for name in ESTIMATORS}
    for pair in PAIRS:
        flat = [m.flat(pair[0])] * 3
        wrong_flat = [m.flat(pair[0], flat_wrong)] * 3
        bias = [relative_bias(m, flat), relative_bias(m, wrong_flat), 0.0, 0.0]
        rows["flat"].append([m.gradient_variance(*flat), *noise(m, flat), *bias])
        for form in ("closed_form", "value_head"):
            advantages = m.hae(*pair, form)
            bias = [relative_bias(m, advantages)]
            for values in (all_wrong, high_wrong, low_wrong):
                bias.append(relative_bias(m, m.hae(*pair, form, values)))
            rows[form].append([m.gradient_variance(*advantages), *noise(m, advantages), *bias])
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def exact():
    """Part one: measure, print and return the results.

    -> ({estimator: {column: means over worlds [pairs of lambdas]}}, the gradient variance of flat
    GAE at lambda 1 over HAE's at the paper's lambdas [worlds, (closed_form, value_head)]).
    """
    each = torch.stack([measure(seed) for seed in range(WORLDS)])  # [worlds, 3, pairs, columns]
    variance = each[..., 0]
    ratio = variance[:, :1, -1] / variance[:, 1:, -1]
    each[..., 0] = variance.sqrt()
    mean = {}
    for name, columns in zip(ESTIMATORS, each.mean(0), strict=True):
        mean[name] = dict(zip(COLUMNS, columns.unbind(-1), strict=True))
    print_noise(mean)
    print_bias(mean)
    return mean, ratio


def print_noise(mean):
    flat, closed, head = (mean[name] for name in ESTIMATORS)
    print(
        f"{WORLDS} tiny worlds, gamma 1, exact critics. Standard deviations of one trajectory's "
        "gradient and of\neach advantage's noise. HAE's switch advantage is closed_form or "
        "value_head."
    )
    print(
        "            | gradient              | switch       | subgoal     | action      | bias of\n"
        "lambda      |  flat  closed    head |  flat   head |  flat   HAE |  flat   HAE | flat GAE"
    )
    for i, label in enumerate(LABELS):
        print(
            f"{label:11s} | {flat['gradient'][i]:5.3f}   {closed['gradient'][i]:5.3f}   "
            f"{head['gradient'][i]:5.3f} | {flat['switch'][i]:5.3f}  {head['switch'][i]:5.3f} | "
            f"{flat['subgoal'][i]:5.3f} {closed['subgoal'][i]:5.3f} | "
            f"{flat['action'][i]:5.3f} {closed['action'][i]:5.3f} | {100 * flat['bias'][i]:6.1f} %"
        )
    print(
        "The closed form of the switch advantage has no noise. HAE has no bias. Flat GAE below "
        "lambda 1 has,\nbecause its critic does not see the subgoal.\n"
    )


def print_bias(mean):
    flat, closed, head = (mean[name] for name in ESTIMATORS)
    print(f"Bias in % of |grad J| where the critics have a random error of {ERROR}")
    print(
        "            | all critics wrong     | HAE, value_head, only\n"
        "lambda      |  flat  closed    head | V_high wrong  V_low wrong"
    )
    for i, label in enumerate(LABELS):
        print(
            f"{label:11s} | {100 * flat['bias_all_wrong'][i]:5.1f}   "
            f"{100 * closed['bias_all_wrong'][i]:5.1f}   {100 * head['bias_all_wrong'][i]:5.1f} | "
            f"{100 * head['bias_high_wrong'][i]:12.1f}  {100 * head['bias_low_wrong'][i]:11.1f}"
        )


# ---- part two: a trained run ----


def play(folder, episodes):
    """Part two: play training tasks with the last checkpoint, print and return the spreads.

    -> {name: (std of the advantage over all its turns, over those that open a segment)}.
    """
    import envs
    from config import ConfigError  # what only part two needs is imported in its functions
    from support.distributed import make_accelerator
    from support.loading import load_run

    try:
        saved, _, _ = load_run(folder)
        config = dataclasses.replace(
            saved,
            method="hiper",
            switch_advantage="value_head",
            kl_coef=0.0,  # no reference model
            untrained_kl_coef=0.0,
        )
        if not (config.model or (folder / "start").exists()):
            raise ConfigError(f"{folder} lacks start/, the model that the run began with")
        accelerator = make_accelerator()
        options = envs.world_options(config)
        with envs.EnvPool(config.env, envs.world(config.env).SPLITS[0], **options) as pool:
            run, iteration = restore(config, folder, pool, accelerator)
            played, batch, old, end_values = sample(run, episodes)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    success = sum(episode.success for episode in played) / episodes
    print(
        f"\n{folder}, iteration {iteration}: {episodes} episodes, success {success:.0%}; "
        f"gamma {config.gamma}, lam_low {config.lam_low}, lam_high {config.lam_high}"
    )
    spread = {}
    for name, (adv, where) in estimates(batch, old, end_values, config).items():
        opening = where & batch.switch
        spread[name] = (float(adv[where].std()), float(adv[opening].std()))
    print("std of the advantage     | all its turns | those that open a segment")
    for name, (everywhere, opening) in spread.items():
        print(f"{name:24s} | {everywhere:13.3f} | {opening:10.3f}")
    print("A flat critic is read on KEEP turns too. There V_high is not trained, and V_switch is.")
    return spread


def restore(config, folder, pool, accelerator):
    """-> (train.Run of the last checkpoint, its iteration)."""
    from support.checkpoint import load_checkpoint
    from train import make_run

    run = make_run(config, folder, pool, accelerator)
    iteration, _ = load_checkpoint(folder, run)
    return run, iteration


def sample(run, episodes):
    """Play random training tasks -> (Episodes, Batch, PolicyOutput, that of the final states)."""
    from accelerate.utils import set_seed

    import envs
    from rollout import collect
    from support.batch import make_batch
    from support.scoring import score_values

    config = run.config
    set_seed(config.seed)
    size = envs.size(config.env, run.pool.split)
    tasks = random.Random(config.seed).choices(range(size), k=episodes)
    with run.accelerator.autocast():
        played = collect(run.model.actor, run.tokenizer, run.pool, tasks, config)
        batch = make_batch(played, run.tokenizer)
        old = score_values(run, batch.samples)
        end_values = score_values(run, batch.final_states)
    return played, batch, old, end_values


def estimates(batch, old, end_values, config):
    """{name: (advantage [B, T], turns that have it [B, T])} of HAE and flat GAE."""
    from hiper import hiper_advantages

    ends = end_values if config.bootstrap else None
    raw = hiper_advantages(batch, old, config, not_normalized, end_values=ends).raw
    later = batch.mask.clone()
    later[:, 0] = False
    result = {
        "HAE action": (raw["A_action"], batch.mask),
        "HAE subgoal": (raw["A_subgoal"], batch.switch & batch.mask),
        "HAE switch, value_head": (raw["A_switch"], later),
    }
    end_value = end_values.v_high * (batch.truncated & config.bootstrap)  # [B]
    for lam in sorted({1.0, 0.95, config.lam_low}, reverse=True):
        for head in ("high", "switch"):
            adv, _ = gae(
                batch.rewards,
                batch.mask,
                batch.to_grid(old.value(head)),
                gamma=config.gamma,
                lam=lam,
                end_value=end_value,
            )
            result[f"flat GAE {lam:g}, V_{head}"] = (adv, batch.mask)
    return result


def not_normalized(adv, where, scale=True):
    return adv


# ---- the picture ----


def plot(mean, spread, path):
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 3 if spread else 2
    figure, axes = pyplot.subplots(1, width, figsize=(5 * width, 5), layout="constrained")
    plot_worlds(axes[0], axes[1], mean)
    if spread:
        names = list(spread)[::-1]
        values = [spread[name][0] for name in names]
        colours = ["tab:gray" if "flat" in name else "tab:blue" for name in names]
        axes[2].barh(names, values, color=colours)
        axes[2].set_title("trained run: std of advantages (noise and signal)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_worlds(std_axes, bias_axes, mean):
    """Part one: the gradient's standard deviation, and its bias with wrong critics."""
    n = len(LAMBDAS)  # the paper's pair of lambdas is not on the axis
    for name, style, label, note in (
        ("flat", ".:k", "flat GAE", ", biased below 1"),
        ("closed_form", ".-b", "HAE, closed_form", ""),
        ("value_head", ".-g", "HAE, value_head", ""),
    ):
        std_axes.plot(LAMBDAS, mean[name]["gradient"][:n], style, label=label + note)
        bias_axes.plot(LAMBDAS, 100 * mean[name]["bias_all_wrong"][:n], style, label=label)
    for name, column, style, label in (
        ("flat", "bias", "x:y", "flat GAE, but critic exact"),
        ("value_head", "bias_high_wrong", "--c", "HAE, value_head, only V_high wrong"),
        ("value_head", "bias_low_wrong", "--m", "HAE, value_head, only V_low wrong"),
    ):
        bias_axes.plot(LAMBDAS, 100 * mean[name][column][:n], style, label=label)
    for axes, title in (
        (std_axes, "std of the gradient, exact critics"),
        (bias_axes, f"bias in % of |grad J|, critics wrong by {ERROR}"),
    ):
        axes.set_title(f"{WORLDS} tiny worlds: {title}", fontsize=10)
        axes.set_xlabel("lambda (lam_low = lam_high)")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="the --out folder of a training run, for part two")
    parser.add_argument("--episodes", type=int, default=256, help="episodes of part two")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the picture"
    )
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error("--episodes must be 1 or more")
    if args.run and not (args.run / "checkpoint").exists():
        sys.exit(f"error: {args.run} has no checkpoint: give the --out of a training run")
    torch.set_num_threads(1)
    mean, ratio = exact()
    spread = play(args.run, args.episodes) if args.run else {}
    if not args.run:
        print("\nPart two needs a trained agent: `python train.py`, then `--run runs/household-0`.")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "variance.png"
    plot(mean, spread, path)
    print(f"\n{path}\nGradient variance on the tiny worlds, flat GAE at lambda 1 over HAE at the")
    print("paper's lambdas, geometric mean (range over worlds); the last line is closed_form's")
    means = ratio.log().mean(0).exp()
    for name, over, each in zip(ESTIMATORS[1:], means, ratio.T, strict=True):
        print(f"{name}: {over:.2f} ({each.min():.2f} to {each.max():.2f})")
    print(f"variance: {means[0]:.2f}x")


if __name__ == "__main__":
    main()
