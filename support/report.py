"""The run report: the curves of one or several runs on one page.

`python eval.py --report OUT [OUT ...]` writes it from the runs' logs; report.html shows it. Runs
that differ in nothing but their seed are one group: its mean and its range are drawn.
"""

import json

from config import Config, ConfigError
from support.metrics import rate_interval
from support.pages import write_page
from support.plots import plot_report

SAME = {"seed", "out"}  # settings in which the runs of a group may differ
CURVES = [  # section, [(title, path in a line of metrics.jsonl, unit)]
    ("Success", [("Success", ("success",), "%")]),
    (
        "Plan",
        [
            ("Switches per episode", ("switches_per_episode",), ""),
            ("Turns per segment", ("segment_length",), ""),
            ("Turns per episode", ("episode_length",), ""),
        ],
    ),
    (
        "Critic: explained variance",
        [
            ("V_high", ("explained_variance", "high"), ""),
            ("V_low", ("explained_variance", "low"), ""),
            ("V_switch", ("explained_variance", "switch"), ""),
        ],
    ),
    (
        "Policy",
        [
            ("KL to the start model", ("kl_to_reference",), ""),
            ("Entropy, nats", ("entropy",), ""),
            ("Valid format", ("valid_format_rate",), "%"),
        ],
    ),
    (
        "Time",
        [
            ("Rollout, seconds", ("seconds", "rollout"), ""),
            ("Scoring, seconds", ("seconds", "score"), ""),
            ("Update, seconds", ("seconds", "update"), ""),
        ],
    ),
]


def write_report(folders, path=None):
    """Write the report of these runs, its charts also as PNGs beside it, and say where -> its path.

    path: None for report.html in the first folder.

    ConfigError for a folder without a log.
    """
    runs = [read_run(folder) for folder in folders]
    path = path or folders[0] / "report.html"
    data = report_data(runs)
    write_page(path, "report.html", data)
    pictures = plot_report(data, path)
    what = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(f"report of {what} in {path}" + "".join(f"\n  {picture}" for picture in pictures))
    return path


def read_run(folder):
    """-> {"name", "config", "lines": of metrics.jsonl, "evals": of evals.jsonl}."""
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = _read_lines(folder / "metrics.jsonl")
        evals = _read_lines(folder / "evals.jsonl")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds no log of a training run (config.json, metrics.jsonl, evals.jsonl): "
            f"{error}"
        ) from None
    return {"name": str(folder), "config": config, "lines": lines, "evals": evals}


def _read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_data(runs):
    """What report.html shows, as plain Python."""
    differ = differing_settings(runs)
    settings = [
        {name: values[n] for name, values in differ.items() if name not in SAME}
        for n in range(len(runs))
    ]
    groups = _distinct(settings)
    group_of = [groups.index(own) for own in settings]
    kinds = {kind for run in runs for line in run["lines"] for kind in line["success_by_type"]}
    families = [(kind, ("success_by_type", kind), "%") for kind in sorted(kinds)]
    sections = [CURVES[0], ("Success per task family", families), *CURVES[1:]]
    return {
        "title": "Run report",
        "runs": [_summary(run, group) for run, group in zip(runs, group_of, strict=True)],
        "groups": [_group_name(own, k, group_of, runs) for k, own in enumerate(groups)],
        "differ": [[name, values] for name, values in differ.items()],
        "sections": [
            {"title": title, "charts": [_chart(runs, *curve) for curve in curves]}
            for title, curves in sections
        ],
    }


def differing_settings(runs):
    """{setting: its value in each run}, for those that are not the same in all runs.

    A setting that a later version added had its default.
    """
    names = sorted({name for run in runs for name in run["config"]} - {"out", "versions", "counts"})
    values = {name: [run["config"].get(name, _default(name)) for run in runs] for name in names}
    return {name: column for name, column in values.items() if len(_distinct(column)) > 1}


def _default(name):
    return getattr(Config(), name, None)


def _distinct(values):
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _group_name(settings, k, group_of, runs):
    """What tells a group from the others, and how many runs it holds."""
    members = [run["name"] for run, group in zip(runs, group_of, strict=True) if group == k]
    name = ", ".join(
        f"{name} {'(empty)' if value == '' else value}" for name, value in settings.items()
    )
    if len(members) == 1:
        return f"{members[0]} ({name})" if name else members[0]
    return f"{name or 'all runs'} ({len(members)} runs)"


def _summary(run, group):
    """A row of the table of runs."""
    lines = run["lines"]
    seconds = sum(sum(line["seconds"].values()) for line in lines)
    return {
        "name": run["name"],
        "group": group,
        "seed": run["config"].get("seed"),
        "method": run["config"].get("method"),
        "iterations": len(lines),
        "warmup": run["config"].get("critic_warmup", 0),
        "minutes": seconds / 60,
        "evals": [_evaluation(result) for result in run["evals"]],
    }


def _evaluation(result):
    low, high = rate_interval(result["success"], result["episodes"])
    about = f"{result['split']}, {result['episodes']} tasks, temperature {result['temperature']}"
    point = {"iteration": result["iteration"], "success": result["success"], "about": about}
    return {**point, "low": low, "high": high}


def _chart(runs, title, path, unit):
    """One curve per run, and the evaluations' points where they measure the same."""
    return {
        "title": title,
        "unit": unit,
        "lines": [[[line["iteration"], _at(line, path)] for line in run["lines"]] for run in runs],
        "points": [_points(run["evals"], path) for run in runs],
    }


def _points(evals, path):
    """[iteration, rate, and the 95 % interval] of each evaluation; only of success."""
    points = []
    for result in evals:
        count = result["episodes"]
        if path[0] == "success_by_type":
            count = result["episodes_by_type"].get(path[1])
        rate = _at(result, path) if path[0].startswith("success") else None
        if rate is not None and count:
            points.append([result["iteration"], rate, *rate_interval(rate, count)])
    return points


def _at(line, path):
    """A number of a log line, None where it is missing."""
    for name in path:
        line = line.get(name) if isinstance(line, dict) else None
    return line
