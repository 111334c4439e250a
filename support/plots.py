"""The learning curve of a run, as OUT/curve.png."""

import math


def plot_curves(out, log):
    """Success on training tasks and on the evaluated split; switches and turns per episode."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = log["lines"]
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1), layout="constrained"
    )
    iterations = [line["iteration"] for line in lines]
    above.plot(
        iterations,
        [100 * line["success"] for line in lines],
        ".-",
        color="tab:blue",
        label="training tasks, temperature 1",
    )
    if log["evals"]:
        _plot_evaluations(above, log["evals"])
    above.set(ylim=(0, 100), ylabel="success %")
    above.legend(loc="lower right", frameon=False)
    for key, label, colour in (
        ("switches_per_episode", "switches per episode", "tab:green"),
        ("episode_length", "turns per episode", "tab:gray"),
    ):
        below.plot(iterations, [line[key] for line in lines], ".-", color=colour, label=label)
    below.set(xlabel="iteration", ylim=(0, None))
    below.legend(frameon=False)
    figure.savefig(out / "curve.png", dpi=120)
    pyplot.close(figure)


def _plot_evaluations(axes, evals):
    """Points with 95 % intervals."""
    rates = [result["success"] for result in evals]
    errors = [
        196 * math.sqrt(result["success"] * (1 - result["success"]) / result["episodes"])
        for result in evals
    ]
    first = evals[0]
    axes.errorbar(
        [result["iteration"] for result in evals],
        [100 * rate for rate in rates],
        fmt="o",
        color="tab:red",
        yerr=errors,
        capsize=3,
        label=f"{first['split']}, {first['episodes']} tasks, temperature {first['temperature']}",
    )
