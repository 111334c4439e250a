"""rollout.py: episodes that a script speaks, so every reward, segment and prompt is known."""

import dataclasses
import re
import sys
import types

import pytest
import torch

import envs
import hiper
import rollout
from conftest import tiny_config
from hiper import format_plan, format_response, plan_execute_prompt
from rollout import AgentState, build_prompts, collect, respond
from sample_texts import encode
from support import env_workers
from support.generation import tokenize_prompts
from support.tokens import response_text

PLAIN = tiny_config(history=0, short_prompt=True, invalid_penalty=0.1)


# ---- a world that a script plays: what the agent will answer is written down per task and turn --


class ScriptedEnv:
    """Task `index` ends after len(script) turns.

    Action "win" wins, "lose" ends without a win, else the last turn truncates.
    """

    def __init__(self, index, script):
        self.index = index
        self.length = len(script)

    def reset(self, seed=None):
        self.turn = 0
        self.won = False
        self.done = False
        return self.page(), self.info()

    def step(self, action):
        assert not self.done, "a finished episode is still in play"
        self.turn += 1
        self.won = action == "win"
        over = self.won or action == "lose"
        truncated = not over and self.turn == self.length
        self.done = over or truncated
        return self.page(), float(self.won), over, truncated, self.info()

    def close(self):
        pass

    def page(self):
        return f"page {self.index}.{self.turn}"

    def info(self):
        return {
            "task": f"task {self.index}",
            "task_type": f"type {self.index % 2}",
            "admissible": ["x", "win"],
            "won": self.won,
            "score": float(self.won) / 2,
        }


SCRIPTS = [
    [format_response(True, "a", "x")] * n + [format_response(False, "a", end)]
    for n, end in ((2, "win"), (0, "win"), (5, "x"), (1, "lose"), (3, "win"))
]


def scripted_world(scripts):
    """A module like those of worlds/."""
    world = types.ModuleType("scripted")
    world.SPLITS = ("train",)

    def size(split):
        return len(scripts)

    def make(split, index):
        return ScriptedEnv(index, scripts[index])

    world.size = size
    world.make = make
    return world


@pytest.fixture
def play(monkeypatch, tiny_tokenizer):
    """play(tasks, scripts, num_envs=...) -> episodes.

    play.batches lists what was in each batch that generated, as (task, turn) pairs.
    """

    def generate(actor, tokenizer, prompts, **_):
        pages = [re.findall(r"page (\d+)\.(\d+)", tokenizer.decode(p))[-1] for p in prompts]
        play.batches.append([tuple(map(int, page)) for page in pages])
        return [encode(tokenizer, play.scripts[i][t]) for i, t in play.batches[-1]]

    def play(tasks, scripts=SCRIPTS, *, world="scripted", workers=0, **changes):
        play.scripts = scripts
        play.batches = []
        monkeypatch.setitem(sys.modules, "scripted", scripted_world(scripts))
        config = dataclasses.replace(PLAIN, **{"num_envs": 2, **changes})
        with envs.EnvPool(world, workers=workers) as pool:
            return collect(None, tiny_tokenizer, pool, tasks, config, progress=play.finished.append)

    monkeypatch.setattr(rollout, "generate", generate)
    play.finished = []
    return play


# ---- collect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 50])
def test_every_task_once_in_order_and_no_slot_idle(play, num_envs):
    tasks = [2, 0, 1, 1, 4, 3, 0, 2, 1]
    lengths = [len(script) for script in SCRIPTS]
    episodes = play(tasks, num_envs=num_envs)
    assert [e.index for e in episodes] == tasks
    assert [len(e.turns) for e in episodes] == [lengths[i] for i in tasks]
    assert sorted(map(id, play.finished)) == sorted(map(id, episodes))
    queue = list(tasks)
    live = []  # the oracle: [task, turns left] of each episode in play
    sizes = []
    order = []
    while queue or live:
        while queue and len(live) < num_envs:
            task = queue.pop(0)
            live.append([task, lengths[task]])
        sizes.append(len(live))
        live = [[i, left - 1] for i, left in live]
        order += [i for i, left in live if not left]
        live = [pair for pair in live if pair[1]]
    assert list(map(len, play.batches)) == sizes
    assert sorted(e.index for e in play.finished) == sorted(order)
    turns = [page for batch in play.batches for page in batch]
    # no turn doubled, none left out
    assert sorted(turns) == sorted((i, t) for i in tasks for t in range(lengths[i]))


def test_no_tasks_no_episodes(play):
    assert play([]) == []
    assert play.batches == []


def test_turns_hold_what_was_seen_said_and_done(play, tiny_tokenizer):
    script = [
        format_response(True, "a", "x"),
        format_response(False, "a", "y"),
        format_response(True, "b", "win"),
    ]
    [episode] = play([0], [script])
    assert episode.task == "task 0"
    assert episode.task_type == "type 0"
    assert episode.success is True
    assert episode.task_score == 0.5
    for t, (turn, carried) in enumerate(zip(episode.turns, ("", "a", "a"), strict=True)):
        assert turn.observation == f"page 0.{t}"
        want = plan_execute_prompt("task 0", f"page 0.{t}", carried, short=True)
        assert tiny_tokenizer.decode(turn.prompt) == want
        assert tiny_tokenizer.decode(turn.response) == script[t]
        assert turn.decision == hiper.parse(script[t])


def test_success_pays_on_the_winning_turn_and_a_bad_format_costs(play):
    # the action of this one is readable all the same
    broken_win = "<switch>maybe</switch><subgoal>a</subgoal><action>win</action>"
    episodes = play(
        [0, 1, 2],
        [
            [format_response(True, "a", "x"), "nonsense", format_response(False, "a", "win")],
            ["", broken_win],
            [format_response(True, "a", "x"), format_response(False, "a", "lose")],
        ],
    )
    assert [[turn.reward for turn in e.turns] for e in episodes] == [
        [0, -0.1, 10],
        [-0.1, 9.9],
        [0, 0],
    ]
    [episode] = play([0], [["", format_response(True, "a", "win")]], invalid_penalty=0.5)
    assert [turn.reward for turn in episode.turns] == [-0.5, 10.0]


def test_segments_and_the_subgoal_in_force(play, tiny_tokenizer):
    script = [
        format_response(False, "a", "x"),  # KEEP at turn 0 opens all the same
        format_response(False, "another", "x"),  # KEEP keeps, whatever the block says
        format_response(True, "b", "x"),
        "<switch>SWITCH</switch><action>x</action>",  # nothing readable: opens, the old one stays
        "junk",
        format_response(True, "b", "win"),  # SWITCH to the same subgoal opens
    ]
    [episode] = play([0], [script])
    opens = [turn.is_segment_start for turn in episode.turns]
    assert opens == [True, False, True, True, False, True]
    assert [turn.subgoal for turn in episode.turns] == ["a", "a", "b", "b", "b", "b"]
    prompts = [tiny_tokenizer.decode(turn.prompt) for turn in episode.turns]
    shown = [re.search(r"Subgoal: (.*)\.\n", prompt)[1] for prompt in prompts]
    assert shown == ["None", "a", "a", "b", "b", "b"]  # what was in force before the turn
    assert [turn.prev_subgoal for turn in episode.turns] == ["", "a", "a", "b", "b", "b"]
    assert [turn.decision.valid for turn in episode.turns] == [True, True, True, False, False, True]


def test_truncated_is_not_terminated(play):
    ends = ("win", "lose", "x")
    won, lost, cut = play([0, 1, 2], [[format_response(True, "a", end)] for end in ends])
    assert (won.success, won.truncated) == (True, False)
    assert (lost.success, lost.truncated) == (False, False)
    assert (cut.success, cut.truncated) == (False, True)


def state_of(config, past=()):
    info = {"task": "the task", "task_type": "", "admissible": ["x"]}
    state = AgentState(config, 0, "the page", info)
    state.past.extend(past)
    return state


DECISION = hiper.Decision(True, "a", "x", True, "")


def test_a_win_on_the_last_step_is_terminated():
    """A world that says both at once: the task itself ended."""
    state = state_of(PLAIN)
    state.record_turn([], [], DECISION, ("page", 1.0, True, True, {}))
    assert state.ended
    assert not state.truncated


@pytest.mark.parametrize("end", ["win", "lose", "x"])
def test_final_prompt_is_of_the_state_after_the_last_turn(play, tiny_tokenizer, end):
    script = [format_response(True, "a", "x"), format_response(True, "b", end)]
    [episode] = play([0], [script], history=1, short_prompt=False)
    want = plan_execute_prompt("task 0", "page 0.2", "b", [("page 0.1", end)], ["x", "win"])
    assert tiny_tokenizer.decode(episode.final_prompt) == want


def test_history_is_a_window_of_the_last_turns(play, tiny_tokenizer):
    script = [format_response(True, "a", word) for word in ("x", "y", "z", "win")]
    [episode] = play([0], [script], history=2, short_prompt=False)
    past = [[], [(0, "x")], [(0, "x"), (1, "y")], [(1, "y"), (2, "z")]]
    for t, turn in enumerate(episode.turns):
        pairs = [(f"page 0.{u}", did) for u, did in past[t]]
        carried = "a" if t else ""
        want = plan_execute_prompt("task 0", f"page 0.{t}", carried, pairs, ["x", "win"])
        assert tiny_tokenizer.decode(turn.prompt) == want
    [bare] = play([0], [script])
    assert not any("Earlier" in tiny_tokenizer.decode(turn.prompt) for turn in bare.turns)


def test_a_short_prompt_names_no_admissible_actions(play, tiny_tokenizer):
    [episode] = play([0], [[format_response(True, "a", "win")]])
    assert "Admissible" not in tiny_tokenizer.decode(episode.turns[0].prompt)


def test_the_expert_s_words_win_the_household(monkeypatch, tiny_tokenizer):
    """The whole way with a real world: prompts as ids, an answer as ids, the parser, the env."""

    def generate(actor, tokenizer, prompts, **_):
        live = [env for env in pool.envs.envs.values() if not env.done]
        answers = []
        for prompt in map(tokenizer.decode, prompts):
            env = next(env for env in live if env.task in prompt and env._page() in prompt)
            subgoal = re.search(r"Subgoal: (.*)\.\n", prompt)[1]
            answers.append(format_response(*env.expert(subgoal)))
        return encode(tokenizer, answers)

    monkeypatch.setattr(rollout, "generate", generate)
    config = tiny_config(num_envs=5)
    with envs.EnvPool("household", "train", 1) as pool:
        episodes = collect(None, tiny_tokenizer, pool, range(12), config)
    for episode in episodes:
        assert episode.success
        assert not episode.truncated
        assert episode.turns[-1].reward == 10.0
        for turn in episode.turns:
            assert turn.decision.valid
            assert turn.is_segment_start or turn.decision.subgoal == turn.subgoal
    assert len({episode.task_type for episode in episodes}) == 6


def test_a_random_model_s_episodes_are_whole(tiny_actor, tiny_tokenizer):
    """No script: what a random model writes is played to the end; the ids are those sampled."""
    torch.manual_seed(0)
    config = tiny_config(num_envs=2, max_new_tokens=8)
    with envs.EnvPool("household", "train", 1, max_steps=3) as pool:
        episodes = collect(tiny_actor, tiny_tokenizer, pool, [3, 1, 2], config)
    assert [e.index for e in episodes] == [3, 1, 2]
    assert all(e.truncated and len(e.turns) == 3 for e in episodes)
    for turn in (turn for e in episodes for turn in e.turns):
        assert 1 <= len(turn.response) <= 8
        assert turn.decision == hiper.parse(response_text(turn.response, tiny_tokenizer))


def test_others_may_plan_and_act_in_the_agent_s_place(monkeypatch, tiny_tokenizer):
    """planner writes how each response begins, executor decides what happens."""
    seen = []

    def planner(agents, prompts):
        seen.append(("plan", list(agents), len(prompts)))
        return [format_plan("theirs", True)] * len(prompts)

    def generate(actor, tokenizer, prompts, **_):
        return encode(tokenizer, ["<action>x</action>"] * len(prompts))

    def executor(agents, prompts, decisions):
        seen.append(("act", list(agents), [decision.action for decision in decisions]))
        return ["win"] * len(prompts)

    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setitem(sys.modules, "scripted", scripted_world(SCRIPTS))
    with envs.EnvPool("scripted") as pool:
        episodes = collect(
            None,
            tiny_tokenizer,
            pool,
            [0, 4],
            PLAIN,
            planner=planner,
            executor=executor,
        )
    assert seen == [("plan", [0, 1], 2), ("act", [0, 1], ["x", "x"])]
    assert all(e.success and len(e.turns) == 1 for e in episodes)
    assert [e.turns[0].subgoal for e in episodes] == ["theirs"] * 2
    assert [e.turns[0].decision.action for e in episodes] == ["win"] * 2  # what happened


@pytest.mark.parametrize("asked, used", [({}, 1.0), ({"temperature": 0.4}, 0.4)])
def test_collect_samples_at_the_temperature_asked_for(monkeypatch, tiny_tokenizer, asked, used):
    """At 1 where none is given: training takes the tokens for samples of the policy."""
    temperatures = []

    def generate(actor, tokenizer, prompts, *, temperature, max_new_tokens):
        temperatures.append(temperature)
        return [encode(tokenizer, SCRIPTS[1][0])] * len(prompts)

    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setitem(sys.modules, "scripted", scripted_world(SCRIPTS))
    with envs.EnvPool("scripted") as pool:
        collect(None, tiny_tokenizer, pool, [1], PLAIN, **asked)
    assert temperatures == [used]


# ---- environments that are lost ----------------------------------------------------------------

FRAIL = '''
import os
import time

SPLITS = ("train",)
IN_PROCESS = False


def size(split):
    return 9


def make(split, index):
    return Frail(index)


class Frail:
    """Action "die 1" ends its process once, "die 2" twice; so does "hang"."""

    def __init__(self, index):
        self.index = index

    def reset(self, seed=None):
        self.turn = 0
        self.won = False
        return self.page(), self.info()

    def step(self, action):
        self.turn += 1
        self.won = action == "win"
        how, _, lives = action.partition(" ")
        for life in range(int(lives or 0)):
            mark = os.path.join(os.environ["MARKS"], f"{self.index}.{life}")
            if not os.path.exists(mark):
                open(mark, "w").close()
                os._exit(3) if how == "die" else time.sleep(600)
        return self.page(), float(self.won), self.won, False, self.info()

    def close(self):
        pass

    def page(self):
        return f"page {self.index}.{self.turn}"

    def info(self):
        return {
            "task": f"task {self.index}",
            "task_type": "",
            "admissible": [],
            "won": self.won,
            "score": float(self.won),
        }
'''


@pytest.fixture
def frail(tmp_path, monkeypatch):
    """A world whose actions end its processes."""
    (tmp_path / "frail.py").write_text(FRAIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MARKS", str(tmp_path))
    yield "frail"
    sys.modules.pop("frail", None)


def walk(*actions):
    return [format_response(True, "a", action) for action in actions]


@pytest.mark.parametrize("action, limit", [("die 1", 120), ("hang 1", 2)])
def test_episodes_lost_with_their_process_begin_anew(play, frail, monkeypatch, action, limit):
    monkeypatch.setattr(env_workers, "LIMIT", limit)
    scripts = [
        walk("x", "x", "x", "win"),
        walk("x", action, "win"),
        walk("win"),
        walk("x", "x", "win"),
        walk("x", "win"),
    ]
    with pytest.warns(UserWarning, match="its episodes are lost"):
        episodes = play(range(5), scripts, num_envs=4, world=frail, workers=2)
    assert [e.index for e in episodes] == [0, 1, 2, 3, 4]
    assert all(e.success for e in episodes)
    # nothing of the lost ones is left
    assert [len(e.turns) for e in episodes] == list(map(len, scripts))
    assert [turn.observation for turn in episodes[1].turns] == ["page 1.0", "page 1.1", "page 1.2"]
    assert [e.restarts for e in episodes] == [0, 1, 0, 1, 0]  # slots 1 and 3 shared a process
    assert len(play.finished) == 5
    # at once, in the freed slots
    assert sorted(play.batches[2]) == [(0, 2), (1, 0), (3, 0), (4, 1)]


def test_a_task_that_ends_two_processes_is_named(play, frail):
    long = walk(*"xxxxxxxx", "win")
    scripts = [long, walk("x", "die 2", "win"), long]
    message = "^task 1 of frail's split 'train' failed twice: .*died .exit 3.$"
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=message):
        play(range(3), scripts, num_envs=3, world=frail, workers=1)


def test_the_innocent_begin_anew_as_often_as_it_takes(play, frail):
    scripts = [
        walk(*"xxxxxxxx", "win"),
        walk("die 1", "win"),
        walk("x", "die 1", "win"),
        walk("x", "x", "die 1", "win"),
    ]
    with pytest.warns(UserWarning):
        episodes = play(range(4), scripts, num_envs=4, world=frail, workers=1)
    assert all(e.success for e in episodes)
    assert [len(e.turns) for e in episodes] == [9, 2, 3, 4]
    assert episodes[0].restarts == 3


class LossyPool:
    """A pool that loses the episodes named in `losses`, a list of (step number, task)."""

    def __init__(self, losses):
        self.losses = losses
        self.steps = 0
        self.envs = {}

    def reset(self, tasks):
        self.envs.update(
            {slot: ScriptedEnv(index, SCRIPTS[index]) for slot, index in tasks.items()}
        )
        return {slot: self.envs[slot].reset() for slot in tasks}

    def step(self, actions):
        outcomes = {}
        for slot, action in actions.items():
            outcomes[slot] = self.envs[slot].step(action)
            if (self.steps, self.envs[slot].index) in self.losses:
                outcomes[slot] = None
        self.steps += 1
        return outcomes


def test_an_episode_without_an_outcome_starts_again(play, tiny_tokenizer):
    """Its turns are forgotten, and it keeps its place among the episodes."""
    play([])  # sets the scripts
    pool = LossyPool([(1, 0), (2, 3), (3, 0)])
    config = tiny_config(num_envs=2, history=0)
    episodes = collect(None, tiny_tokenizer, pool, [0, 1, 3, 0], config)
    assert [e.index for e in episodes] == [0, 1, 3, 0]
    assert [e.restarts for e in episodes] == [2, 0, 1, 0]
    assert [len(e.turns) for e in episodes] == [3, 1, 2, 3]
    for episode in episodes:
        pages = [turn.observation for turn in episode.turns]
        assert pages == [f"page {episode.index}.{t}" for t in range(len(pages))]
        assert episode.turns[0].prev_subgoal == ""
    assert play.batches == [
        [(0, 0), (1, 0)],
        [(0, 1), (3, 0)],  # task 0 is lost here
        [(3, 1), (0, 0)],  # task 3 is lost here, at its last turn
        [(0, 1), (3, 0)],  # task 0 is lost again
        [(3, 1), (0, 0)],
        [(0, 1), (0, 0)],
        [(0, 2), (0, 1)],
        [(0, 2)],
    ]


# ---- imposed segments --------------------------------------------------------------------------

SEGMENTS = {
    "single": [True, False, False, False, False, False, False],
    "every-turn": [True] * 7,
    "fixed:1": [True] * 7,
    "fixed:3": [True, False, False, True, False, False, True],
    "fixed:10": [True, False, False, False, False, False, False],
}


@pytest.mark.parametrize("segments", SEGMENTS)
def test_imposed_segments_are_written_for_the_agent(segments):
    """A turn that opens begins with SWITCH; else the whole plan is written, the carried subgoal."""
    state = state_of(tiny_config(segments=segments))
    for t, opens in enumerate(SEGMENTS[segments]):
        if opens:
            assert state.forced_prefix() == "<switch>SWITCH</switch>"
            decision = DECISION._replace(subgoal=f"goal {t}")
            carried = f"goal {t}"
        else:
            assert state.forced_prefix() == format_plan(carried, switch=False)
            decision = DECISION._replace(switch=False, subgoal=carried)
        state.record_turn([], [], decision, ("page", 0.0, False, False, state.info))
        assert state.turns[t].is_segment_start == opens
        assert state.turns[t].subgoal == carried


def test_learned_segments_write_nothing():
    state = state_of(tiny_config(segments="learned"))
    for _ in range(3):
        assert state.forced_prefix() == ""
        state.record_turn([], [], DECISION, ("page", 0.0, False, False, state.info))


@pytest.mark.parametrize("segments", SEGMENTS)
def test_imposed_segments_are_part_of_prompt_and_response(
    play, monkeypatch, tiny_tokenizer, segments
):
    """The agent goes on from the prefix, which counts as its response."""

    def generate(actor, tokenizer, prompts, **_):
        answers = []
        for prompt in map(tokenizer.decode, prompts):
            opens = prompt.endswith("<switch>SWITCH</switch>")
            assert opens or prompt.endswith("</subgoal>")
            plan = f"<subgoal>goal {len(said)}</subgoal>" if opens else ""
            action = "win" if len(said) == 6 else "x"
            answers.append(f"{plan}<action>{action}</action>")
            said.append(opens)
        return encode(tokenizer, answers)

    said = []
    monkeypatch.setattr(rollout, "generate", generate)
    script = walk(*"xxxxxxx")
    [episode] = play([0], [script], segments=segments)
    assert said == SEGMENTS[segments]
    assert [turn.is_segment_start for turn in episode.turns] == said
    for turn, opens in zip(episode.turns, said, strict=True):
        assert turn.decision.valid
        assert turn.decision.switch == opens
        text = tiny_tokenizer.decode(turn.response)
        plan = format_plan(turn.subgoal, opens)
        assert text.startswith(plan)
        assert text.endswith("</action>")
        assert not tiny_tokenizer.decode(turn.prompt).endswith(("</switch>", "</subgoal>"))
    assert episode.success


def test_respond_generates_behind_each_prefix(monkeypatch, tiny_tokenizer):
    asked = []

    def generate(actor, tokenizer, prompts, **settings):
        asked.append((prompts, settings))
        return [[7]] * len(prompts)

    monkeypatch.setattr(rollout, "generate", generate)
    prefix = "<switch>SWITCH</switch>"
    ids = encode(tiny_tokenizer, prefix)
    config = tiny_config(max_new_tokens=9)
    got = respond(None, tiny_tokenizer, [[1], [2, 3]], ["", prefix], 0.4, config)
    assert asked == [([[1], [2, 3, *ids]], {"temperature": 0.4, "max_new_tokens": 9})]
    assert got == [[7], [*ids, 7]]


# ---- prompts -----------------------------------------------------------------------------------


def test_a_prompt_too_long_loses_its_history_then_its_left_end(tiny_tokenizer):
    past = [("far far away", "x")] * 2
    [with_past] = tokenize_prompts(tiny_tokenizer, [state_of(PLAIN, past).prompt()])
    [bare] = tokenize_prompts(tiny_tokenizer, [state_of(PLAIN).prompt()])

    def build(room, *pasts):
        config = tiny_config(max_prompt_tokens=room)
        return build_prompts([state_of(config, pairs) for pairs in pasts], tiny_tokenizer)

    assert len(with_past) > len(bare) + 1
    assert "Earlier" in tiny_tokenizer.decode(with_past)
    assert build(len(with_past), past) == [with_past]
    assert build(len(with_past) - 1, past) == [bare]
    assert build(len(bare), past) == [bare]
    assert build(7, past) == [bare[-7:]]
    assert build(len(bare), [], past) == [bare, bare]
    assert build(7) == []


# ---- agents ------------------------------------------------------------------------------------


def test_agents_do_not_share_what_they_carry():
    a = state_of(tiny_config(history=2))
    b = state_of(tiny_config(history=2))
    a.record_turn([], [], DECISION, ("page", 0.0, False, False, a.info))
    assert (a.subgoal, len(a.past), len(a.turns)) == ("a", 1, 1)
    assert (b.subgoal, len(b.past), len(b.turns)) == ("", 0, 0)
    assert a.ended is False
