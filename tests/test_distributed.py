"""Two processes (gloo, CPU) make the update that one makes: under DDP, and with sharded weights.

The processes run tests/distributed_worker.py once per kind and do everything there, since each
start takes seconds.
"""

import importlib.util
import os
import pickle
import random
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from config import ConfigError
from conftest import tiny_config
from distributed_worker import play
from script_tools import (
    LAUNCHERS,
    ROOT,
    actor_of,
    assert_same_run,
    flags,
    metrics_of,
    saved_iteration,
    tree,
    two_processes,
)
from support import cloning, distributed
from support.check_config import check_sharding
from support.generation import generate
from support.loading import make_optimizer
from support.viewer import load_policy_with_critic
from update_tools import assert_close, make_episodes, same, sharded_accelerator, steady

# One iteration in each of these ways. `backbone` is ActorCritic's critic.
WAYS = {
    "hiper": dict(backbone="separate"),
    "closed form": dict(
        backbone="separate",
        switch_advantage="closed_form",
        value_target="td0",
        bootstrap=True,
        micro_batch_tokens=100,
    ),
    "clipped, checkpointing": dict(
        backbone="separate",
        max_grad_norm=0.01,
        micro_batch_tokens=100,
        gradient_checkpointing=True,
    ),
    "warm-up": dict(backbone="separate", critic_warmup=1, micro_batch_tokens=1),
    "warm-up, shared": dict(backbone="shared", critic_warmup=1, micro_batch_tokens=100),
    "ppo, shared": dict(
        backbone="shared", critic="shared", method="ppo", prompt="flat", micro_batch_tokens=100
    ),
    "grpo": dict(backbone="none", method="grpo", group_size=2, episodes=8, micro_batch_tokens=100),
    "a process without rows": dict(
        backbone="separate",
        alone=True,
        micro_batch_tokens=100,
        lr=0.1,
        critic_lr=0.1,
        max_grad_norm=1.0,
    ),
}
if importlib.util.find_spec("peft"):
    WAYS["lora"] = dict(backbone="lora", micro_batch_tokens=100)
LENGTHS = (9, 1, 4, 2, 6, 3, 1, 2)


@pytest.fixture(scope="module")
def given(tiny_tokenizer):
    """What the processes get: two layers, tied embeddings, eight ragged episodes."""
    torch.manual_seed(0)
    actor = cloning.tiny_model(tiny_tokenizer, hidden=32, layers=2).eval()
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    episodes = make_episodes(tiny_tokenizer, lengths=LENGTHS)
    rng = random.Random(0)  # as in train.draw_tasks
    tasks = [rng.randrange(len(episodes)) for _ in range(6)]
    alone = next(task for task in tasks if task not in tasks[1::2] and LENGTHS[task] > 1)
    others = {tuple(turn.response) for task in tasks[1::2] for turn in episodes[task].turns}
    own = {tuple(turn.response) for turn in episodes[alone].turns}
    assert own - others
    return {
        "actor": actor,
        "tokenizer": tiny_tokenizer,
        "episodes": episodes,
        "ways": WAYS,
        "alone": own - others,  # responses that the second process does not have
        "prompts": [turn.prompt for turn in episodes[0].turns[:3]],
    }


def run_workers(folder, given, kind):
    (folder / "given.pkl").write_bytes(pickle.dumps(given))
    done = two_processes(ROOT / "tests" / "distributed_worker.py", folder, kind, timeout=900)
    assert done.code == 0, done.err[-4000:]
    answers = [pickle.loads((folder / f"{kind}.{rank}.pkl").read_bytes()) for rank in range(2)]
    return SimpleNamespace(folder=folder, ranks=answers, said=done.out + done.err)


@pytest.fixture(scope="module")
def ddp(given, tmp_path_factory):
    return run_workers(tmp_path_factory.mktemp("ddp"), given, "ddp")


@pytest.fixture(scope="module")
def fsdp(given, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    shutil.copytree(trained.out / "start", folder / "run" / "start")
    return run_workers(folder, given, "fsdp")


@pytest.fixture(scope="module")
def one_process(given):
    accelerator = Accelerator(cpu=True)
    return {name: play(given, way, accelerator) for name, way in WAYS.items()}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_make_the_step_of_one(request, given, one_process, kind, name):
    """Uneven numbers of micro-batches, the same gradient, clip, weights and metrics."""
    if (kind, name) == ("fsdp", "lora"):
        pytest.skip("refused: tests/test_lora.py")
    ranks = request.getfixturevalue(kind).ranks
    metrics, after, parts = one_process[name]
    before = given["actor"].state_dict()
    if name == "lora":
        moved = all(after[n].any() for n in after if "lora_B" in n)
    else:
        moved = any(
            not torch.equal(after[f"actor.{n}"], before[n]) for n in before if "lm" not in n
        )
    assert moved == ("warm-up" not in name)
    for answers in ranks:
        their_metrics, weights, _ = answers[name]
        assert_close(weights, after)
        assert steady(their_metrics) == pytest.approx(steady(metrics), abs=1e-4)
    assert same(ranks[0][name][1], ranks[1][name][1])
    counts = [answers[name][2] for answers in ranks]
    if WAYS[name].get("micro_batch_tokens") and name != "grpo":
        assert counts[0] != counts[1]
    if name == "a process without rows":
        assert len(parts) == 2
        assert counts[1][1] == 0 < counts[0][1]


def test_a_nan_gradient_of_one_process_is_a_step_that_both_leave_out(given, ddp):
    before = given["actor"].state_dict()
    for answers in ddp.ranks:
        metrics, weights, _ = answers["nan"]
        assert metrics["skipped_steps"] == 1 and metrics["policy_loss"] is None
        assert all(torch.equal(weights[f"actor.{n}"], before[n]) for n in before if "lm" not in n)
    assert same(ddp.ranks[0]["nan"][1], ddp.ranks[1]["nan"][1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bfloat16(request, kind):
    """Float32 weights and value heads, a bfloat16 reference, whose KL is 0 at the start."""
    for answers in request.getfixturevalue(kind).ranks:
        got = answers["bfloat16"]
        assert got["dtypes"] == {
            "heads": torch.float32,
            "residual stream": torch.float32,
            "values": torch.float32,
            "weights": torch.float32,
            "reference": torch.bfloat16,
        }
        assert got["metrics"]["kl_to_reference"] == 0.0
        assert got["metrics"]["clip_fraction"] == 0.0
        assert got["moved"]
        assert got["responses"]
        # two layers each in actor and critic, the value heads, the rest
        assert got["units"] == (0 if kind == "ddp" else 6)


def test_each_process_generates_at_its_own_pace_with_whole_weights(given, fsdp):
    for rank, steps in ((0, 9), (1, 3)):
        got = fsdp.ranks[rank]["generated"]
        assert got["sharded"] == (False, True)  # the root keeps its weights after a first pass
        assert got["tied"]
        wanted = generate(
            given["actor"],
            given["tokenizer"],
            given["prompts"],
            temperature=0.0,
            max_new_tokens=steps,
            tag="<never>",
        )
        assert got["responses"] == wanted


def test_a_sharded_checkpoint_is_the_same_to_the_last_bit(fsdp):
    for answers in fsdp.ranks:
        got = answers["checkpoint"]
        assert got["loaded"] == (1, got["log"])
        assert same(got["again"], got["saved"])
        assert same(got["again_moments"], got["saved_moments"])
        assert got["saved_moments"]
        assert same(got["ended_again"], got["ended"])
        assert not same(got["start"], got["saved"])
        assert not same(got["saved"], got["ended"])
    saved = fsdp.ranks[0]["checkpoint"]["saved"]
    config = tiny_config(critic="separate")
    actor = AutoModelForCausalLM.from_pretrained(fsdp.folder / "saved" / "actor")
    shown, _ = load_policy_with_critic(actor, config, fsdp.folder / "saved")
    critic = {name: w for name, w in shown.state_dict().items() if not name.startswith("actor.")}
    assert "value_heads.weight" in critic
    assert all(torch.equal(w, saved[name]) for name, w in critic.items())
    for folder in ("actor", "best"):
        actor = actor_of(fsdp.folder / "saved", folder)
        whole = {name.removeprefix("actor."): w for name, w in saved.items() if "actor." in name}
        assert all(torch.equal(actor[name], whole[name]) for name in whole)
        assert torch.equal(actor["lm_head.weight"], whole["model.embed_tokens.weight"])


def test_a_sharded_run_goes_on_as_if_it_had_not_stopped(fsdp, capsys):
    """train.py from start to end, and again from its second checkpoint."""
    out = fsdp.folder / "run"
    assert saved_iteration(out / "checkpoint") == saved_iteration(fsdp.folder / "newer") == 3
    assert same(actor_of(out), actor_of(fsdp.folder))
    assert [line["iteration"] for line in metrics_of(out)] == [0, 1, 2]
    assert fsdp.said.count("iteration 0:") == 1  # the second run began later
    assert fsdp.said.count("iteration 3:") == 2
    evaluation.main([str(out), "--episodes", "2"])
    assert "checkpoint last" in capsys.readouterr().out


def test_shards_without_rows_find_their_way_into_the_optimizer(given, fsdp):
    """The value heads stay in the critic's group, the last parameters as before."""
    moments = fsdp.ranks[0]["checkpoint"]["saved_moments"]
    last = max(n for n, _ in moments)
    assert moments[last - 1, "exp_avg"].shape == (3, 32)
    assert moments[last, "exp_avg"].shape == (3,)
    assert last + 1 == len(fsdp.ranks[0]["checkpoint"]["saved"])


# ---- train.py ----------------------------------------------------------------------------------


def test_train_py_in_two_processes(trained, tmp_path, capfd, monkeypatch):
    """From a clone to the end; again from its second checkpoint to the same end; and one process
    can load what two have saved."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    first = tmp_path / "first"
    again = tmp_path / "again"
    shutil.copytree(trained.out / "start", first / "start")
    done = two_processes(ROOT / "train.py", *flags(first))
    assert done.code == 0, done.err[-3000:]
    assert done.out.count("unseen, 6 tasks") == 2  # once before and once after, not per process
    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoint")
    (again / "checkpoint.old").rename(again / "checkpoint")
    done = two_processes(ROOT / "train.py", *flags(again))
    assert done.code == 0, done.err[-3000:]
    assert "iteration 0:" not in done.out
    assert "iteration 3:" in done.out
    assert_same_run(again, first)
    train.main(flags(again))
    assert "nothing is left to do" in capfd.readouterr().out


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_refusals_in_two_processes_are_said_once(tmp_path, launcher):
    """Of the run's folder, which one process looks at, and of a flag, which all read. A process
    exits with 2; the launchers themselves exit with 1."""
    (tmp_path / "thesis.txt").write_text("ten years of work")
    before = tree(tmp_path)
    for words, said in (
        (flags(tmp_path), f"{tmp_path} exists and is not a run of this script"),
        (["--lr", "nan"], "--lr must be a finite number"),
    ):
        done = two_processes(ROOT / "train.py", *words, launcher=launcher)
        assert done.code == 1
        codes = set(re.findall(r"exitcode +: (\S+)", done.err))
        assert {"2"} <= codes <= {"2", "-15"}  # torchrun may be faster to end the other
        assert done.err.count("error: ") == 1
        assert f"error: {said}" in done.err
        assert tree(tmp_path) == before


HARMED = """
import os, signal, sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import train
from envs import WorldError
from support import distributed
distributed.STUCK = timedelta(seconds={wait})
distributed.AGREE = timedelta(seconds=3)
collect = train.collect
def harmed(*words, **more):
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait
        {harm}
    return collect(*words, **more)
train.collect = harmed
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "harm, wait, said",
    [
        ("time.sleep(600)", 3, r"process 1 of 2 .* did not finish its rollout within 0\.05 min"),
        ("os._exit(7)", 900, "(another process ended before it|process 1 of 2 .* died)"),
        ("raise WorldError('task 3 failed twice')", 900, "task 3 failed twice"),
    ],
)
def test_one_of_two_processes_hangs_dies_or_fails(stopped, harm, wait, said):
    """It is named, or says why itself, and the run ends."""
    path = stopped.parent / "harmed.py"
    path.write_text(HARMED.format(root=str(ROOT), harm=harm, wait=wait))
    done = two_processes(path, *flags(stopped))
    assert done.code != 0
    if "exit" not in harm or "error: " in done.err:  # torchrun may be faster, and names it too
        assert len(re.findall(f"error: {said}", done.err)) == 1, done.err[-3000:]
    assert "Error:" not in done.err.replace("ChildFailedError:", "")


SIGNALLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from support import stopping
collect, leave = train.collect, stopping.leave
def signalled(*words, **more):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return collect(*words, **more)
def noted(code):
    (Path(__file__).parent / os.environ["RANK"]).write_text(str(code))
    leave(code)
train.collect, stopping.leave = signalled, noted
train.main(sys.argv[1:])
"""


def test_a_signal_to_one_of_two_processes_stops_both_at_the_end_of_the_iteration(stopped):
    path = stopped.parent / "signalled.py"
    path.write_text(SIGNALLED.format(root=str(ROOT)))
    done = two_processes(path, *flags(stopped, eval_episodes=2))
    assert [(path.parent / rank).read_text() for rank in "01"] == ["143", "143"], done.err[-3000:]
    assert done.err.count("stopped: the same command goes on from here") == 1
    assert saved_iteration(stopped / "checkpoint") == len(metrics_of(stopped)) == 1


def test_ddp_holds_gradients_once():
    """They are views into its buckets; else it has a second copy of all."""
    assert distributed.make_accelerator().ddp_handler.gradient_as_bucket_view


def test_deepspeed_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match="take FSDP2"):
        check_sharding(tiny_config(), accelerator)


@pytest.mark.parametrize("version, efficient, works", [(2, False, 1), (2, True, 0), (1, False, 0)])
def test_fsdp_in_another_way_is_refused(version, efficient, works):
    """Version 1 is the launcher's default, and its efficient loading fails at the value heads."""
    accelerator = sharded_accelerator(version, efficient)
    refused = pytest.raises(ConfigError, match="configs/accelerate/fsdp.yaml")
    with nullcontext() if works else refused:
        check_sharding(tiny_config(), accelerator)


def test_an_exchange_that_fails_names_the_process(monkeypatch):
    """Of one process, and of other errors, nothing is said."""
    met = []
    monkeypatch.setattr(distributed, "meet", lambda *words: met.append(words[0].num_processes))
    for processes, text in ((2, "CUDA error"), (1, "gloo: timed out"), (2, "gloo: timed out")):
        with pytest.raises(RuntimeError, match=text):
            with distributed.exchange_errors(SimpleNamespace(num_processes=processes)):
                raise RuntimeError(text)
    assert met == [2]


def test_many_processes_leave_without_taking_python_apart(monkeypatch):
    """Once all are done and what they said is out; a single one returns."""
    for processes, wanted in ((1, ["wait", "end"]), (2, ["wait", "end", 0])):
        did = []
        monkeypatch.setattr(os, "_exit", did.append)
        accelerator = SimpleNamespace(
            num_processes=processes,
            wait_for_everyone=lambda did=did: did.append("wait"),
            end_training=lambda did=did: did.append("end"),
        )
        distributed.finish(accelerator)
        assert did == wanted


def test_one_process_has_nothing_to_wait_for(tiny_policy):
    assert distributed.equal_passes(tiny_policy, [[0], [1, 2]]) == [[0], [1, 2]]
    with distributed.whole_weights(tiny_policy):
        assert not any(parameter.is_meta for parameter in tiny_policy.parameters())
    assert make_optimizer(tiny_policy, train.Config()).param_groups
