"""Rollouts: many episodes at once with HF `generate`, and the batch that training makes of them.

`collect` loops over turns: prompt, generate, parse, step, until all tasks are played. `make_batch`
(support/batch.py) turns the episodes into ids, masks and padded [B, T] arrays.

Each slot holds one episode. When an episode ends, its slot takes the next task at once, so long
episodes do not hold back short ones. Every turn is its own sample: a prompt and a response.
P prompt tokens, L response tokens.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import hiper
from config import SUCCESS_REWARD
from hiper import Decision
from support.batch import Batch, make_batch  # noqa: F401, what training makes of the episodes
from support.generation import generate, tokenize_prompts, tokenize_texts
from support.tokens import response_text


@dataclass(frozen=True)
class Turn:
    prompt: list  # prompt ids, P of them
    response: list  # sampled ids, up to and with </action> or the end token
    decision: Decision
    is_segment_start: bool  # SWITCH was written, or turn 0
    prev_subgoal: str  # o_{t-1}, the subgoal that the agent carried into the turn
    subgoal: str  # o_t, the subgoal in force from here on
    observation: str  # what the agent saw before it answered
    reward: float  # scaled, penalties included
    progress: float = 0.0  # of the task, after the turn


@dataclass(frozen=True)
class Episode:
    index: int  # of the task, in its split
    task: str
    task_type: str
    turns: list  # of Turn
    success: bool
    task_score: float
    truncated: bool  # ended by the step limit, not by the task
    final_prompt: list  # prompt ids of the state after the last turn, for the bootstrap
    restarts: int  # how often it was begun anew because its environment process was lost


# ---- playing -----------------------------------------------------------------------------------


@dataclass
class AgentState:
    """One running episode: what the agent remembers between turns."""

    config: object  # Config, or what has its rollout settings
    index: int  # of the task
    observation: str
    info: dict
    place: int = 0  # among the tasks of `collect`
    restarts: int = 0
    subgoal: str = ""
    past: deque = field(default_factory=deque)  # (observation, action) pairs
    turns: list = field(default_factory=list)
    progress: float = 0.0
    ended: bool = False
    truncated: bool = False

    def prompt(self, history=True):
        """The text of the next turn's prompt."""
        config, info = self.config, self.info
        past = self.past if history else ()
        admissible = () if config.short_prompt else info["admissible"]
        if config.prompt == "flat":
            return hiper.flat_prompt(
                info["task"], self.observation, past, admissible, config.short_prompt
            )
        return hiper.plan_execute_prompt(
            info["task"], self.observation, self.subgoal, past, admissible, config.short_prompt
        )

    def shorter_prompt(self):
        """The same without history, for a prompt that is too long; "" where there is none."""
        return self.prompt(history=False) if self.past else ""

    def forced_prefix(self):
        """What is written for the agent where segments are imposed; else nothing."""
        segments = self.config.segments
        if segments == "learned":
            return ""
        if segments == "single":
            opens = not self.turns
        elif segments == "every-turn":
            opens = True
        else:
            opens = len(self.turns) % int(segments.removeprefix("fixed:")) == 0
        return "<switch>SWITCH</switch>" if opens else hiper.format_plan(self.subgoal, False)

    def record_turn(self, prompt_ids, response_ids, decision, outcome):
        """Take in what was decided and what came of it."""
        observation, reward, terminated, truncated, info = outcome
        prev_subgoal = self.subgoal
        is_segment_start = decision.switch or not self.turns
        if is_segment_start and decision.subgoal:
            self.subgoal = decision.subgoal  # on KEEP the carried one stays
        self.turns.append(
            Turn(
                prompt=prompt_ids,
                response=response_ids,
                decision=decision,
                is_segment_start=is_segment_start,
                prev_subgoal=prev_subgoal,
                subgoal=self.subgoal,
                observation=self.observation,
                reward=self._shaped_reward(reward, decision, is_segment_start, info),
                progress=info.get("progress", 0.0),
            )
        )
        self.past.append((self.observation, decision.action))
        while len(self.past) > self.config.history:
            self.past.popleft()
        self.observation = observation
        self.info = info
        self.ended = terminated or truncated
        self.truncated = truncated and not terminated

    def _shaped_reward(self, reward, decision, is_segment_start, info):
        """The world's reward, scaled, minus the penalties."""
        config = self.config
        if config.checklist:  # each subtask pays once
            gain = max(0.0, info["progress"] - self.progress)
            self.progress += gain
            reward = (1 - config.checklist) * reward + config.checklist * gain
        shaped = SUCCESS_REWARD * reward
        if not decision.valid:
            shaped -= config.invalid_penalty
        elif self._is_keep(decision, is_segment_start):
            shaped -= config.keep_penalties.get("turn", 0.0)
            if decision.drifts(self.subgoal):
                shaped -= config.keep_penalties.get("drift", 0.0)
        return shaped

    def _is_keep(self, decision, is_segment_start):
        return decision.valid and not is_segment_start and self.config.prompt != "flat"

    def to_episode(self, final_prompt):
        ratio = self.config.keep_penalties.get("ratio", 0.0)
        share = ratio / len(self.turns)  # of each KEEP turn
        for n, turn in enumerate(self.turns):
            if self._is_keep(turn.decision, turn.is_segment_start):
                self.turns[n] = replace(turn, reward=turn.reward - share)
        return Episode(
            index=self.index,
            task=self.info["task"],
            task_type=self.info["task_type"],
            turns=self.turns,
            success=bool(self.info["won"]),
            task_score=float(self.info["score"]),
            truncated=self.truncated,
            final_prompt=final_prompt,
            restarts=self.restarts,
        )


def build_prompts(states, tokenizer):
    """AgentStates -> prompt ids. A prompt that is too long is written without its history."""
    if not states:
        return []
    texts = [state.prompt() for state in states]
    shorter = [state.shorter_prompt() for state in states]
    return tokenize_prompts(tokenizer, texts, states[0].config.max_prompt_tokens, shorter)


def collect(
    actor,
    tokenizer,
    pool,
    tasks,
    config,
    *,
    temperature=1.0,
    progress=None,
    planner=None,
    executor=None,
):
    """Play the tasks (indices of the pool's split) -> Episodes in the order of `tasks`.

    progress: called with each Episode as it ends. planner({slot: AgentState}, prompts) -> the
    text that each response begins with; executor({slot: AgentState}, prompts, decisions) -> the
    actions: who plays these parts in the agent's place (benchmarks/swap.py).
    An episode whose environment process was lost is begun anew.
    """
    parse = hiper.parse_flat if config.prompt == "flat" else hiper.parse
    queue = deque((place, index, 0) for place, index in enumerate(tasks))
    agents = {}  # slot -> AgentState
    episodes = {}  # place -> Episode
    while queue or agents:
        fill_slots(agents, queue, pool, config)
        prompts = build_prompts(list(agents.values()), tokenizer)
        if planner:
            prefixes = planner(agents, prompts)
        else:
            prefixes = [state.forced_prefix() for state in agents.values()]
        responses = respond(actor, tokenizer, prompts, prefixes, temperature, config)
        decisions = [parse(response_text(response, tokenizer)) for response in responses]
        if executor:
            actions = executor(agents, prompts, decisions)
            replaced = zip(decisions, actions, strict=True)
            decisions = [decision._replace(action=action) for decision, action in replaced]
        actions = [decision.action for decision in decisions]
        outcomes = pool.step(dict(zip(agents, actions, strict=True)))
        for n, (slot, state) in enumerate(list(agents.items())):
            if outcomes[slot] is None:  # lost with its process
                queue.appendleft((state.place, state.index, state.restarts + 1))
                del agents[slot]
            else:
                state.record_turn(prompts[n], responses[n], decisions[n], outcomes[slot])
        ended = [slot for slot, state in agents.items() if state.ended]
        finished = [agents.pop(slot) for slot in ended]
        for state, prompt in zip(finished, build_prompts(finished, tokenizer), strict=True):
            episodes[state.place] = state.to_episode(prompt)
            if progress:
                progress(episodes[state.place])
    return [episodes[place] for place in sorted(episodes)]


def fill_slots(agents, queue, pool, config):
    """Put the next tasks of the queue into the free slots, in place."""
    free = [slot for slot in range(config.num_envs) if slot not in agents]
    fresh = {slot: queue.popleft() for slot in free[: len(queue)]}
    resets = pool.reset({slot: index for slot, (_, index, _) in fresh.items()})
    for slot, (place, index, restarts) in fresh.items():
        observation, info = resets[slot]
        agents[slot] = AgentState(config, index, observation, info, place, restarts)


def respond(actor, tokenizer, prompts, prefixes, temperature, config):
    """One response per prompt, each beginning with its prefix (often empty) -> id lists."""
    begun = tokenize_texts(tokenizer, prefixes)
    responses = generate(
        actor,
        tokenizer,
        [prompt + prefix for prompt, prefix in zip(prompts, begun, strict=True)],
        temperature=temperature,
        max_new_tokens=config.max_new_tokens,
    )
    return [prefix + response for prefix, response in zip(begun, responses, strict=True)]
