"""support/viewer.py and viewer.html: what is shown is what was computed, and nothing in it runs."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from browser import dump_dom
from config import ConfigError
from hae import gae
from support import viewer
from support.pages import as_json, write_page
from support.protocol import decision_masks, switch_words
from support.tokens import response_text
from support.viewer import (
    load_policy_with_critic,
    page_data,
    score_episodes,
    token_texts,
    write_training,
)
from update_tools import make_episode, make_episodes, plain_config

EXAMPLE = Path(__file__).parent.parent / "examples" / "household"
HOSTILE = (
    "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
    "<svg onload=\"document.title='ran'\">' \" onclick=\"document.title='ran'\" {{DATA}} \u2028 é"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def episodes(tiny_tokenizer):
    rng = random.Random(0)
    return [make_episode(rng, tiny_tokenizer, turns) for turns in (5, 1, 7)]


def shown_data(path):
    """The data that a page holds."""
    text = path.read_text(encoding="utf-8")
    [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(data)


def data_of(policy, episodes, tokenizer, **changes):
    config = plain_config(**changes)
    old, advantages = score_episodes(policy, episodes, config, tokenizer)
    has_critic = advantages is not None
    data = page_data(episodes, old, advantages, config, tokenizer, has_critic=has_critic)
    return data, old, advantages


@pytest.mark.parametrize("switch_advantage", ["closed_form", "value_head"])
def test_the_page_shows_what_was_computed(tiny_policy, tiny_tokenizer, episodes, switch_advantage):
    changes = dict(switch_advantage=switch_advantage, bootstrap=True)
    data, old, advantages = data_of(tiny_policy, episodes, tiny_tokenizer, **changes)
    n = 0
    for b, (episode, shown) in enumerate(zip(episodes, data["episodes"], strict=True)):
        assert (shown["task"], shown["success"]) == (episode.task, episode.success)
        for t, (turn, record) in enumerate(zip(episode.turns, shown["turns"], strict=True)):
            said = "".join(data["tokens"][i] for i in record["tokens"])
            assert said == response_text(turn.response, tiny_tokenizer)
            prompt = "\n".join(data["texts"][i] for i in record["prompt"])
            assert prompt == response_text(turn.prompt, tiny_tokenizer)
            length = len(turn.response)
            assert record["p"] == pytest.approx(old.logprobs[n, :length].exp().tolist(), abs=6e-4)
            assert record["values"] == pytest.approx(
                [float(old.value(head)[n]) for head in ("high", "low", "switch")], rel=1e-3
            )
            [word] = switch_words(
                torch.tensor([turn.response]), torch.tensor([length]), tiny_tokenizer
            )
            p_word = float(old.logprobs[n, :length][word].sum().exp())
            beta = p_word if turn.decision.switch else 1 - p_word
            assert record["beta"] == (pytest.approx(beta, rel=1e-3) if word.any() else None)
            raw = {"a": advantages.raw["A_action"]}
            if turn.is_segment_start:
                raw["o"] = advantages.raw["A_subgoal"]
            if t > 0:
                raw["s"] = advantages.raw["A_switch"]
            expected = {letter: float(values[b, t]) for letter, values in raw.items()}
            assert record["raw"] == pytest.approx(expected, rel=1e-3)
            for i in range(length):
                trained = bool(advantages.token_mask[n, i])
                assert record["trained"][i] == "01"[trained]
                if trained:
                    shade = record["scaled"][record["kinds"][i]]
                    assert shade == pytest.approx(float(advantages.advantages[n, i]), rel=1e-3)
            n += 1


def test_flat_gae_stands_beside_hae(tiny_policy, tiny_tokenizer, episodes):
    """The same V_low, gamma and lambda: in the last segment both are equal, before it only flat
    GAE sees past the boundary."""
    data, old, _ = data_of(tiny_policy, episodes, tiny_tokenizer)
    turns = data["episodes"][2]["turns"]
    rewards = torch.tensor([[turn.reward for turn in episodes[2].turns]])
    v_low = old.v_low[-len(turns) :][None]
    mask = torch.ones_like(rewards, dtype=torch.bool)
    expected, _ = gae(rewards, mask, v_low, gamma=0.9, lam=0.8)
    assert [turn["flat"] for turn in turns] == pytest.approx(expected[0].tolist(), rel=1e-3)
    last = max(t for t, turn in enumerate(turns) if turn["start"])
    assert last > 0
    for t, turn in enumerate(turns):
        assert (turn["flat"] == pytest.approx(turn["raw"]["a"], rel=1e-3)) == (t >= last)


@pytest.mark.parametrize("method, values", [("ppo", True), ("grpo", False)])
def test_baselines_have_one_advantage_and_no_subgoals_value(
    tiny_policy, tiny_tokenizer, episodes, method, values
):
    if not values:
        tiny_policy.value_heads = None
    data, _, _ = data_of(tiny_policy, episodes, tiny_tokenizer, method=method)
    for turn in data["episodes"][0]["turns"]:
        assert len(turn["p"]) == len(turn["tokens"])
        assert ("values" in turn) == ("raw" in turn) == values
        assert "flat" not in turn
        if values:
            assert set(turn["raw"]) == {"all"}
            assert len(turn["values"]) == 1


def test_a_character_of_several_tokens_is_not_lost(tiny_tokenizer):
    ids = [*tiny_tokenizer("é\u4e2d<action>", add_special_tokens=False)["input_ids"], 200]
    assert "".join(token_texts(ids, tiny_tokenizer)) == response_text(ids, tiny_tokenizer)


def hostile_page(tiny_policy, tiny_tokenizer, tmp_path):
    """A page whose world and model write HTML."""
    episode = make_episode(random.Random(0), tiny_tokenizer, 3)
    ids = tiny_tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    turns = [
        replace(
            turn,
            prompt=ids,
            response=ids,
            observation=HOSTILE,
            subgoal=HOSTILE,
            decision=turn.decision._replace(subgoal=HOSTILE, action=HOSTILE, error=HOSTILE),
        )
        for turn in episode.turns
    ]
    episode = replace(episode, task=HOSTILE, task_type=HOSTILE, turns=turns)
    data, *_ = data_of(tiny_policy, [episode], tiny_tokenizer)
    path = tmp_path / "page.html"
    write_page(path, "viewer.html", {"title": f"title {HOSTILE}", "note": HOSTILE, **data})
    return path


def test_nothing_that_a_world_writes_can_end_the_data(tiny_policy, tiny_tokenizer, tmp_path):
    path = hostile_page(tiny_policy, tiny_tokenizer, tmp_path)
    assert shown_data(path)["episodes"][0]["task"] == HOSTILE
    page = path.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2  # the data and our own
    assert "<img" not in page
    script = page.split("<script>")[1]
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in script
    for network in ("http://", "https://", "fetch(", "XMLHttpRequest", "import("):
        assert network not in script.replace("http://www.w3.org/2000/svg", "")


def test_nothing_that_a_world_writes_runs_in_a_browser(tiny_policy, tiny_tokenizer, tmp_path):
    path = hostile_page(tiny_policy, tiny_tokenizer, tmp_path)
    dom = dump_dom(f"{path.as_uri()}#episode=0&turn=2", tmp_path)
    assert "<title>title &lt;/script&gt;" in dom  # not "ran"
    assert "<img" not in dom
    assert dom.count("<script") == 2
    assert dom.count("&lt;img src=x onerror=") > 10  # shown as text, in all places
    assert 'id="turn-2"' in dom


def test_the_browser_shows_the_episode_of_the_link(tiny_policy, tiny_tokenizer, episodes, tmp_path):
    data, *_ = data_of(tiny_policy, episodes, tiny_tokenizer)
    path = tmp_path / "page.html"
    write_page(path, "viewer.html", {"title": "t", "note": "n", **data})
    dom = dump_dom(f"{path.as_uri()}#episode=2&turn=3", tmp_path)
    assert len(re.findall(r'id="turn-\d+"', dom)) == 7
    assert re.search(r'class="turn here" id="turn-3"', dom)
    assert dom.count('class="item ') == 3


def test_keys_filters_and_colours(tiny_policy, tiny_tokenizer, episodes, tmp_path):
    """What a reader does, as events in the browser: the page's state is written into its title."""
    episodes = [replace(e, success=n == 1, task=f"task {n}") for n, e in enumerate(episodes)]
    data, *_ = data_of(tiny_policy, episodes, tiny_tokenizer)
    path = tmp_path / "page.html"
    write_page(path, "viewer.html", {"title": "t", "note": "n", **data})
    reader = """
    const said = [];
    for (const key of ["ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft"]) {
      document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      said.push(location.hash.slice(1));
    }
    const choose = (id, value) => {
      byId(id).value = value;
      for (const type of ["input", "change"]) byId(id).dispatchEvent(new Event(type));
    };
    for (const [id, value] of [["result", "lost"], ["search", "task 2"]]) {
      choose(id, value);
      said.push(document.querySelectorAll(".item").length);
    }
    const colours = () => [...document.querySelectorAll(".said span")]
      .map(span => span.style.background).join();
    for (const how of ["p", "mask"]) {
      const before = colours();
      choose("tint", how);
      said.push(before !== colours());
    }
    choose("search", "");
    choose("result", "");
    byId("lost").click();
    said.push(document.querySelectorAll(".item").length, location.hash.slice(1));
    const buttons = [...document.querySelectorAll(".pointers button")];
    buttons.find(button => button.textContent.startsWith("Largest fall of V_high")).click();
    said.push(location.hash.slice(1));
    document.title = JSON.stringify(said);
    """
    page = re.sub("<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
    page = page.replace("</body>", f"<script>{reader}</script></body>")
    path.write_text(page, encoding="utf-8")
    dom = dump_dom(f"{path.as_uri()}#episode=2&turn=3", tmp_path)
    said = json.loads(re.search("<title>(.*?)</title>", dom)[1].replace("&amp;", "&"))
    values = [turn["values"][0] for turn in data["episodes"][0]["turns"]]
    falls = [before - after for before, after in zip(values, values[1:], strict=False)]
    assert max(falls) > 0
    assert said == [
        *("episode=2&turn=4", "episode=2&turn=5", "episode=2&turn=4", "episode=1&turn=0"),
        *(2, 1, True, True),
        *(2, "episode=0&turn=0", f"episode=0&turn={falls.index(max(falls))}"),
    ]


def test_sixty_four_episodes_are_under_three_megabytes(tiny_policy, tiny_tokenizer, tmp_path):
    """With ALFWorld's lengths: 30 turns, 700 tokens of prompt, most of it the same every turn."""
    rules = "Answer with these three blocks and nothing else. " * 40
    admissible = [f"go to shelf {n}" for n in range(30)]
    rng = random.Random(1)

    def prompt():
        text = f"{rules}\nYou see {rng.random()}\nActions: {rng.sample(admissible, 20)}"
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    one = make_episode(rng, tiny_tokenizer, 30)
    one = replace(one, turns=[replace(turn, prompt=prompt()) for turn in one.turns])
    data, *_ = data_of(tiny_policy, [one], tiny_tokenizer, micro_batch_tokens=4000)  # memory
    assert len(as_json(data)) * 64 < 3e6


def test_what_is_not_finite_is_null():
    assert (
        as_json({"x": [float("nan"), float("inf"), 1.5, "<"]}) == '{"x":[null,null,1.5,"\\u003c"]}'
    )


def test_training_writes_only_the_first_episodes(tiny_policy, tiny_tokenizer, episodes, tmp_path):
    config = plain_config()
    many = episodes * 30
    old, advantages = score_episodes(tiny_policy, many, config, tiny_tokenizer)
    accelerator = SimpleNamespace(is_main_process=True)
    run = SimpleNamespace(config=config, tokenizer=tiny_tokenizer, accelerator=accelerator)
    write_training(tmp_path, 7, run, many, old, advantages)
    data = shown_data(tmp_path / "episodes.html")
    assert len(data["episodes"]) == 64
    assert "iteration 7" in data["title"]
    assert "64 of 90" in data["note"]
    run.accelerator.is_main_process = False
    write_training(tmp_path, 8, run, many, old, advantages)
    assert "iteration 7" in shown_data(tmp_path / "episodes.html")["title"]


def test_a_damaged_critic_is_said_in_one_sentence(tiny_actor, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for content in (b"", b"junk" * 100):
        (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match="damaged"):
            load_policy_with_critic(tiny_actor, plain_config(), tmp_path)
    torch.save(
        {"value_heads.weight": torch.zeros(3, 32)}, tmp_path / "checkpoint/pytorch_model.bin"
    )
    with pytest.raises(ConfigError, match="damaged"):  # a part is missing
        load_policy_with_critic(tiny_actor, plain_config(), tmp_path)


def test_the_critic_of_a_sharded_run_is_read(tiny_policy, tiny_actor, tmp_path, recwarn):
    """FSDP2's checkpoint is a folder of torch.distributed.checkpoint; the actor in it is left."""
    shards = tmp_path / "checkpoint" / "pytorch_model_fsdp_0"
    state = tiny_policy.state_dict()
    other = {name: w + 1 if name.startswith("actor.") else w for name, w in state.items()}
    torch.distributed.checkpoint.save({"model": other}, checkpoint_id=shards, no_dist=True)
    before = {name: w.clone() for name, w in tiny_actor.state_dict().items()}
    recwarn.clear()
    policy, note = load_policy_with_critic(tiny_actor, plain_config(critic="separate"), tmp_path)
    assert not recwarn
    assert "no critic" not in note
    loaded = policy.state_dict()
    assert loaded.keys() == state.keys()
    assert sum(not name.startswith("actor.") for name in state) > 1
    for name, weight in state.items():
        if not name.startswith("actor."):
            assert torch.equal(loaded[name], weight), name
    assert all(torch.equal(w, before[name]) for name, w in tiny_actor.state_dict().items())
    (shards / ".metadata").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="damaged"):
        load_policy_with_critic(tiny_actor, plain_config(critic="separate"), tmp_path)


def test_the_example_agent_opens_with_its_critic(tmp_path):
    """examples/household is complete, plays, and is about 2 MB."""
    page = tmp_path / "page.html"
    evaluation.main([str(EXAMPLE), "--episodes", "4", "--html", str(page)])
    data = shown_data(page)
    assert len(data["episodes"]) == 4
    assert sum(episode["success"] for episode in data["episodes"]) >= 2
    assert all("raw" in turn for turn in data["episodes"][0]["turns"])
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*")) < 2.2e6


def test_evaluation_writes_its_episodes(trained, tmp_path):
    """With the critic of the run's checkpoint; best/ has none, and the page says so."""
    page = tmp_path / "page.html"
    evaluation.main([str(trained.out), "--episodes", "3", "--html", str(page)])
    data = shown_data(page)
    assert len(data["episodes"]) == 3
    assert "unseen" in data["title"]
    assert all("raw" in turn and "values" in turn for turn in data["episodes"][0]["turns"])
    evaluation.main([str(trained.out / "best"), "--episodes", "2", "--html", str(page)])
    data = shown_data(page)
    assert "no critic" in data["note"]
    assert all("p" in turn and "raw" not in turn for turn in data["episodes"][0]["turns"])
    assert "iteration 3" in shown_data(trained.out / "episodes.html")["title"]


def test_evaluation_prints_its_episodes(trained, capsys):
    """With a critic the advantages stand beside the actions; nothing is decided at turn 0."""
    evaluation.main([str(EXAMPLE), "--episodes", "2", "--show", "1"])
    first, table = capsys.readouterr().out.split("\n\n")
    assert first.startswith("task ") and first.count("\ntask ") == 0
    lines = first.splitlines()
    assert "A_subgoal" in lines[1]
    actions = [line for line in lines if line.startswith("     > ")]
    assert ["A_switch" in line for line in actions] == [False] + [True] * (len(actions) - 1)
    assert all("A_action" in line for line in actions)
    assert table.startswith("protocol:")
    evaluation.main([str(trained.out / "best"), "--episodes", "2", "--show", "9"])
    said = capsys.readouterr().out
    assert said.count("task ") == 2 and "A_" not in said


def test_a_negative_number_of_episodes_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([str(EXAMPLE), "--show", "-1"])
    assert stopped.value.code == 2
    assert "--show must be 0 or more" in capsys.readouterr().err


def test_the_page_says_of_each_turn_what_happened(tiny_policy, tiny_tokenizer):
    episodes = [
        replace(episode, index=40 + n, task=f"task {n}", task_score=0.25)
        for n, episode in enumerate(make_episodes(tiny_tokenizer))
    ]
    data, _, advantages = data_of(tiny_policy, episodes, tiny_tokenizer)
    n = 0
    for episode, shown in zip(episodes, data["episodes"], strict=True):
        for ours, theirs in {"type": "task_type", "score": "task_score"}.items():
            assert shown[ours] == getattr(episode, theirs)
        assert (shown["index"], shown["truncated"]) == (episode.index, episode.truncated)
        for turn, record in zip(episode.turns, shown["turns"], strict=True):
            decision = turn.decision
            assert "\n".join(data["texts"][i] for i in record["observation"]) == turn.observation
            assert (record["switch"], record["start"]) == (decision.switch, turn.is_segment_start)
            assert (record["subgoal"], record["action"]) == (turn.subgoal, decision.action)
            assert record["error"] == decision.error
            assert record["reward"] == pytest.approx(turn.reward)
            length = len(turn.response)
            masks = decision_masks([turn.response], [length], tiny_tokenizer)
            letters = ["."] * length
            for letter, [mask] in zip("soa", masks, strict=True):
                letters = [letter if on else old for on, old in zip(mask, letters, strict=True)]
            assert record["kinds"] == "".join(letters)
            trained = advantages.token_mask[n, :length]
            of_trained = {letter for letter, on in zip(letters, trained, strict=True) if on}
            assert set(record["scaled"]) == of_trained
            n += 1


def test_flat_gae_ends_as_hae_does(tiny_policy, tiny_tokenizer):
    """Also where the step limit ended the episode and the last state is valued."""
    episodes = make_episodes(tiny_tokenizer)
    assert any(episode.truncated for episode in episodes)
    data, *_ = data_of(tiny_policy, episodes, tiny_tokenizer, bootstrap=True)
    for shown in data["episodes"]:
        last = shown["turns"][-1]
        assert last["flat"] == pytest.approx(last["raw"]["a"], rel=1e-3)


def test_only_a_valid_answer_drifts(tiny_policy, tiny_tokenizer):
    episode = make_episodes(tiny_tokenizer, lengths=(3,))[0]
    _, turn, _ = episode.turns
    kept = turn.decision._replace(switch=False, subgoal="b", valid=True)
    turns = [
        replace(turn, subgoal="a", decision=kept),
        replace(turn, subgoal="b", decision=kept),
        replace(turn, subgoal="a", decision=kept._replace(valid=False)),
    ]
    data, *_ = data_of(tiny_policy, [replace(episode, turns=turns)], tiny_tokenizer)
    assert [turn["drift"] for turn in data["episodes"][0]["turns"]] == [True, False, False]


def test_a_kept_none_is_no_drift_on_the_page(tiny_policy, tiny_tokenizer):
    """As in `AgentState._shaped_reward`: the prompt shows None where nothing is carried."""
    episode = make_episodes(tiny_tokenizer, lengths=(2,))[0]
    first, turn = episode.turns
    kept = turn.decision._replace(switch=False, subgoal="None", valid=True)
    episode = replace(episode, turns=[first, replace(turn, subgoal="", decision=kept)])
    data, *_ = data_of(tiny_policy, [episode], tiny_tokenizer)
    assert not data["episodes"][0]["turns"][1]["drift"]


def test_what_is_printed_is_what_the_page_has(tmp_path, capsys):
    """Each episode with its own advantages."""
    page = tmp_path / "page.html"
    words = [str(EXAMPLE), "--episodes", "3", "--show", "3", "--html", str(page)]
    evaluation.main(words)
    printed = re.findall(r"^task (\d+)(.*?)\n\n", capsys.readouterr().out, re.S | re.M)
    shown = shown_data(page)["episodes"]
    assert [int(index) for index, _ in printed] == [episode["index"] for episode in shown]
    for (_, text), episode in zip(printed, shown, strict=True):
        numbers = [float(number) for number in re.findall(r"A_action (\S+)", text)]
        assert numbers == pytest.approx([turn["raw"]["a"] for turn in episode["turns"]], abs=0.01)


def test_episodes_are_shown_in_the_order_of_their_tasks(
    tiny_actor, tiny_tokenizer, capsys, monkeypatch
):
    """In whatever order they were played."""
    monkeypatch.setattr(viewer, "gather_object", lambda played: played)
    played = [
        replace(episode, index=index)
        for episode, index in zip(make_episodes(tiny_tokenizer), (5, 2, 9, 0, 7, 3), strict=True)
    ]
    args = SimpleNamespace(html=None, show=3, split=None, model="x")
    accelerator = SimpleNamespace(is_main_process=True)
    viewer.show_episodes(args, played, tiny_actor, plain_config(), tiny_tokenizer, accelerator)
    assert re.findall(r"^task (\d+)", capsys.readouterr().out, re.M) == ["0", "2", "3"]
