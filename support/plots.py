"""Pictures of the log: a run's learning curve (OUT/curve.png), and the run report's as PNGs.

Nothing is drawn where matplotlib is missing.
"""

import json
import math
import re

from support.metrics import printable, rate_interval

COLOURS = ("#1f6fd0", "#d2600a", "#138073", "#b4467c", "#9a6f10")  # as in pages.css
DASHES = ("-", "--", ":")
GRAY = "#646a73"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9bcc0",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "grid.color": "#e4e5e3",
    "legend.frameon": False,
    "text.color": "#1d1f23",
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "axes.labelcolor": GRAY,
}


def _pyplot():
    """matplotlib.pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plain(text):
    """Text of a world or a run, not as a formula."""
    return printable(text).replace("$", r"\$")


def _mark_warmup(axes, warmup, label):
    """Shade the iterations that trained only the critic."""
    if warmup:
        axes.axvspan(-0.5, warmup - 0.5, color=GRAY, alpha=0.13, lw=0)
        if label:
            axes.annotate(
                "critic warm-up:\nthe actor waits",
                (-0.4, 0.98),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize="small",
                color=GRAY,
            )


# ---- a run -------------------------------------------------------------------------------------


def plot_curves(out, log):
    """OUT/curve.png: success in training and in evaluations; switches and turns per episode."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    path = out / "config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    lines = log["lines"]
    iterations = [line["iteration"] for line in lines]
    with pyplot.rc_context(STYLE):
        figure, (above, below) = pyplot.subplots(
            2, 1, sharex=True, figsize=(7.5, 6), height_ratios=(2, 1), layout="constrained"
        )
        rates = [100 * line["success"] for line in lines]
        label = "training episodes, temperature 1"
        above.plot(iterations, rates, ".-", color=COLOURS[0], label=label)
        if log["evals"]:
            _plot_evaluations(above, log["evals"])
        above.set(ylim=(0, 103), title="Success %")
        above.legend(loc="lower right")
        for key, label, colour in (
            ("episode_length", "turns", GRAY),
            ("switches_per_episode", "switches", COLOURS[2]),
        ):
            values = [line[key] for line in lines]
            below.plot(iterations, values, ".-", color=colour, label=label)
            if lines:
                below.annotate(
                    f" {label} {values[-1]:.1f}", (iterations[-1], values[-1]), color=colour
                )
        below.set(xlabel="iteration", ylim=(0, None), title="Per episode")
        below.margins(x=0.09)
        _mark_warmup(above, settings.get("critic_warmup"), label=True)
        _mark_warmup(below, settings.get("critic_warmup"), label=False)
        about = [str(settings[name]) for name in ("method", "env") if name in settings]
        about = " in ".join(about) + f", seed {settings.get('seed', '?')}"
        figure.suptitle(_plain(about), x=0.02, ha="left", fontweight="bold")
        figure.savefig(out / "curve.png", dpi=120)
        pyplot.close(figure)


def _plot_evaluations(axes, evals):
    """Points with 95 % intervals and their numbers."""
    for n, result in enumerate(evals):
        low, high = rate_interval(result["success"], result["episodes"])
        rate = 100 * result["success"]
        about = f"{result['split']}: {result['episodes']} tasks, temperature"
        about = f"{about} {result['temperature']}, with 95 % interval"
        axes.errorbar(
            [result["iteration"]],
            [rate],
            fmt="o",
            color=COLOURS[1],
            yerr=[[max(0, rate - 100 * low)], [max(0, 100 * high - rate)]],
            capsize=3,
            label=None if n else _plain(about),
        )
        axes.annotate(
            f"{rate:.1f}",
            (result["iteration"], rate),
            xytext=(8, -13 if n else 7),
            textcoords="offset points",
            color=COLOURS[1],
            fontweight="bold",
        )


# ---- the run report ----------------------------------------------------------------------------


def plot_report(data, page):
    """One PNG per section of the report beside its page -> their paths.

    data: of `support.report.report_data`; page: the path of the HTML file.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return []
    paths = []
    with pyplot.rc_context(STYLE):
        for section in data["sections"]:
            charts = section["charts"]
            if not charts:
                continue
            columns = min(3, len(charts))
            rows = math.ceil(len(charts) / columns)
            size = (8, 4.5) if columns == 1 else (3.8 * columns, 2.9 * rows + 0.6)
            figure, grid = pyplot.subplots(
                rows, columns, figsize=size, layout="constrained", squeeze=False
            )
            for axes in grid.flat[len(charts) :]:
                axes.set_visible(False)
            for axes, chart in zip(grid.flat, charts, strict=False):
                _plot_chart(axes, chart, data)
            handles, labels = _legend(pyplot, data, section)
            figure.legend(handles, labels, loc="outside lower left", ncols=2)
            name = re.sub("[^a-z]+", "-", section["title"].lower()).strip("-")
            paths.append(page.with_name(f"{page.stem}-{name}.png"))
            figure.savefig(paths[-1], dpi=150)
            pyplot.close(figure)
    return paths


def _legend(pyplot, data, section):
    """What the curves, circles and shades are -> (handles, labels)."""
    many = ", mean and range" if len(data["groups"]) < len(data["runs"]) else ""
    handles = [
        pyplot.Line2D([], [], color=_colour(k), linestyle=_dash(k))
        for k in range(len(data["groups"]))
    ]
    labels = [
        f" {_plain(name)}{many if 'runs)' in name else ''}" for name in data["groups"]
    ]  # "_x" would be left out
    if any(any(chart["points"]) for chart in section["charts"]):
        handles.append(
            pyplot.Line2D([], [], color=GRAY, marker="o", markerfacecolor="white", linestyle="")
        )
        labels.append("evaluation with 95 % interval; lines: training episodes")
    if any(run["warmup"] for run in data["runs"]):
        handles.append(pyplot.Rectangle((0, 0), 1, 1, color=GRAY, alpha=0.13))
        labels.append("critic warm-up: the actor waits")
    return handles, labels


def _colour(group):
    return COLOURS[group % len(COLOURS)]


def _dash(group):
    return DASHES[group // len(COLOURS) % len(DASHES)]


def _plot_chart(axes, chart, data):
    """A curve per group: mean and range of its runs; evaluations with 95 % intervals."""
    scale = 100 if chart["unit"] == "%" else 1
    for group in range(len(data["groups"])):
        members = [n for n, run in enumerate(data["runs"]) if run["group"] == group]
        curve = group_curve([chart["lines"][n] for n in members])
        xs = [x for x, _ in curve]
        means = [scale * sum(values) / len(values) for _, values in curve]
        style = ".-" if len(xs) == 1 else _dash(group)
        axes.plot(xs, means, style, color=_colour(group))
        if len(members) > 1:
            lows = [scale * min(values) for _, values in curve]
            highs = [scale * max(values) for _, values in curve]
            axes.fill_between(xs, lows, highs, color=_colour(group), alpha=0.16, lw=0)
        for n in members:
            for x, rate, low, high in chart["points"][n]:
                axes.plot([x, x], [100 * low, 100 * high], color=_colour(group))
                axes.plot([x], [100 * rate], "o", color=_colour(group), markerfacecolor="white")
    low, high = axes.get_ylim()
    if chart["unit"] == "%":
        axes.set_ylim(0, 103)
    elif "V_" in chart["title"]:  # an explained variance can be far below 0
        axes.set_ylim(max(-1, min(0, low)), 1.03)
    else:
        axes.set_ylim(min(0, low), high)
    _mark_warmup(axes, max(run["warmup"] for run in data["runs"]), label=False)
    unit = " %" if chart["unit"] == "%" else ""
    axes.set(title=_plain(chart["title"]) + unit, xlabel="iteration")


def group_curve(lines):
    """[(iteration, [value of each run])] over the iterations that all runs of a group reached."""
    values = {}
    for line in lines:
        for x, y in line:
            if y is not None:
                values.setdefault(x, []).append(y)
    return [(x, ys) for x, ys in sorted(values.items()) if len(ys) == len(lines)]
