"""rollout.py: episodes that a script speaks, so that every reward, segment and prompt is known beforehand; and HF's generate, sealed."""

import copy
import functools
import random
import re
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import envs
import hiper
import rollout
from rollout import Episode, Seat, Style, Turn, batch_of, collect, encode, generate, score

PLAIN = Style(
    history=0, brief=True, show_admissible=False, success_reward=10.0, invalid_penalty=0.1
)


def said(switch, subgoal, action):
    return hiper.response(switch, subgoal, action)


# ---- a world that a script plays: what the agent will answer is written down per task and turn --------------------------


class Scripted:
    """Task `index`: ends after len(script) turns. Action "win" wins, "lose" ends without a win, else the last turn truncates."""

    SPLITS, IN_PROCESS = ("train",), True
    scripts = [
        [said(True, "a", "x")] * n + [said(False, "a", end)]
        for n, end in ((2, "win"), (0, "win"), (5, "x"), (1, "lose"), (3, "win"))
    ]

    def __init__(self, index):
        self.index = index

    @classmethod
    def size(cls, split):
        return len(cls.scripts)

    @classmethod
    def make(cls, split, index):
        return cls(index)

    def reset(self, seed=None):
        self.turn, self.won, self.done = 0, False, False
        return self.page(), self.info()

    def step(self, action):
        assert not self.done, "a finished episode is still in play"
        self.turn, self.won = self.turn + 1, action == "win"
        over = self.won or action == "lose"
        truncated = not over and self.turn == len(self.scripts[self.index])
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


@pytest.fixture
def play(monkeypatch, tiny_tokenizer):
    """play(tasks, scripts=..., slots=...) -> episodes; play.batches lists what was in each batch that generated."""
    monkeypatch.setitem(sys.modules, "scripted", Scripted)

    def play(tasks, scripts=None, slots=2, style=PLAIN, world="scripted", workers=0, **kwargs):
        if scripts:
            monkeypatch.setattr(Scripted, "scripts", scripts)
        play.batches = []

        def generate(actor, tokenizer, prompts, **_):
            pages = [re.findall(r"page (\d+)\.(\d+)", tokenizer.decode(p))[-1] for p in prompts]
            play.batches.append([tuple(map(int, page)) for page in pages])
            return [
                tokenizer(Scripted.scripts[i][t], add_special_tokens=False)["input_ids"]
                for i, t in play.batches[-1]
            ]

        monkeypatch.setattr(rollout, "generate", generate)
        with envs.Runner(world, workers=workers) as runner:
            return collect(
                None,
                tiny_tokenizer,
                runner,
                tasks,
                slots=slots,
                temperature=1.0,
                style=style,
                **kwargs,
            )

    return play


# ---- collect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 50])
def test_every_task_once_in_order_and_no_slot_idle(play, slots):
    tasks = [2, 0, 1, 1, 4, 3, 0, 2, 1]
    finished = []
    episodes = play(tasks, slots=slots, progress=finished.append)
    length = lambda i: len(Scripted.scripts[i])
    assert [e.index for e in episodes] == tasks
    assert [len(e.turns) for e in episodes] == list(map(length, tasks))
    assert sorted(map(id, finished)) == sorted(map(id, episodes))
    queue, live, sizes, order = (
        list(tasks),
        [],
        [],
        [],
    )  # the oracle: turns left of each episode in play
    while queue or live:
        while queue and len(live) < slots:
            live.append([queue[0], length(queue.pop(0))])
        sizes.append(len(live))
        live = [[i, left - 1] for i, left in live]
        order += [i for i, left in live if not left]
        live = [pair for pair in live if pair[1]]
    assert list(map(len, play.batches)) == sizes
    assert sorted(e.index for e in finished) == sorted(order)
    turns = [page for batch in play.batches for page in batch]
    assert sorted(turns) == sorted(
        (i, t) for i in tasks for t in range(length(i))
    )  # no turn doubled, none left out


def test_no_tasks_no_episodes(play):
    assert play([]) == [] and play.batches == []


def test_turns_hold_what_was_seen_said_and_done(play, tiny_tokenizer):
    (episode,) = play([0], [[said(True, "a", "x"), said(False, "a", "y"), said(True, "b", "win")]])
    assert (episode.task, episode.task_type, episode.won, episode.score) == (
        "task 0",
        "type 0",
        True,
        0.5,
    )
    for t, (turn, carried) in enumerate(zip(episode.turns, ("", "a", "a"))):
        assert turn.observation == f"page 0.{t}"
        assert tiny_tokenizer.decode(turn.prompt) == hiper.plan_execute_prompt(
            "task 0", f"page 0.{t}", carried, brief=True
        )
        assert tiny_tokenizer.decode(turn.response) == Scripted.scripts[0][t]
        assert turn.decision == hiper.parse(Scripted.scripts[0][t])


def test_success_pays_on_the_winning_turn_and_a_bad_format_costs(play):
    broken_win = "<switch>maybe</switch><subgoal>a</subgoal><action>win</action>"  # the action is readable all the same
    episodes = play(
        [0, 1, 2],
        [
            [said(True, "a", "x"), "nonsense", said(False, "a", "win")],
            ["", broken_win],
            [said(True, "a", "x"), said(False, "a", "lose")],
        ],
    )
    assert [[turn.reward for turn in e.turns] for e in episodes] == [
        [0, -0.1, 10],
        [-0.1, 9.9],
        [0, 0],
    ]
    (episode,) = play(
        [0], [["", said(True, "a", "win")]], style=Style(success_reward=3.0, invalid_penalty=0.5)
    )
    assert [turn.reward for turn in episode.turns] == [-0.5, 3.0]


def test_segments_and_the_subgoal_in_force(play, tiny_tokenizer):
    script = [
        said(False, "a", "x"),  # KEEP at turn 0 opens all the same
        said(False, "another", "x"),  # KEEP keeps, whatever the block says
        said(True, "b", "x"),
        "<switch>SWITCH</switch><action>x</action>",  # SWITCH to nothing readable: opens, the old one stays
        "junk",
        said(True, "b", "win"),
    ]  # SWITCH to the same subgoal opens
    (episode,) = play([0], [script])
    assert [turn.opened for turn in episode.turns] == [True, False, True, True, False, True]
    assert [turn.subgoal for turn in episode.turns] == ["a", "a", "b", "b", "b", "b"]
    shown = [
        re.search(r"Subgoal: (.*)\.\n", tiny_tokenizer.decode(turn.prompt))[1]
        for turn in episode.turns
    ]
    assert shown == ["None", "a", "a", "b", "b", "b"]  # what was in force before the turn
    assert [turn.decision.valid for turn in episode.turns] == [True, True, True, False, False, True]


def test_truncated_is_not_terminated(play):
    won, lost, cut = play(
        [0, 1, 2], [[said(True, "a", "win")], [said(True, "a", "lose")], [said(True, "a", "x")]]
    )
    assert [(e.won, e.truncated) for e in (won, lost, cut)] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_a_win_on_the_last_step_is_terminated():
    """A world that says both at once: the task itself ended."""
    seat = Seat(0, "page", {"task": "", "task_type": "", "admissible": []}, PLAIN)
    assert (
        seat.answer([], [], hiper.Decision(True, "a", "x", True, ""), ("page", 1.0, True, True, {}))
        and not seat.truncated
    )


@pytest.mark.parametrize("end", ["win", "lose", "x"])
def test_end_prompt_is_the_prompt_of_the_state_after_the_last_turn(play, tiny_tokenizer, end):
    style = Style(history=1, brief=True)
    (episode,) = play([0], [[said(True, "a", "x"), said(True, "b", end)]], style=style)
    want = hiper.plan_execute_prompt(
        "task 0", "page 0.2", "b", [("page 0.1", end)], ["x", "win"], brief=True
    )
    assert tiny_tokenizer.decode(episode.end_prompt) == want


def test_history_is_a_window_of_the_last_turns(play, tiny_tokenizer):
    script = [said(True, "a", word) for word in ("x", "y", "z", "win")]
    (episode,) = play([0], [script], style=Style(history=2, brief=True))
    past = [[], [(0, "x")], [(0, "x"), (1, "y")], [(1, "y"), (2, "z")]]
    for t, turn in enumerate(episode.turns):
        pairs = [(f"page 0.{u}", did) for u, did in past[t]]
        want = hiper.plan_execute_prompt(
            "task 0", f"page 0.{t}", "a" if t else "", pairs, ["x", "win"], brief=True
        )
        assert tiny_tokenizer.decode(turn.prompt) == want
    assert not any(
        "Earlier" in tiny_tokenizer.decode(turn.prompt) for turn in play([0], [script])[0].turns
    )


def test_the_expert_s_words_win_the_household(monkeypatch, tiny_tokenizer):
    """The whole way with a real world: prompts as ids, an answer as ids, the parser, the env."""
    with envs.Runner("household", "train", 1) as runner:

        def generate(actor, tokenizer, prompts, **_):
            answers, live = [], [env for env in runner.envs.values() if not env.done]
            for prompt in map(tokenizer.decode, prompts):
                env = next(env for env in live if env.task in prompt and env._page() in prompt)
                answers.append(said(*env.expert(re.search(r"Subgoal: (.*)\.\n", prompt)[1])))
            return tokenizer(answers, add_special_tokens=False)["input_ids"]

        monkeypatch.setattr(rollout, "generate", generate)
        episodes = collect(
            None, tiny_tokenizer, runner, range(12), slots=5, temperature=1.0, style=PLAIN
        )
    assert all(e.won and not e.truncated and e.turns[-1].reward == 10.0 for e in episodes)
    assert all(
        turn.decision.valid and (turn.opened or turn.decision.subgoal == turn.subgoal)
        for e in episodes
        for turn in e.turns
    )
    assert len({e.task_type for e in episodes}) == 6


def test_a_random_model_s_episodes_are_whole(tiny_actor, tiny_tokenizer):
    """No script: whatever a random model writes is played to the end, and the ids are those that were sampled."""
    torch.manual_seed(0)
    with envs.Runner("household", "train", 1, max_steps=3) as runner:
        episodes = collect(
            tiny_actor,
            tiny_tokenizer,
            runner,
            [3, 1, 2],
            slots=2,
            temperature=1.0,
            style=Style(history=0, brief=True, max_response=8),
        )
    assert [e.index for e in episodes] == [3, 1, 2] and all(
        e.truncated and len(e.turns) == 3 for e in episodes
    )
    for turn in (turn for e in episodes for turn in e.turns):
        assert 1 <= len(turn.response) <= 8
        assert turn.decision == hiper.parse(hiper.response_text(turn.response, tiny_tokenizer))


FRAIL = """
import os, time
SPLITS, IN_PROCESS = ("train",), False
size = lambda split: 9

def make(split, index):
    return Frail(index)

class Frail:                                    # "die 1" ends its process once, "die 2" twice; so does "hang"
    def __init__(self, index):
        self.index = index

    def reset(self, seed=None):
        self.turn, self.won = 0, False
        return self.page(), self.info()

    def step(self, action):
        self.turn, self.won = self.turn + 1, action == "win"
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
        return {"task": f"task {self.index}", "task_type": "", "admissible": [], "won": self.won, "score": float(self.won)}
"""


@pytest.fixture
def frail(tmp_path, monkeypatch):
    """A world whose actions end its processes."""
    (tmp_path / "frail.py").write_text(FRAIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MARKS", str(tmp_path))
    yield "frail"
    sys.modules.pop("frail", None)


def walk(*actions):
    return [said(True, "a", action) for action in actions]


@pytest.mark.parametrize("action, limit", [("die 1", 120), ("hang 1", 2)])
def test_episodes_lost_with_their_process_begin_anew(play, frail, monkeypatch, action, limit):
    monkeypatch.setattr(envs, "LIMIT", limit)
    scripts = [
        walk("x", "x", "x", "win"),
        walk("x", action, "win"),
        walk("win"),
        walk("x", "x", "win"),
        walk("x", "win"),
    ]
    finished = []
    with pytest.warns(UserWarning, match="its episodes are lost"):
        episodes = play(
            range(5), scripts, slots=4, world=frail, workers=2, progress=finished.append
        )
    assert [e.index for e in episodes] == [0, 1, 2, 3, 4] and all(e.won for e in episodes)
    assert [len(e.turns) for e in episodes] == list(
        map(len, scripts)
    )  # nothing of the lost ones is left
    assert [turn.observation for turn in episodes[1].turns] == ["page 1.0", "page 1.1", "page 1.2"]
    assert [e.lost for e in episodes] == [0, 1, 0, 1, 0]  # slots 1 and 3 shared a process
    assert len(finished) == 5
    assert sorted(play.batches[2]) == [
        (0, 2),
        (1, 0),
        (3, 0),
        (4, 1),
    ]  # at once, in the freed slots


def test_a_task_that_ends_two_processes_is_named(play, frail):
    scripts = [walk(*"xxxxxxxx", "win"), walk("x", "die 2", "win"), walk(*"xxxxxxxx", "win")]
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            RuntimeError, match="^task 1 of frail's split 'train' failed twice: .*died .exit 3.$"
        ),
    ):
        play(range(3), scripts, slots=3, world=frail, workers=1)


def test_the_innocent_begin_anew_as_often_as_it_takes(play, frail):
    scripts = [
        walk(*"xxxxxxxx", "win"),
        walk("die 1", "win"),
        walk("x", "die 1", "win"),
        walk("x", "x", "die 1", "win"),
    ]
    with pytest.warns(UserWarning):
        episodes = play(range(4), scripts, slots=4, world=frail, workers=1)
    assert all(e.won for e in episodes) and [len(e.turns) for e in episodes] == [9, 2, 3, 4]
    assert episodes[0].lost == 3


# ---- prompts ----------------------------------------------------------------------------------------------------------


def seat_of(style, past):
    seat = Seat(0, "the page", {"task": "the task", "task_type": "", "admissible": ["x"]}, style)
    seat.past.extend(past)
    return seat


def test_a_prompt_too_long_loses_its_history_then_its_left_end(tiny_tokenizer):
    past = [("far far away", "x")] * 2
    long, short = (
        len(encode(tiny_tokenizer, [seat_of(Style(brief=True), p).prompt()])[0]) for p in (past, [])
    )
    for room, kept in ((long, True), (long - 1, False), (short, False)):
        (row,) = rollout.prompts_of(
            [seat_of(Style(brief=True, max_prompt=room), past)], tiny_tokenizer
        )
        assert (
            len(row) == (long if kept else short)
            and ("Earlier" in tiny_tokenizer.decode(row)) == kept
        )
    (bare,) = encode(tiny_tokenizer, [seat_of(Style(brief=True), []).prompt()])
    (row,) = rollout.prompts_of([seat_of(Style(brief=True, max_prompt=7), past)], tiny_tokenizer)
    assert row == bare[-7:]
    mixed = rollout.prompts_of(
        [
            seat_of(Style(brief=True, max_prompt=short), []),
            seat_of(Style(brief=True, max_prompt=short), past),
        ],
        tiny_tokenizer,
    )
    assert mixed == [bare, bare]


def test_a_chat_template_wraps_the_prompt(tiny_tokenizer, monkeypatch):
    text = "Task: <b> {{ x }}.\n"
    (plain,) = encode(tiny_tokenizer, [text])
    assert tiny_tokenizer.decode(plain) == text
    monkeypatch.setattr(
        tiny_tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    (chat,) = encode(tiny_tokenizer, [text])
    assert tiny_tokenizer.decode(chat) == f"[user]{text}[end][assistant]"
    assert encode(tiny_tokenizer, [text], max_prompt=4) == [chat[-4:]]


# ---- batches ----------------------------------------------------------------------------------------------------------


def test_batch_says_what_the_episodes_say(play, tiny_tokenizer):
    scripts = [
        [said(True, "a", "x"), said(False, "a", "x"), said(True, "b", "win")],
        [said(False, "a", "x")],
        ["junk", said(False, "a", "lose")],
    ]
    episodes = play([0, 1, 2, 1], scripts, slots=3)
    batch = batch_of(episodes, tiny_tokenizer)
    assert list(zip(batch.row.tolist(), batch.col.tolist())) == [
        (b, t) for b, e in enumerate(episodes) for t in range(len(e.turns))
    ]
    assert (
        batch.mask.shape == (4, 3)
        and batch.mask.dtype == batch.switch.dtype == batch.truncated.dtype == torch.bool
    )
    for b, e in enumerate(episodes):
        n = len(e.turns)
        assert batch.mask[b].tolist() == [True] * n + [False] * (3 - n)
        assert batch.rewards[b].tolist() == pytest.approx(
            [turn.reward for turn in e.turns] + [0.0] * (3 - n)
        )
        assert batch.switch[b].tolist() == [turn.opened for turn in e.turns] + [False] * (3 - n)
        assert batch.ends.prompts[b] == e.end_prompt
        assert tiny_tokenizer.decode(batch.ends.responses[b]) == hiper.keep_block(
            e.turns[-1].subgoal
        )
    assert batch.truncated.tolist() == [False, True, False, True]
    turns = [turn for e in episodes for turn in e.turns]
    assert batch.samples.prompts == [turn.prompt for turn in turns] and batch.samples.responses == [
        turn.response for turn in turns
    ]
    assert batch.samples.lengths.tolist() == [len(turn.response) for turn in turns]
    x = torch.arange(1.0, len(turns) + 1)
    assert torch.equal(batch.flat(batch.grid(x)), x) and not batch.grid(x)[~batch.mask].any()
    assert batch.grid(x)[2].tolist() == [5, 6, 0]
    cut = torch.randn(4, 3, requires_grad=True)  # and the ways there and back carry gradients
    batch.flat(cut).sum().backward()
    assert torch.equal(cut.grad, batch.mask.float())


def test_ends_are_valued_after_the_prompt_and_after_the_kept_subgoal(
    play, tiny_policy, tiny_tokenizer
):
    episodes = play([0, 1], [[said(True, "find a mug", "x"), said(False, "", "x")], ["junk"]])
    batch = batch_of(episodes, tiny_tokenizer)
    assert tiny_tokenizer.decode(batch.ends.responses[1]) == hiper.keep_block(
        "None"
    )  # never had a subgoal
    got = score(tiny_policy, batch.ends, parts=("values",))
    for b, e in enumerate(episodes):
        keep = tiny_tokenizer(hiper.keep_block(e.turns[-1].subgoal), add_special_tokens=False)[
            "input_ids"
        ]
        with torch.no_grad():
            values = tiny_policy.heads(
                tiny_policy.critic(input_ids=torch.tensor([e.end_prompt + keep])).last_hidden_state[
                    0
                ]
            )
        assert got.v_high[b].item() == pytest.approx(
            values[len(e.end_prompt) - 1, 0].item(), abs=1e-5
        )
        assert got.v_switch[b].item() == pytest.approx(
            values[len(e.end_prompt) - 1, 2].item(), abs=1e-5
        )
        assert got.v_low[b].item() == pytest.approx(values[-1, 1].item(), abs=1e-5)  # at </subgoal>
        assert values[:, 1].unique().numel() > 3


def test_an_end_token_that_is_also_the_pad_is_kept_and_trained(tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    assert end == tiny_tokenizer.pad_token_id
    words = tiny_tokenizer("no action at all", add_special_tokens=False)["input_ids"]
    turns = [
        Turn([5], answer, hiper.parse(""), True, "", "", 0.0)
        for answer in (words + [end], [end], words)
    ]
    batch = batch_of([Episode(0, "", "", turns, False, 0.0, False, [5])], tiny_tokenizer)
    assert batch.samples.lengths.tolist() == [len(words) + 1, 1, len(words)]
    assert batch.samples.masks.action.sum(1).tolist() == [len(words) + 1, 1, len(words)]


# ---- generate ---------------------------------------------------------------------------------------------------------


def speaks(actor, rows, ends=None):
    """Make the model say `rows` (id lists) whatever it is asked. ends: where each row ought to leave the batch; that it did is checked."""
    forward, step = actor.forward, iter(range(10**6))
    ends = ends or [10**6] * len(rows)

    @functools.wraps(forward)
    def scripted(*args, **kwargs):
        out, k = forward(*args, **kwargs), next(step)
        live = [row for row, end in zip(rows, ends) if k < end]
        assert len(out.logits) == len(live)
        for n, row in enumerate(live):
            out.logits[n, -1] = -1e9
            out.logits[n, -1, row[k]] = 0.0
        return out

    actor.forward = scripted
    return actor


PROMPTS = [[7, 8, 9], [4] * 12, [1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_stops_at_its_own_action_or_end_token_and_keeps_it(
    tiny_actor, tiny_tokenizer, temperature
):
    end, ids = (
        tiny_tokenizer.eos_token_id,
        lambda text: tiny_tokenizer(text, add_special_tokens=False)["input_ids"],
    )
    rows = [ids(said(True, "a", "x")), ids("<action>") + [end], ids("<action>ab</action>")]
    assert len({*map(len, rows)}) == 3
    actor = speaks(tiny_actor, [row + ids("more") for row in rows], list(map(len, rows)))
    assert (
        generate(actor, tiny_tokenizer, PROMPTS, temperature=temperature, max_response=60) == rows
    )


def test_a_response_is_cut_at_its_longest(tiny_actor, tiny_tokenizer):
    assert (
        generate(
            speaks(tiny_actor, [[7] * 9] * 3),
            tiny_tokenizer,
            PROMPTS,
            temperature=1.0,
            max_response=5,
        )
        == [[7] * 5] * 3
    )


def test_a_closing_tag_in_the_prompt_stops_nothing(tiny_actor, tiny_tokenizer):
    prompt = tiny_tokenizer("<action>x</action>", add_special_tokens=False)["input_ids"]
    assert generate(
        speaks(tiny_actor, [[7] * 9]), tiny_tokenizer, [prompt], temperature=0, max_response=4
    ) == [[7] * 4]


def test_the_pad_id_is_an_end_of_its_own(tiny_actor, tiny_tokenizer):
    """Where pad and end differ (Qwen2.5: <|endoftext|>, <|im_end|>), the model may stop with either, and either stays."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert pad == 3 != end
    got = generate(
        speaks(tiny_actor, [[7, pad], [7, 7, end], [end]], [2, 3, 1]),
        tokenizer,
        PROMPTS,
        temperature=0,
        max_response=9,
    )
    assert got == [[7, pad], [7, 7, end], [end]]


def test_greedy_is_deterministic_and_left_padding_changes_nothing(tiny_actor, tiny_tokenizer):
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 200) for _ in range(n)] for n in (3, 40, 11)]
    once = generate(tiny_actor, tiny_tokenizer, prompts, temperature=0, max_response=12)
    torch.manual_seed(5)
    assert generate(tiny_actor, tiny_tokenizer, prompts, temperature=0, max_response=12) == once
    assert [
        generate(tiny_actor, tiny_tokenizer, [p], temperature=0, max_response=12)[0]
        for p in prompts
    ] == once
    hot = [
        generate(tiny_actor, tiny_tokenizer, prompts, temperature=1.0, max_response=12)
        for _ in range(2)
    ]
    assert hot[0] != hot[1] != once


@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3", "qwen3_moe", "gpt2", "bloom"]
)
def test_rows_leave_any_model_s_batch_and_cache_without_a_trace(kind, tiny_tokenizer):
    """Greedy, against HF's own loop, rows of all lengths; the end token is one that the model happens to say early in one row."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind,
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            **{"sliding_window": 6} if kind in ("mistral", "gemma2", "phi3") else {},
            num_experts=4,
            moe_intermediate_size=16,
            num_experts_per_tok=2,
            initializer_range=0.5,
            pad_token_id=1,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    model.generation_config = GenerationConfig(pad_token_id=1)
    prompts = [[random.Random(n).randrange(3, 300) for _ in range(5 + 3 * n)] for n in range(6)]
    want = [
        model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    end = next(
        i for i in want[2] if 2 < i < len(tokenizer) and sum(i in row for row in want) < len(want)
    )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    want = [row[: row.index(end) + 1] if end in row else row for row in want]
    assert len({*map(len, want)}) > 1
    assert generate(model, tokenizer, prompts, temperature=0, max_response=12) == want


def test_sampling_follows_the_temperature(tiny_actor, tiny_tokenizer):
    """Frequencies of the first token against softmax(logits / temperature) of the model itself: nothing is cut off."""
    n, prompt = 3000, [7, 8, 9]
    with torch.no_grad():
        logits = tiny_actor(input_ids=torch.tensor([prompt])).logits[0, -1]
    for temperature in (1.0, 0.4):
        p = (logits / temperature).softmax(-1)
        torch.manual_seed(0)
        first = torch.tensor(
            [
                row[0]
                for row in generate(
                    tiny_actor,
                    tiny_tokenizer,
                    [prompt] * n,
                    temperature=temperature,
                    max_response=1,
                )
            ]
        )
        seen = torch.bincount(first, minlength=len(p)) / n
        best = p.argsort(descending=True)
        for top in (best[:50], best[:200]):  # top_k=50, the default of HF, would make the first 1
            assert seen[top].sum().item() == pytest.approx(p[top].sum().item(), abs=0.04)


def test_the_checkpoint_s_own_generation_config_stays_out(tiny_actor, tiny_tokenizer):
    """Qwen2.5 ships top_k 20, top_p 0.8, temperature 0.7, repetition_penalty 1.05; others ship worse. None may bend pi."""
    greedy = generate(tiny_actor, tiny_tokenizer, PROMPTS, temperature=0, max_response=10)
    own = GenerationConfig(
        do_sample=True,
        top_k=50,
        top_p=0.5,
        temperature=0.1,
        repetition_penalty=1.3,
        min_new_tokens=7,
        min_p=0.3,
        no_repeat_ngram_size=2,
        typical_p=0.5,
        suppress_tokens=[greedy[0][0]],
        bad_words_ids=[[greedy[1][0]]],
        num_beams=4,
        num_return_sequences=2,
        use_cache=False,
        epsilon_cutoff=1e-2,
        exponential_decay_length_penalty=(2, 1.5),
        bos_token_id=5,
        eos_token_id=9,
    )
    tiny_actor.generation_config = own
    before = own.to_dict()
    assert generate(tiny_actor, tiny_tokenizer, PROMPTS, temperature=0, max_response=10) == greedy
    said = []
    for config in (own, GenerationConfig()):
        tiny_actor.generation_config = config
        torch.manual_seed(0)
        said.append(generate(tiny_actor, tiny_tokenizer, PROMPTS, temperature=0.4, max_response=10))
    assert said[0] == said[1]
    tiny_actor.generation_config = own
    with pytest.raises(TypeError):
        generate(tiny_actor, tiny_tokenizer, PROMPTS, temperature="hot", max_response=10)
    assert (
        tiny_actor.generation_config is own and own.to_dict() == before
    )  # it is saved with the model, unchanged


@pytest.mark.parametrize("n, size", [(1, 1), (5, 7), (4, 2000)])
def test_a_draw_follows_its_probabilities(n, size):
    p = torch.rand(n, size).pow(4)
    p[:, size // 2] = 0.0 if size > 1 else 1.0  # what cannot be is never drawn
    p /= p.sum(1, keepdim=True)
    torch.manual_seed(0)
    times = 20000
    seen = torch.stack(
        [
            torch.bincount(row, minlength=size)
            for row in rollout.draw(p.repeat_interleave(times, 0)).view(n, times)
        ]
    )  # [n, V]
    assert not seen[p == 0].any()
    off = (seen - times * p)[p > 0] / (times * p * (1 - p)).sqrt()[p > 0].clamp(min=1.0)
    assert off.abs().max() < 5.5  # in standard deviations


def test_a_draw_at_the_edges_stays_in_the_vocabulary(monkeypatch):
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75], [1.0, 0.0, 0.0, 0.0]])
    for u, want in ((0.0, [1, 0]), (0.25, [3, 0]), (1 - 2**-53, [3, 0])):
        monkeypatch.setattr(
            torch, "rand", lambda *size, u=u, **kw: torch.full(size, u, dtype=kw["dtype"])
        )
        assert rollout.draw(p)[:, 0].tolist() == want
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.ones(size, dtype=kw["dtype"]))
    assert rollout.draw(p).max() == 3  # an index all the same


def test_generate_leaves_no_gradient(tiny_actor, tiny_tokenizer):
    generate(tiny_actor, tiny_tokenizer, PROMPTS, temperature=1.0, max_response=2)
    assert all(p.grad is None and p.requires_grad for p in tiny_actor.parameters())


def test_seats_do_not_share_what_they_carry():
    a, b = (seat_of(Style(), []) for _ in range(2))
    a.answer([], [], hiper.Decision(True, "a", "x", True, ""), ("page", 0.0, False, False, a.info))
    assert (a.subgoal, len(a.past), len(a.turns)) == ("a", 1, 1) and (
        b.subgoal,
        len(b.past),
        len(b.turns),
    ) == ("", 0, 0)
    assert Style.__dataclass_params__.frozen and a.ended is False
