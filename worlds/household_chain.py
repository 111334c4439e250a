"""The household with a longer horizon: `chain` tasks in one episode, `routine` steps between two.

    python train.py --env_options '{"chain": 4}'          four tasks, one reward at the end
    python train.py --env_options '{"routine": 1}'        every second step is no decision

Chain. The tasks are in different rooms. Each is given when the one before is done, and only the
last success is rewarded. The first task of episode `index` is task `index` of the split; the others
are of the same split. The observation names the current task.

Routine. After each accepted action come `routine` steps in which the only admissible action is
`wait`. The share of steps that are decisions is 1 / (1 + routine).

The step limit is `chain` * (1 + `routine`) times that of one task, for all tasks together. Each
such share of it is a day. The page gives the day and, in six words as ever, the time of day.

With one task and no routine `household.make` gives the plain game, which knows nothing of this.
"""

from worlds.household import SIZES, TIMES_OF_DAY, Household

STRIDE = 101  # from one task of a chain to the next; no multiple of a family's 6
NO_LIMIT = 10**9  # of a room's own steps: the chain counts them


class Chain(Household):
    """One episode. The same (split, index) is always the same rooms and tasks.

    A step goes as in one room (`Household.step`); what it changes and shows is this class's own.
    """

    def __init__(self, split, index, max_steps, chain, routine):
        for name, value, least in (("chain", chain, 1), ("routine", routine, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"household's {name} must be a whole number from {least}")
        indices = [(index + STRIDE * n) % SIZES[split] for n in range(chain)]
        self.rooms = [Household(split, i, NO_LIMIT) for i in indices]
        self.routine = routine
        self.day = max_steps * (1 + routine)
        self.max_steps = self.day * chain
        self.task = f"do {chain} tasks" if chain > 1 else self.rooms[0].task
        self.task_type = f"chain_of_{chain}" if chain > 1 else self.rooms[0].task_type
        self.done = True  # until the first reset

    def reset(self, seed=None):
        """Start the episode again -> (observation, info). `seed` is ignored: nothing is random."""
        self.steps = 0
        self.solved = 0  # tasks that are done
        self.wait = 0  # routine steps until the next decision
        self.won = False
        self.done = False
        self.page, self.room_info = self.rooms[0].reset()
        return self._page(), self._info()

    def admissible(self):
        """All commands accepted now."""
        return ["wait"] if self.wait else self._room().admissible()

    def expert(self, subgoal):
        """The room's expert, see `Household.expert`. It keeps its subgoal while it waits."""
        if self.done:
            return None
        switch, wanted, action = self._room().expert(subgoal)
        if self.wait and subgoal:
            return False, subgoal, "wait"
        return switch, wanted, "wait" if self.wait else action

    def _room(self):
        return self.rooms[min(self.solved, len(self.rooms) - 1)]

    def _apply(self, action):
        if self.wait:
            self.wait -= 1
            return
        self.page, _, solved, _, self.room_info = self._room().step(action)
        self.solved += solved
        if self._solved():
            return
        if solved:
            self.page, self.room_info = self._room().reset()
        self.wait = self.routine

    def _solved(self):
        return self.solved == len(self.rooms)

    def _page(self):
        """The room's page under the time of the episode, with what one room does not have."""
        days, step = divmod(min(self.steps, self.max_steps - 1), self.day)
        time = TIMES_OF_DAY[step * len(TIMES_OF_DAY) // self.day]
        task = ""
        if len(self.rooms) > 1:
            task = f"Task {min(self.solved + 1, len(self.rooms))}: {self._room().task}. "
            time += f" day {days + 1}"
        wait = f" wait {self.wait}" if self.wait else ""
        rest = self.page.split(". ", 1)[1]  # without the room's own time
        return f"{task}{time}{wait}. {rest}"

    def _info(self):
        progress = self.room_info["progress"]
        if not self.won:
            progress = (self.solved + progress) / len(self.rooms)
        return {
            "task": self.task,
            "task_type": self.task_type,
            "admissible": self.admissible(),
            "won": self.won,
            "score": float(self.won),
            "subgoals": self.room_info["subgoals"],
            "progress": progress,
        }
