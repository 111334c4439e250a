"""Which training tasks an iteration plays: `--task_sampling uniform`, or `edge`.

edge draws tasks at the edge of competence. A task drawn uniformly is taken with the probability

    FLOOR + (1 - FLOOR) 4 p (1 - p)

where p is the share of past episodes that succeeded: of the task itself where it was played often
enough, else of its family (info["task_type"]). What was never played counts as p = 1/2. The floor
keeps what is mastered, or hopeless so far, from being forgotten.

Past episodes are read from the log, which every process has and every checkpoint holds. So a
resumed run draws as one that was not stopped, and all processes draw the same tasks.
"""

import random
from collections import defaultdict

import envs

FLOOR = 0.1
PAST = 5  # iterations that count
OFTEN = 4  # episodes of a task, from which on its own share counts


def draw(run, iteration, count):
    """`count` task indices, the same on every process."""
    config = run.config
    rng = random.Random(config.seed * 1_000_003 + iteration)
    size = envs.size(config.env, run.pool.split)
    if config.task_sampling == "uniform" or not run.lines:
        return [rng.randrange(size) for _ in range(count)]
    chances = Chances(run)
    drawn = []
    while len(drawn) < count:
        task = rng.randrange(size)
        if rng.random() < chances.of(task):
            drawn.append(task)
    return drawn


def record(config, episodes):
    """What `draw` needs of these episodes, for the log: nothing where it is uniform."""
    if config.task_sampling == "uniform":
        return {}
    return {"played": [[e.index, e.task_type, bool(e.success)] for e in episodes]}


class Chances:
    """How probably a task that was drawn is taken, by the run's last iterations."""

    def __init__(self, run):
        self.pool = run.pool
        self.families = run.families  # task -> family: it keeps what is found out here
        self.tasks = defaultdict(list)  # task -> successes
        self.kinds = defaultdict(list)  # family -> successes
        for line in run.lines:
            self.families.update({task: family for task, family, _ in line.get("played", ())})
        for line in run.lines[-PAST:]:
            for task, family, success in line.get("played", ()):
                self.tasks[task].append(success)
                self.kinds[family].append(success)

    def of(self, task):
        past = self.tasks.get(task, ())
        if len(past) < OFTEN:
            past = self.kinds.get(self.family(task), ())
        p = sum(past) / len(past) if past else 0.5
        return FLOOR + (1 - FLOOR) * 4 * p * (1 - p)

    def family(self, task):
        """A task of unknown family is begun once to see it."""
        if task not in self.families:
            _, info = self.pool.reset({-1: task})[-1]
            self.families[task] = info["task_type"]
        return self.families[task]
