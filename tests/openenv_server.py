"""An OpenEnv server for tests on 127.0.0.1: `python openenv_server.py PORT SESSIONS`."""

import os
import random
import sys
import time

from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Say(Action):
    message: str = ""


class Page(Observation):
    text: str = ""
    task: str = ""
    valid_actions: list[str] = []
    truncated: bool = False


class Count(Environment):
    """Reach a number with up and down. `sleep` never answers, `crash` ends the server."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.at = self.steps = self.goal = 0

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.at = self.steps = 0
        self.goal = random.Random(seed).randint(2, 5)
        return self.page()

    def step(self, action: Say, timeout_s=None, **kwargs):
        if action.message == "sleep":
            time.sleep(20)
        if action.message == "crash":
            os._exit(1)
        self.steps += 1
        self.at += {"up": 1, "down": -1}.get(action.message, 0)
        return self.page()

    def page(self):
        won = self.at == self.goal
        return Page(
            text=f"at {self.at}",
            task=f"reach {self.goal}",
            valid_actions=["up", "down"],
            done=won or self.steps >= 9,
            truncated=not won and self.steps >= 9,
            reward=float(won),
        )

    @property
    def state(self):
        return State(step_count=self.steps)


if __name__ == "__main__":
    import uvicorn

    app = create_fastapi_app(Count, Say, Page, max_concurrent_envs=int(sys.argv[2]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
