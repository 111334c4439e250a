"""WebShop: the search and the engine on small catalogues made here, the world on the made-up one, all of it on the real data.

Real data and replays of the original engine need WEBSHOP_DATA, most tests need rapidfuzz; they are skipped without them."""

import doctest
import importlib.util
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import envs
from worlds import webshop_engine as webshop
from worlds import webshop as webshop_env
from worlds import webshop_search
from test_envs import check_world
from worlds.webshop_engine import Catalogue, WebShop
from worlds.webshop_search import Index, stored_length

DATA = os.environ.get("WEBSHOP_DATA", "")
needs_rapidfuzz = pytest.mark.skipif(
    not importlib.util.find_spec("rapidfuzz"), reason="rapidfuzz is not installed"
)
needs_data = pytest.mark.skipif(not DATA, reason="WEBSHOP_DATA is not set")


@pytest.fixture(
    params=[
        pytest.param("made up", marks=needs_rapidfuzz),
        pytest.param("real", marks=[needs_rapidfuzz, needs_data]),
    ]
)
def world(request, monkeypatch):
    """webshop_env without and with data."""
    monkeypatch.setenv("WEBSHOP_DATA", DATA if request.param == "real" else "")
    return webshop_env


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")
    return Catalogue.load(DATA)


def item(asin, name, options=None, price="$12.5", **more):
    """One product in the form of the products file."""
    return {
        "asin": asin,
        "name": name,
        "full_description": "",
        "small_description": ["one", "two"],
        "category": "garden",
        "query": "q " + asin,
        "product_category": asin,
        "pricing": price,
        "customization_options": {
            k: [{"value": v} for v in vs] for k, vs in (options or {}).items()
        },
        **more,
    }


CHAIR = item(
    "B000000001",
    "Oak Chair",
    {"Color": ["Red", "Dark Blue "], "Size": ["S/M", "L"]},
    full_description="Made of Solid Wood.",
)
ASKS = {
    "B000000001": {
        "attributes": ["easy clean"],
        "instruction": "Find me chairs",
        "instruction_attributes": ["easy clean"],
    }
}


@pytest.fixture
def shop():
    """The chair and eleven stools; the goal is the chair, dark blue and large."""
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")
    return WebShop(
        Catalogue(
            [CHAIR] + [item(f"B{n:09d}", f"Stool Number {n}", price="") for n in range(2, 13)], ASKS
        )
    )


def goal_of(shop, **changes):
    return {**shop.catalogue.goals[3], **changes}


# ---- search -----------------------------------------------------------------------------------------------------------------


def test_docstrings_of_the_search():
    assert doctest.testmod(webshop_search).failed == 0


@pytest.mark.parametrize(
    "text, terms",
    [
        ("The Men's T-Shirts, and USB-C", "men t shirt usb c"),
        ("1,000.50 e.g. 3.5oz 5'6\" us:9 color:blue 9.", "1,000.50 e.g 3.5oz 5'6 us 9 color:blu 9"),
        ("a_b _ __ l'eau women\u2019s \u300csofa\u300d", "a_b l'eau women sofa"),
        (
            "\u2764\u2764\ufe0f \u2605 \u263a\u200d\u2600x \u00bd\u2122\u00b2",
            "\u2764 \u2764\ufe0f \u2605 \u263a\u200d\u2600 x",
        ),
        ("\u6c99\u53d1 caf\u00e9 cafe\u0301", "\u6c99 \u53d1 caf\u00e9 cafe\u0301"),
        ("is as it", ""),
        ("", ""),
    ],
)
def test_terms(text, terms):
    assert Index([]).terms(text) == terms.split()


PORTER = """caresses caress, ponies poni, ties ti, feed feed, agreed agre, plastered plaster, bled bled, sing sing, conflated conflat,
troubled troubl, sized size, hopping hop, falling fall, failing fail, filing file, happy happi, sky sky, conditional condit, digitizer
digit, vietnamization vietnam, hopefulness hope, sensibility sensibl, triplicate triplic, formative form, goodness good, adjustable adjust,
replacement replac, adoption adopt, effective effect, rate rate, cease ceas, controll control, roll roll, assembly assembl, as as"""


def test_stemmer():
    """Examples of Porter's paper, and two words that the later version stems in another way."""
    for word, stem in map(str.split, PORTER.split(",")):
        assert webshop_search.stem(word) == stem


def test_ranking_against_the_formula():
    """The formula of the docstring in float64, one document after the other."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(rng.choices(words, k=rng.choice([0, 3, 20, 40, 90, 200]))) for _ in range(80)]
    index, counts = Index(texts), [Counter(text.split()) for text in texts]
    mean = sum(sum(count.values()) for count in counts) / sum(bool(count) for count in counts)
    for _ in range(30):
        query = rng.choices([*words, "unknown"], k=rng.randint(1, 6))
        scores = [0.0] * len(texts)
        for term in query:
            n = sum(term in count for count in counts)
            for d, count in enumerate(counts):
                norm = 0.9 * (0.6 + 0.4 * stored_length(sum(count.values())) / mean)
                scores[d] += (
                    math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
                    * count[term]
                    / (count[term] + norm)
                )
        found = index.search(" ".join(query))
        assert len(found) == min(50, sum(score > 0 for score in scores))
        assert np.allclose(
            [scores[d] for d in found], sorted(scores, reverse=True)[: len(found)], atol=1e-5
        )


def test_ties_keep_the_order_and_nothing_is_nothing():
    index = Index(["red", "blue", "red", "Red!"])
    assert (
        index.search("REDS") == (0, 2, 3) and index.search("the green ?") == index.search("") == ()
    )
    assert Index([]).search("red") == Index(["", "the"]).search("red") == ()


# ---- the engine ---------------------------------------------------------------------------------------------------------------

TASK = "Find me chairs with color: dark blue, and size: l, and price lower than "


def test_pages(shop):
    goal = goal_of(shop)
    start = f"Instruction: [SEP] {goal['instruction']} [SEP] "
    assert shop.reset(goal) == f"WebShop [SEP] {start}Search" and shop.clickables == ["search"]
    page, score, done = shop.step("search[STOOL Number 2]")
    assert page.startswith(
        start
        + "Back to Search [SEP] Page 1 (Total results: 11) [SEP] Next > [SEP] B000000002 [SEP] Stool Number 2 "
        "[SEP] $100.0 [SEP] "
    ) and (score, done) == (0.0, False)
    assert (
        shop.clickables[:3] == ["back to search", "next >", "b000000002"]
        and len(shop.clickables) == 12
    )
    page = shop.step("click[Next >]")[0]
    assert (
        "Page 2 (Total results: 11) [SEP] < Prev [SEP] Next > [SEP] B0" in page
        and len(shop.clickables) == 4
    )
    assert shop.step("click[next >]")[0].endswith(
        "Page 3 (Total results: 11) [SEP] < Prev [SEP] Next >"
    )
    assert shop.step("click[< prev]")[0] == page
    assert shop.step("search[oak]")[0] == start + (
        "Back to Search [SEP] Page 1 (Total results: 1) [SEP] Next > [SEP] B000000001 [SEP] "
        "Oak Chair [SEP] $12.5"
    )
    chair = start + (
        "Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] dark blue [SEP] size [SEP] s | m [SEP] l [SEP] Oak Chair [SEP] "
        "Price: $12.5 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    assert shop.step("click[b000000001]")[0] == chair == shop.step("click[Dark Blue]")[0]
    assert shop.clickables == [
        "back to search",
        "< prev",
        "description",
        "features",
        "reviews",
        "buy now",
        "red",
        "dark blue",
        "s | m",
        "l",
    ]
    for name, text in {
        "Description": "Made of Solid Wood.",
        "features": "one [SEP] two",
        "reviews": "No reviews found",
    }.items():
        assert shop.step(f"click[{name}]")[0] == start + "Back to Search [SEP] < Prev [SEP] " + text
        assert (
            shop.clickables == ["back to search", "< prev"]
            and shop.step("click[< prev]")[0] == chair
        )
    assert shop.options == {"color": "dark blue"}  # still
    shop.step("click[red]")
    assert shop.options == {"color": "red"}
    assert "Page 1 (" in shop.step("click[< prev]")[0] and shop.options == {}
    assert shop.step("click[back to search]")[0] == f"WebShop [SEP] {start}Search"


def test_inadmissible_actions_change_nothing(shop):
    page = shop.reset(goal_of(shop))
    for action in (
        "",
        "click[search]",
        "click[buy now]",
        "click[B000000001]",
        "search",
        "search[]",
        "Search[oak]",
        " search[oak]",
        "buy",
        "search[a\nb]",
        "look [search[oak]]",
    ):
        assert shop.step(action) == (page, 0.0, False)


def test_buying(shop):
    with pytest.raises(RuntimeError, match="call reset"):
        shop.step("search[oak]")
    shop.reset(goal_of(shop, attributes=["waterproof"]))
    for action in ("search[oak chair]", "click[B000000001]", "click[dark blue]", "click[l]"):
        assert shop.step(action)[1:] == (0.0, False)
    assert shop.step("click[Buy Now]") == ("Your score: 0.75", 0.75, True) and shop.clickables == []
    with pytest.raises(RuntimeError, match="call reset"):
        shop.step("search[oak]")
    assert "WebShop" in shop.reset(goal_of(shop)) and shop.score == 0.0
    with pytest.raises(ValueError, match="product 'B9' is not in this catalogue"):
        shop.reset(goal_of(shop, asin="B9"))


def test_goals_of_a_product(shop):
    goals = shop.catalogue.goals
    assert [tuple(goal["options"].values()) for goal in goals] == [
        *itertools.product(["red", "dark blue"], ["s | m", "l"])
    ]
    limits = {goal["price_upper"] for goal in goals}
    assert len(limits) == 1 and limits <= {30.0, 40.0, 50.0}  # the larger of two of 20, 30, 40, 50
    assert goals[3]["instruction"] == TASK + f"{limits.pop():.2f} dollars" and goals[3][
        "attributes"
    ] == ["easy clean"]
    dear = Catalogue(
        [{**CHAIR, "pricing": "$1,985.00 to $1,990", "customization_options": ""}] * 2, ASKS
    )
    assert [goal["instruction"] for goal in dear.goals] == ["Find me chairs"] and dear.order[
        0
    ].hit.endswith("$1985.0 to $1990.0")
    assert 1985 < dear.prices["B000000001"] < 1990
    assert Catalogue([{**CHAIR, "asin": "nan"}, {**CHAIR, "asin": "B0000000001"}], ASKS).goals == []


@needs_rapidfuzz
@pytest.mark.parametrize(
    "changes, bought, options, score",
    [
        ({}, {}, {"c": "red", "s": "l"}, 1.0),
        ({}, {}, {"s": "l"}, 0.8),  # one of two options
        ({}, {}, {}, 0.6),
        ({}, {"pricing": "$31"}, {"c": "red", "s": "l"}, 0.8),  # too dear
        (
            {},
            {"attributes": ["solid wood legs"]},
            {"c": "red", "s": "l"},
            0.8,
        ),  # one of two attributes
        (
            {"attributes": ["made of oak", "two"]},
            {"full_description": "It is MADE OF OAK."},
            {"c": "red", "s": "l"},
            1.0,
        ),  # from texts
        (
            {"attributes": ["cleanly easy", "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9wood, solid"]},
            {},
            {"c": "red", "s": "l"},
            1.0,
        ),  # alike
        (
            {"attributes": ["two", "a" * 23 + "bbbb"]},
            {"attributes": ["a" * 23 + "cccc"]},
            {"c": "red", "s": "l"},
            0.8,
        ),  # 85.2: not enough
        (
            {"options": {"c": "dark red"}},
            {},
            {"c": "rose red"},
            1.0,
        ),  # what was chosen is a colour only
        (
            {"options": {"c": "rectangular"}},
            {},
            {"c": "rectangular"},
            0.75,
        ),  # the quirk: it contains "tan"
        ({"options": {"c": "tan"}}, {}, {"c": "rectangular"}, 1.0),  # and its other side
        ({"options": ["red"]}, {}, {"c": "cherry red"}, 1.0),  # options without names
        (
            {},
            {"name": "oak chair", "query": "x", "product_category": "z"},
            {"c": "red", "s": "l"},
            1.0,
        ),  # a third of the nouns
        ({}, {"name": "sofa"}, {"c": "red", "s": "l"}, 0.0),  # another type
        ({}, {"name": "a metal chair"}, {"c": "red", "s": "l"}, 1.0),  # a sixth of the nouns ...
        (
            {},
            {"name": "a metal chair", "query": "x", "product_category": "a \u203a d"},
            {"c": "red", "s": "l"},
            0.5,
        ),
        (
            {},
            {"name": "a metal chair", "query": "x", "product_category": "c \u203a d \u203a b"},
            {"c": "red", "s": "l"},
            1.0,
        ),
    ],
)
def test_score(changes, bought, options, score):
    wanted = item(
        "B000000001",
        "The Oak Rocker of Five Old Chair",
        query="chairs",
        product_category="a \u203a b \u203a c",
    )
    other = {**wanted, "asin": "B000000002", **bought}
    attributes = {"attributes": bought.get("attributes", ["easy clean", "solid wood"])}
    shop = Catalogue(
        [wanted, other], {"B000000002": attributes}, nouns=lambda title: title.lower().split()[-6:]
    )
    goal = {
        "asin": "B000000001",
        "instruction": "",
        "attributes": ["easy clean", "solid wood"],
        "options": {"c": "red", "s": "l"},
        "price_upper": 30.0,
        **changes,
    }
    assert shop.score(goal, "B000000002", options) == pytest.approx(score)


@needs_rapidfuzz
def test_type_of_hardly_related_titles():
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda"
    shop = Catalogue(
        [
            item("B1", words),
            item("B2", "Alpha and the 2 of a"),
            item("B3", "and 5"),
            item("B4", words[:11]),
        ],
        {},
    )
    goal = {"asin": "B1", "attributes": ["one"], "options": {}, "price_upper": 20.0}
    assert [shop.score(goal, asin, {}) for asin in ("B1", "B2", "B3", "B4")] == [1.0, 0.1, 0.0, 0.5]
    assert (
        shop.score({**goal, "asin": "B3"}, "B1", {}) == 0.5
    )  # a title without nouns counts as 0.2
    assert webshop.title_words("The Men's TV, 2 for the Home") == ["men", "tv", "home"]


# ---- errors ---------------------------------------------------------------------------------------------------------------------


def test_bad_data(tmp_path):
    with pytest.raises(
        RuntimeError,
        match="there is no folder .*nowhere: set WEBSHOP_DATA to the one that holds items_shuffle_1000.json",
    ):
        Catalogue.load(tmp_path / "nowhere")
    with pytest.raises(
        RuntimeError,
        match="has no items_shuffle_1000.json: WebShop needs items_shuffle_1000.json and items_ins_v2_1000",
    ):
        Catalogue.load(tmp_path)
    (tmp_path / "items_shuffle.json").write_text("[]")
    with pytest.raises(RuntimeError, match="has no items_ins_v2.json"):
        Catalogue.load(tmp_path)
    (tmp_path / "items_ins_v2.json").write_text("[")
    with pytest.raises(RuntimeError, match="items_ins_v2.json is not a JSON file"):
        Catalogue.load(tmp_path)


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(
        RuntimeError,
        match="package rapidfuzz, which is not installed: pip install -r requirements-webshop.txt",
    ):
        Catalogue([], {})


# ---- the world ------------------------------------------------------------------------------------------------------------------


def test_keeps_the_contract(world):
    check_world("webshop", tasks=6)


def test_splits(world):
    goals = {
        split: [(goal["asin"], *goal["options"].items()) for goal in world.goals(split)]
        for split in world.SPLITS
    }
    assert len(goals["test"]) == 500 and not set(goals["test"]) & set(goals["train"])
    assert len(set(goals["train"])) > 700 and world.size("train") == len(goals["train"])
    assert world.make("test", 3).shop.catalogue is world.make("train", 9).shop.catalogue


def test_overlap_of_shuffles_per_worker():
    assert (
        webshop_env.overlap(1, 1000) == pytest.approx(0.5, abs=0.1)
        and webshop_env.overlap(128) == 1.0
    )
    assert 0.9 < webshop_env.overlap(1) < 0.96


def test_observation_and_info(world):
    env = world.make("test", 0)
    observation, info = env.reset()
    assert observation == "Search" and info["admissible"] == [
        "search[<your query>]",
        "click[search]",
    ]
    assert info["task"] == env.goal["instruction"] and info["task_type"] in {
        "beauty",
        "electronics",
        "fashion",
        "garden",
        "grocery",
    }
    observation, reward, terminated, truncated, info = env.step("search[a table]")
    assert observation.startswith("Back to Search [SEP] Page 1") and info["admissible"][:2] == [
        "click[back to search]",
        "click[next >]",
    ]
    env.step(info["admissible"][2])
    observation, reward, terminated, truncated, info = env.step("click[buy now]")
    assert (
        terminated
        and not truncated
        and info["won"] == (info["score"] == 1.0) == (reward == 1.0)
        and info["admissible"] == []
    )
    short = world.make("test", 0, max_steps=1)
    short.reset()
    assert short.step("click[search]")[1:4] == (0.0, False, True)


def test_the_expert_keeps_his_subgoals_and_comes_back(world):
    """He wins whatever else he is made to do first, and follows find, open, choose, buy."""
    rng, seen = random.Random(0), set()
    for index in range(0, 200, 5):
        env = world.make("train", index, max_steps=99)
        info = env.reset()[1]
        if env.expert("") is None:
            assert not env.winnable
            continue
        for _ in range(rng.choice([0, 3, 12])):
            info = env.step(
                rng.choice(
                    [a for a in info["admissible"] if a != "click[buy now]"] + ["search[red shoes]"]
                )
            )[-1]
        told, subgoal = [], ""
        while not env.done:
            switch, subgoal, action = env.expert(subgoal)
            told += [subgoal] if switch else []
            assert "price" not in action
            seen.add((subgoal, switch))
            info = env.step(action)[-1]
        assert info["won"] and env.steps < 30 and told[-1] == "buy" and env.expert("buy") is None
        assert [s for s, _ in itertools.groupby(told)] == told
    assert {("find product", False), ("open product", True), ("buy", True)} <= seen


def test_the_expert_follows_whatever_subgoal_one_could_have(world):
    """Options in any order, in the page's order by himself; `buy` too early buys, and does not win."""
    env = next(
        env
        for env in (world.make("train", index) for index in range(200))
        if len(env._options) >= 2 and env.winnable
    )
    env.reset()
    subgoal = ""
    assert env.reset()[1]["subgoals"] == ["find product"]
    while subgoal != "open product":
        _, subgoal, action = env.expert(subgoal)
        info = env.step(action)[-1]
    *choices, buy = info["subgoals"]
    order = list(env.product.options)
    assert buy == "buy" and choices == [
        f"choose {env._options[o]}" for o in sorted(env._options, key=order.index)
    ]
    parts = 1 + len(choices)
    assert info["progress"] == 1 / parts
    switch, subgoal, action = env.expert(choices[1])
    assert (switch, subgoal, action) == (
        False,
        choices[1],
        f"click[{choices[1].removeprefix('choose ')}]",
    )
    env.step("click[Features]")
    assert env.expert(choices[1]) == (False, choices[1], "click[< Prev]")
    env.step("click[< Prev]")
    assert env.step(action)[-1]["progress"] == 2 / parts
    assert env.expert(choices[1])[:2] == (True, choices[0]) and env.expert("buy") == (
        False,
        "buy",
        "click[Buy Now]",
    )
    assert not env.step("click[Buy Now]")[-1]["won"] and env.expert("buy") is None


def test_the_expert_asks_for_as_little_as_finds_the_product(world, monkeypatch):
    """What it is called and the values; the instruction without its price; its name."""
    env = next(
        env
        for env in (world.make("train", index) for index in range(200))
        if env._options and "price" in env.goal["instruction"]
    )
    env.reset()
    short = " ".join([env.product.query, *env.goal["options"].values()])
    whole = env.goal["instruction"].removeprefix("Find me ").partition(", and price lower than")[0]
    for found, query in (({short, whole}, short), ({whole}, whole), (set(), env.product.name)):
        monkeypatch.setattr(
            env.shop.catalogue.index, "search", lambda asked: [env._number] * (asked in found)
        )
        env.__dict__.pop("_query", None)
        assert env.expert("")[2] == f"search[{query}]"


def test_the_page_sums_up_what_the_shop_shows(world):
    """Products by number and first words; of options not yet chosen what is asked for, then what was chosen, right or wrong."""
    env = next(
        env
        for env in (world.make("train", index) for index in range(200))
        if len(env._options) >= 2 and env.winnable
    )
    told = lambda: env._info()["page"]
    assert env.reset()[1]["page"] == "Search."
    env.step(env.expert("")[2])
    hits = re.findall(r"B[0-9A-Z]{9}(?= )", told())
    assert told().startswith("Results 1: ") and [f"click[{asin.lower()}]" for asin in hits] == [
        a.lower() for a in env._info()["admissible"][-len(hits) :]
    ]
    while env.shop.asin != env.product.asin:
        env.step(env.expert("")[2])
    values = list(env._options.values())
    title = f"Product {env.product.asin} {' '.join(re.findall('[a-z]+', env.product.name.lower())[:5])}."
    assert told() == f"{title} Options: {', '.join(values)}. Chosen: none."
    env.step(f"click[{values[0]}]")
    assert told() == f"{title} Options: {', '.join(values[1:])}. Chosen: {values[0]}."
    wrong = next(
        (v for v in env.product.options[env.product.links[values[0]]] if v != values[0]), values[0]
    )
    env.step(f"click[{wrong}]")
    assert told() == f"{title} Options: {', '.join(values[1:])}. Chosen: {wrong}."
    env.step("click[Features]")
    assert told().startswith(f"Features of {env.product.asin} ")


@needs_rapidfuzz
def test_the_made_up_catalogue(monkeypatch, capsys):
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    webshop_env._load.cache_clear()
    envs.make("webshop")
    assert (
        capsys.readouterr().err
        == "WEBSHOP_DATA is not set: a made-up catalogue stands in for WebShop's products.\n"
    )
    envs.make("webshop", "test", 1)
    assert capsys.readouterr().err == ""  # once
    assert webshop_env.made_up() == webshop_env.made_up() != webshop_env.made_up(seed=1)
    catalogue = Catalogue(*webshop_env.made_up())
    wins = [catalogue.score(goal, goal["asin"], goal["options"]) for goal in catalogue.goals]
    assert (
        np.mean(np.array(wins) == 1.0) > 0.9
        and len({product.category for product in catalogue.order}) == 5
    )


# ---- the real data ------------------------------------------------------------------------------------------------------------


@needs_data
def test_the_made_up_catalogue_has_the_real_form():
    for name, mine in zip(webshop.FILES[0], webshop_env.made_up(50)):
        theirs = json.loads((Path(DATA) / name).read_text())
        assert type(mine) is type(theirs)
        mine, theirs = (list(x.values()) if isinstance(x, dict) else x for x in (mine, theirs))
        for key in set().union(*mine, *theirs) - {"model"}:
            assert {type(x[key]) for x in mine} <= {type(x[key]) for x in theirs if key in x}


@pytest.mark.skipif(
    not (Path(DATA) / "replays.jsonl").is_file(), reason="WEBSHOP_DATA has no replays.jsonl"
)
@needs_data
def test_replays_of_the_original(real):
    """Every observation, Lucene's pages of results among them, every score and end: 200 sessions, each won."""
    shop = WebShop(real)
    for replay in map(json.loads, (Path(DATA) / "replays.jsonl").read_text().splitlines()):
        assert shop.reset(replay["goal"]) == replay["reset"]
        for step in replay["steps"]:
            observation, score, done = shop.step(step["action"])
            assert (score, done) == (step["reward"], step["done"])
            assert observation == step["observation"] or done and step["observation"] is None
        assert done and score == replay["reward"] == 1.0


@needs_data
def test_goals_and_their_ceiling(real):
    """6910 goals, of which 6.6 % cannot be won by buying the very product with the very options (colour names in other words)."""
    assert len(real.goals) == 6910 and len({goal["instruction"] for goal in real.goals}) > 6800
    lost = [goal for goal in real.goals if real.score(goal, goal["asin"], goal["options"]) < 1.0]
    assert len(lost) == 458
    quirk = lambda value: any(name in value and name != value for name in webshop.COLOURS)
    assert all(any(map(quirk, goal["options"].values())) for goal in lost)
