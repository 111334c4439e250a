"""What is said of episodes and runs: summaries, tables, the learning curve, one episode in full, and the alarm. No torch."""

import math


def wilson(wins, n, z=1.96):
    """The 95 % interval of a success rate, Wilson's: honest near 0 and 1. -> (low, high)"""
    p, centre = wins / n, wins / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def summary(episodes):
    """What a list of Episode says, as plain numbers; rates from 0 to 1."""
    turns = [turn for e in episodes for turn in e.turns]
    by_type = {}
    for e in episodes:
        by_type.setdefault(e.task_type, []).append(e.won)
    segments = sum(turn.opened for turn in turns)
    return {
        "episodes": len(episodes),
        "success": sum(e.won for e in episodes) / len(episodes),
        "score": sum(e.score for e in episodes) / len(episodes),
        "success_by_type": {kind: sum(won) / len(won) for kind, won in sorted(by_type.items())},
        "episodes_by_type": {kind: len(won) for kind, won in sorted(by_type.items())},
        "turns": len(turns) / len(episodes),
        "switches": (segments - len(episodes))
        / len(episodes),  # per episode, the forced one at turn 0 not counted
        "segment_length": len(turns) / segments,
        "switch_rate": (segments - len(episodes)) / max(1, len(turns) - len(episodes)),
        "valid_format": sum(turn.decision.valid for turn in turns) / len(turns),
        "truncated": sum(e.truncated for e in episodes) / len(episodes),
        "lost": sum(e.lost for e in episodes),
    }  # begun anew after their process had died


def table(result):
    """A summary as lines of text."""
    rows = [
        (kind, result["success_by_type"][kind], n) for kind, n in result["episodes_by_type"].items()
    ]
    lines = []
    for kind, rate, n in rows + [("all", result["success"], result["episodes"])]:
        low, high = wilson(round(rate * n), n)
        lines.append(
            f"  {kind:34s} {100 * rate:5.1f} %   [{100 * low:5.1f}, {100 * high:5.1f}]   {n:4d} episodes"
        )
    return "\n".join(lines)


def tell(episode, shown):
    """One episode in full text with its segments and advantages (name -> [T]): collapse shows here first."""
    lines = [
        f"task {episode.index} ({episode.task_type}): {episode.task} -> {'won' if episode.won else 'lost'}"
    ]
    for t, turn in enumerate(episode.turns):
        says = {name: f"{name} {adv[t]:+.2f}" for name, adv in shown.items()}
        planned = says.pop("A_subgoal", "")
        if turn.opened and planned:
            lines.append(f"  -- {turn.subgoal or '(no subgoal)'}   {planned}")
        error = f"   ! {turn.decision.error}" if turn.decision.error else ""
        lines.append(f"     {turn.observation}")
        lines.append(f"     > {turn.decision.action}   {'  '.join(says.values())}{error}")
    return "\n".join(lines)


def alarm(lines, hierarchical):
    """A sentence when the last of `lines` (metrics, oldest first) is the first of a collapse, with its likely cause; else None.

    hierarchical: whether the agent decides about its segments itself. Means are over four iterations.
    """

    def ills(end):  # what is wrong at iteration `end` - 1
        mean = lambda key, stop=end: sum(line[key] for line in lines[stop - 4 : stop]) / 4
        if end < 4:
            return {}
        best = max(mean("success", stop) for stop in range(4, end + 1))
        return {
            "hardly ever switches: one subgoal serves all, and the planner no longer plans; try --switch_advantage gain, or "
            "--keep_penalty": hierarchical and mean("switch_rate") < 0.02,
            "switches at almost every turn: segments are single turns, and the boundary bootstrap is all there is; see the high head's "
            "explained_variance, try a smaller --lr": hierarchical and mean("switch_rate") > 0.95,
            "writes ever more unreadable answers: raise --invalid_penalty or --kl_rest": mean(
                "valid_format"
            )
            < 0.8,
            "has lost 20 points of success since its best: the policy moved too far; try a smaller --lr or a larger --kl": mean(
                "success"
            )
            < best - 0.2,
        }

    before = ills(len(lines) - 1)
    new = [text for text, ill in ills(len(lines)).items() if ill and not before.get(text)]
    return f"iteration {lines[-1]['iteration']}: the agent " + "; and ".join(new) if new else None


def picture(out, log):
    """The learning curve: success on the training tasks as they come, and on the evaluation split before and after."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = log["lines"]
    x = [line["iteration"] for line in lines]
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1), layout="constrained"
    )
    above.plot(
        x,
        [100 * line["success"] for line in lines],
        ".-",
        color="tab:blue",
        label="train, as played (temperature of training)",
    )
    evals = log["evals"]
    if evals:
        above.errorbar(
            [e["iteration"] for e in evals],
            [100 * e["success"] for e in evals],
            fmt="o",
            color="tab:red",
            yerr=[
                196 * math.sqrt(e["success"] * (1 - e["success"]) / e["episodes"]) for e in evals
            ],
            capsize=3,
            label=f"{evals[0]['split']}, {evals[0]['episodes']} tasks, temperature {evals[0]['temperature']}",
        )
    above.set(ylim=(0, 100), ylabel="success %")
    above.legend(loc="lower right", frameon=False)
    below.plot(
        x,
        [line["switches"] for line in lines],
        ".-",
        color="tab:green",
        label="switches per episode",
    )
    below.plot(
        x, [line["turns"] for line in lines], ".-", color="tab:gray", label="turns per episode"
    )
    below.set(xlabel="iteration", ylim=(0, None))
    below.legend(frameon=False)
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)
