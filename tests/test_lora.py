"""support/lora.py: one copy of the weights, adapters that learn, and runs with --lora."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

import hiper
import train as train_module
from config import Config, ConfigError
from conftest import tiny_config
from eval import main as evaluate
from script_tools import actor_of, assert_same_run, metrics_of, saved_iteration, saved_weights
from support import distributed, lora, viewer
from support import memory_plan as plan
from support.check_config import check, check_sharding
from support.loading import load_played, make_optimizer
from test_plan import QWEN, autocast_forward, bytes_of, saved_bytes, small
from train import main as train
from update_tools import (
    assert_close,
    iterate,
    learn,
    make_episodes,
    record_logprobs,
    same,
    sharded_accelerator,
    weights,
)

PEFT = importlib.util.find_spec("peft")
with_peft = pytest.mark.skipif(not PEFT, reason="pip install peft")


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def lora_policy(actor, critic="separate", rank=4, dtype=torch.float32):
    """Adapters and heads as after some training, but for `rank` 0 of that: fresh ones."""
    torch.manual_seed(0)
    return lora.make_policy(copy.deepcopy(actor), critic, rank, dtype)


def trained_a_little(policy):
    """Adapters that add something, heads that are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "value_heads.weight" in name:
                parameter.normal_(std=0.1, generator=generator)
    return policy


def frozen_of(module):
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


# ---- the models --------------------------------------------------------------------------------


@with_peft
@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_there_is_one_copy_of_the_weights(tiny_actor, critic):
    """Of actor, critic and reference together; besides it there are adapters and heads only."""
    policy, reference = lora_policy(tiny_actor, critic, dtype=torch.bfloat16)
    everything = [*policy.parameters(), *reference.parameters()]
    frozen = {id(p): p for p in everything if not p.requires_grad}.values()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert bytes_of(frozen) == 2 * sum(p.numel() for p in tiny_actor.parameters())
    assert bytes_of(everything) == bytes_of(frozen) + bytes_of(trained)
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in trained} == {torch.float32}
    assert {b.dtype for b in policy.buffers()} == {b.dtype for b in tiny_actor.buffers()}
    groups = make_optimizer(policy, Config()).param_groups
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, trained))
    sizes = plan.count_sizes(tiny_actor.config, critic, 4)
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [
        *plan.trained_sizes(sizes)
    ]


@with_peft
@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_at_first_the_policy_is_the_reference_and_the_ratio_is_1(
    tiny_actor, tiny_tokenizer, accelerator, monkeypatch, critic, checkpointing
):
    """To the last bit, in bfloat16 autocast over bfloat16 weights."""
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "bf16")
    policy, reference = lora_policy(tiny_actor, critic, dtype=torch.bfloat16)
    pairs = record_logprobs(monkeypatch)
    result = iterate(
        policy,
        tiny_tokenizer,
        make_episodes(tiny_tokenizer),
        accelerator,
        reference=reference,
        micro_batch_tokens=120,
        gradient_checkpointing=checkpointing,
    )
    assert len(pairs) > 3
    assert all(torch.equal(new, old) for new, old in pairs)
    assert result.metrics["kl_to_reference"] == 0.0


@with_peft
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_adapter_learns_from_its_own_loss(
    tiny_actor, tiny_tokenizer, accelerator, checkpointing
):
    """Actor and critic take the step that they would take with the other one away."""
    policy, reference = lora_policy(tiny_actor)
    trained_a_little(policy)
    before = weights(policy)
    if checkpointing:
        policy.actor.activation_checkpointing_enable()
        policy.critic.activation_checkpointing_enable()
    episodes = make_episodes(tiny_tokenizer)
    after = learn(policy, tiny_tokenizer, episodes, accelerator, reference=reference).weights
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert changed == trained
    warm_up = learn(
        policy, tiny_tokenizer, episodes, accelerator, reference=reference, actor_learns=False
    ).weights
    for name in trained:
        expected = before if name.startswith("actor.") else after
        assert_close({name: warm_up[name]}, {name: expected[name]})


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    """A small pretrained model's folder."""
    from support import cloning

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    cloning.tiny_model(tiny_tokenizer, hidden=32, layers=1).eval().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def words(model, out, iterations, **changes):
    values = {
        **dict(env="household", model=model, out=out, lora=4, iterations=iterations, episodes=3),
        **dict(num_envs=3, eval_episodes=2, max_new_tokens=8, short_prompt="true", history=0),
        **dict(lr=1e-2, critic_lr=1e-2, save_every=1, env_options='{"max_steps": 3}'),
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Two iterations after cloning two episodes -> its folder."""
    out = tmp_path_factory.mktemp("lora") / "run"
    train(words(model, out, 2, bc_episodes=2))
    return out


@with_peft
def test_a_run_is_saved_as_an_ordinary_model_and_an_adapter(run):
    """OUT/actor is the start model with OUT/actor/adapter merged."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(run / "start")
    actor = AutoModelForCausalLM.from_pretrained(run / "actor")
    assert not same(base.state_dict(), actor.state_dict())
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), run / "actor" / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = actor(input_ids=ids).logits
        assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-4)
        assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-4)
    saved = saved_weights(run / "checkpoint")
    assert all("lora_" in name or name.startswith("value_heads") for name in saved)
    assert {name.split(".")[0] for name in saved} == {"actor", "critic", "value_heads"}
    for name, value in saved.items():
        if name.startswith("actor.") and "lora_B" in name:
            assert value.abs().sum() > 0


@with_peft
def test_the_clone_is_the_adapted_model_merged(run, model):
    before, after = AutoModelForCausalLM.from_pretrained(model).state_dict(), actor_of(run, "start")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj.weight" in name}


@with_peft
def test_a_stopped_run_goes_on_as_if_it_had_not(run, model, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoint")
    (out / "checkpoint.old").rename(out / "checkpoint")  # as after one iteration
    assert saved_iteration(out / "checkpoint") == 1
    train(words(model, out, 2, bc_episodes=2))
    assert len(metrics_of(out)) == 2
    assert_same_run(out, run)


@with_peft
def test_it_is_evaluated_with_values_of_its_own_critic(run, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.html"
    evaluate([str(run), "--episodes", "2", "--html", str(page)])
    assert page.is_file()
    assert "No values" not in page.read_text()

    saved = saved_weights(run / "checkpoint")
    config = tiny_config(model="x", lora=4, critic="separate")
    actor = AutoModelForCausalLM.from_pretrained(run / "actor")
    policy = lora.add_critic(actor, run / "start", config)
    names = dict(policy.named_parameters())
    assert {n for n in saved if not n.startswith("actor.")} == {
        n for n, p in names.items() if p.requires_grad and not n.startswith("actor.")
    }


# ---- refusals ----------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(monkeypatch, model, tmp_path):
    with pytest.raises(ConfigError, match="give --model"):
        check(tiny_config(lora=8))
    with pytest.raises(ConfigError, match="--lora must be at least 0"):
        check(tiny_config(model="x", lora=-1))
    sharded = sharded_accelerator()
    with pytest.raises(ConfigError, match="--lora does not work with FSDP"):
        check_sharding(tiny_config(model="x", lora=8), sharded)
    check_sharding(tiny_config(), sharded)
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        train(words(model, tmp_path / "run", 1))
    assert exit.value.code == 2
    assert not (tmp_path / "run").exists()


# ---- plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, gpu, changes",
    [("1.5B", 24, dict(num_envs=64, micro_batch_tokens=8192)), ("7B", 80, dict(num_envs=64))],
)
def test_hiper_fits_one_gpu_with_the_paper_s_lengths(name, gpu, changes):
    """Prompts of 2,048 tokens, responses of 512, a critic of its own, and the reference."""
    config = Config(model=QWEN.format(name), lora=16, **changes)
    assert (config.max_prompt_tokens, config.max_new_tokens) == (2048, 512)
    assert config.critic == "separate" and config.uses_reference
    adapted = plan.count_sizes(plan.built_in(config.model), config.critic, config.lora)
    assert plan.fits(adapted, config, gpu, 1)[0] > 0
    whole = plan.count_sizes(plan.built_in(config.model), config.critic)
    assert plan.fits(whole, config, gpu, 1)[0] < 0


@with_peft
def test_activations_with_adapters_are_what_autograd_saves():
    """Within 5 %, as without."""
    shape = small(hidden_size=128, intermediate_size=320, num_hidden_layers=6)
    torch.manual_seed(0)
    policy, _ = lora_policy(AutoModelForCausalLM.from_config(shape), "shared", 2, torch.bfloat16)
    s = plan.count_sizes(shape, "shared", 2)
    ids = torch.arange(512).view(4, 128) % 200
    model = policy.actor.base_model
    size = saved_bytes(autocast_forward(model, ids), list(policy.parameters()))
    planned = ids.numel() * (s.layers * plan.layer_activations(s) + 2 * 4 * s.hidden)
    assert planned == pytest.approx(size - 2 * s.adapter, rel=0.05)


def test_the_plan_names_what_is_frozen_and_what_is_trained(capsys):
    train(f"--plan --model {QWEN.format('1.5B')} --lora 16".split())
    printed = capsys.readouterr().out
    assert "1,543,714,304 frozen; trained: actor 18,464,768, critic 18,469,379" in printed
    assert "In shards" not in printed


# ---- bfloat16 on CPUs --------------------------------------------------------------------------


@pytest.mark.parametrize("able", ["amx_bf16", "avx512_bf16", None])
def test_bfloat16_where_the_cpu_has_units_for_it(monkeypatch, able):
    """And there for pretrained models only; this machine's answer is substituted."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, "avx2": True})
    assert distributed.computes_in_bfloat16(cpu=True, pretrained=True) == (able is not None)
    assert not distributed.computes_in_bfloat16(cpu=True, pretrained=False)
    assert distributed.computes_in_bfloat16(cpu=False, pretrained=False)


@with_peft
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_in_bfloat16_on_the_cpu(monkeypatch, model, tmp_path, rank, capsys):
    """Rollout, scoring and update; what is trained stays float32, and so do its moments."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = []
    parts = [(train_module, "collect"), (train_module, "score"), (hiper, "last_hidden_state")]
    for module, name in parts:
        function = getattr(module, name)

        def recorded(*words, function=function, name=name, **more):
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return function(*words, **more)

        monkeypatch.setattr(module, name, recorded)
    out = tmp_path / "run"
    train(words(model, out, 1, lora=rank))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert ("collect", True) in seen and ("score", True) in seen
    assert seen[-1] == ("last_hidden_state", True)  # of the update
    assert "cpu, bf16" in capsys.readouterr().out
    assert {value.dtype for value in saved_weights(out / "checkpoint").values()} == {torch.float32}
    moments = torch.load(out / "checkpoint" / "optimizer.bin", weights_only=True)["state"]
    kinds = {m.dtype for state in moments.values() for m in state.values()}
    assert kinds == {torch.float32}
    [line] = metrics_of(out)
    assert line["clip_fraction"] == 0.0
    assert line["kl_to_reference"] == pytest.approx(0.0, abs=0 if rank else 1e-4)


@with_peft
def test_in_bfloat16_evaluation_plays_what_training_played(monkeypatch, model, tmp_path):
    """To the last bit, with small adapters, of which the merged weights lose most."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    AcceleratorState._reset_state(reset_partial_state=True)
    runs, policies = [], []
    make_run, score_episodes = train_module.make_run, viewer.score_episodes

    def make_and_keep(*words):
        runs.append(make_run(*words))
        return runs[-1]

    def score_and_keep(policy, *words):
        policies.append(policy)
        return score_episodes(policy, *words)

    monkeypatch.setattr(train_module, "make_run", make_and_keep)
    monkeypatch.setattr(viewer, "score_episodes", score_and_keep)
    out, result = tmp_path / "run", tmp_path / "result.json"
    train(words(model, out, 1, lr=1e-4, eval_episodes=4))
    show = ["--json", str(result), "--html", str(tmp_path / "page.html")]
    evaluate([str(out), "--episodes", "4", *show])
    [run], [policy] = runs, policies
    best = load_played(out / "best", run.config, run.accelerator)
    merged = AutoModelForCausalLM.from_pretrained(out / "actor").eval()
    AcceleratorState._reset_state(reset_partial_state=True)
    ids = torch.arange(40)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = run.model.actor(input_ids=ids).logits
        assert torch.equal(policy.actor(input_ids=ids).logits, trained)
        assert torch.equal(best(input_ids=ids).logits, trained)
        assert not torch.equal(merged(input_ids=ids).logits, trained)
        values = hiper.last_hidden_state(run.model.critic, ids)
        assert torch.equal(hiper.last_hidden_state(policy.critic, ids), values)
    last = json.loads((out / "evals.jsonl").read_text().splitlines()[-1])
    assert last.pop("iteration") == 1
    evaluated = json.loads(result.read_text())
    assert {**evaluated, **last} == evaluated


@with_peft
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_plan_s_frozen_and_trained_bytes_are_the_policy_s(tiny_actor, critic):
    s = plan.count_sizes(tiny_actor.config, critic, 4)
    parts, _ = plan.memory(s, Config(model="x", lora=4, critic=critic))
    policy, reference = lora_policy(tiny_actor, critic, dtype=torch.bfloat16)
    everything = {id(p): p for model in (policy, reference) for p in model.parameters()}.values()
    trained = bytes_of(p for p in everything if p.requires_grad)
    assert parts["frozen weights of all, bf16"][0] == bytes_of(
        p for p in everything if not p.requires_grad
    )
    assert parts["adapters and heads, float32"][0] == trained
    assert parts["gradients, float32"][0] == trained
    assert parts["autocast's bf16 copies"][0] == trained / 2


@with_peft
@pytest.mark.parametrize("rank", [1, 8])
def test_an_adapter_counts_twice_whatever_its_rank(tiny_actor, rank):
    from peft.tuners.lora import LoraLayer

    policy, _ = lora_policy(tiny_actor, rank=rank)
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    assert {scale for layer in layers for scale in layer.scaling.values()} == {2.0}
