"""What is reported of episodes and runs: summaries, intervals, tables, one episode in full, and
warnings of a collapse. No torch. docs/metrics.md explains each number."""

import json
import math
import time
from contextlib import contextmanager

PAPER = {  # -> (split, success %, Qwen2.5-1.5B / 7B)
    "alfworld": (
        "valid_seen, 128 games drawn with repeats",
        "PPO 68.2 / 82.8, GRPO 71.1 / 85.4, GiGPO 86.7 / 90.8, HiPER 95.3 / 97.4",
    ),
    "webshop": (
        "test, whose goals its training met",
        "PPO 51.5 / 68.7, GRPO 56.8 / 66.1, GiGPO 67.4 / 75.2, HiPER 71.4 / 83.3",
    ),
}


def wilson_interval(successes, n, z=1.96):
    """The 95 % interval of a success rate (Wilson's, valid near 0 and 1) -> (low, high)."""
    rate = successes / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = (centre - half) / (1 + z * z / n)
    high = (centre + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def rate_interval(rate, n):
    """`wilson_interval` of a success rate over n episodes."""
    return wilson_interval(round(rate * n), n)


def summarize(episodes):
    """A list of Episode as plain numbers; rates from 0 to 1."""
    turns = [turn for episode in episodes for turn in episode.turns]
    by_type = {}
    for episode in episodes:
        by_type.setdefault(episode.task_type, []).append(episode.success)
    by_type = dict(sorted(by_type.items()))
    segments = sum(turn.is_segment_start for turn in turns)
    chosen = segments - len(episodes)  # the forced switch of turn 0 is not chosen
    choices = len(turns) - len(episodes)
    return {
        "episodes": len(episodes),
        "success": mean(episode.success for episode in episodes),
        "score": mean(episode.task_score for episode in episodes),
        "success_by_type": {kind: mean(results) for kind, results in by_type.items()},
        "episodes_by_type": {kind: len(results) for kind, results in by_type.items()},
        "episode_length": len(turns) / len(episodes),
        "switches_per_episode": chosen / len(episodes),
        "segment_length": len(turns) / segments,
        "switch_rate": chosen / max(1, choices),
        "valid_format_rate": mean(turn.decision.valid for turn in turns),
        "truncation_rate": mean(episode.truncated for episode in episodes),
        "restarts": sum(episode.restarts for episode in episodes),
    }


@contextmanager
def timed(name, seconds):
    """Writes the block's duration into seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def format_table(result):
    """A summary as lines of text: success per task type, with intervals."""
    rows = [
        (kind, result["success_by_type"][kind], count)
        for kind, count in result["episodes_by_type"].items()
    ]
    rows.append(("all", result["success"], result["episodes"]))
    lines = []
    for kind, rate, count in rows:
        low, high = rate_interval(rate, count)
        interval = f"[{100 * low:5.1f}, {100 * high:5.1f}]"
        lines.append(
            f"  {printable(kind):34s} {100 * rate:5.1f} %   {interval}   {count:4d} episodes"
        )
    return "\n".join(lines)


def show_evaluation(result, protocol, env):
    """Print how an evaluation was made, and its table."""
    print("protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()))
    print(format_table(result))
    if result["score"] != result["success"]:
        print(f"  task score (mean score x 100): {100 * result['score']:.1f}")
    if env in PAPER:
        split, rows = PAPER[env]
        print(f"  the paper's success % ({split}), Qwen2.5-1.5B / 7B: {rows}")


def write_evaluation(path, result, protocol):
    """The same as JSON, with Wilson's interval of the success."""
    interval = rate_interval(result["success"], result["episodes"])
    text = json.dumps({"protocol": protocol, **result, "interval": interval}, indent=1)
    path.write_text(text + "\n")


def format_iteration(metrics):
    """What one wants to see of an iteration, in one line."""
    return (
        f"success {metrics['success']:.0%}, {metrics['switches_per_episode']:.1f} switches per "
        f"episode, {metrics['turns_per_second']:.0f} turns/s"
    )


def format_episode(episode, advantages):
    """One episode in full with its segments and advantages (name -> [T]).

    A collapse is often visible here before it is in a mean.
    """
    result = "success" if episode.success else "failure"
    lines = [f"task {episode.index} ({episode.task_type}): {episode.task} -> {result}"]
    for t, turn in enumerate(episode.turns):
        shown = {name: f"{name} {values[t]:+.2f}" for name, values in advantages.items()}
        planned = shown.pop("A_subgoal", "")
        if t == 0:
            shown.pop("A_switch", None)  # nothing is decided there
        if turn.is_segment_start and (planned or turn.subgoal):
            lines.append(f"  -- {turn.subgoal or '(no subgoal)'}   {planned}".rstrip())
        error = f"   ! {turn.decision.error}" if turn.decision.error else ""
        lines.append(f"     {turn.observation}")
        said = f"     > {turn.decision.action}   {'  '.join(shown.values())}{error}"
        lines.append(said.rstrip())
    return printable("\n".join(lines))


def printable(text):
    """The text with escapes for what a terminal would obey: control and direction characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c).strip("'") for c in text)


# ---- warnings ----------------------------------------------------------------------------------

WINDOW = 4  # iterations whose mean is judged
WATCHED = ("success", "switch_rate", "valid_format_rate")
ALARMS = {  # what the agent does, a heading of docs/faq.md -> the likely cause, what to try
    "hardly ever switches": "so one subgoal serves a whole episode; try --switch_advantage "
    "closed_form, or --keep_penalties '{\"turn\": 0.3}'",
    "switches at almost every turn": "so segments are single turns; see the explained_variance "
    "of the high head, try a smaller --lr",
    "writes malformed responses": "more than one in five; raise --invalid_penalty or "
    "--untrained_kl_coef",
    "has lost 20 points of success": "since its best, so the policy moved too far; try a smaller "
    "--lr or a larger --kl_coef",
}


def collapse_warning(lines, hierarchical):
    """A sentence where the last of `lines` (metrics, oldest first) begins a collapse, else None.

    hierarchical: whether the agent itself decides where its segments end.
    """
    before = _problems(lines[:-1], hierarchical)
    new = [
        f"{name}, {ALARMS[name]} (docs/faq.md#{name.replace(' ', '-')})"
        for name in _problems(lines, hierarchical)
        if name not in before
    ]
    if not new:
        return None
    return f"iteration {lines[-1]['iteration']}: the agent {'; and '.join(new)}"


def _problems(lines, hierarchical):
    """What is wrong at the end of `lines` -> list of names in ALARMS."""
    if len(lines) < WINDOW:
        return []
    recent = {key: mean(line[key] for line in lines[-WINDOW:]) for key in WATCHED}
    best = max(
        mean(line["success"] for line in lines[end - WINDOW : end])
        for end in range(WINDOW, len(lines) + 1)
    )
    is_so = (
        hierarchical and recent["switch_rate"] < 0.02,
        hierarchical and recent["switch_rate"] > 0.95,
        recent["valid_format_rate"] < 0.8,
        recent["success"] < best - 0.2,
    )
    return [name for name, holds in zip(ALARMS, is_so, strict=True) if holds]
