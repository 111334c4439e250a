"""support/memory_plan.py: counts and bytes against tiny models' tensors; and the command itself."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    T5Config,
)

import hiper
import train
from config import Config
from support import memory_plan as plan
from support.cloning import tiny_model
from support.loading import make_optimizer

ROOT = Path(__file__).parent.parent
QWEN = "Qwen/Qwen2.5-{}-Instruct"


def small(**changes):
    settings = dict(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=300,
        tie_word_embeddings=True,
    )
    return Qwen2Config(**{**settings, **changes})


SHAPES = [
    small(),
    small(tie_word_embeddings=False),
    small(num_key_value_heads=4, head_dim=32),
    LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=200,
    ),
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200),
]


def policy_of(shape, critic="separate"):
    torch.manual_seed(0)
    return hiper.ActorCritic(AutoModelForCausalLM.from_config(shape), critic)


def bytes_of(tensors):
    """Bytes of their storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def saved_bytes(forward, skip):
    """Bytes that autograd keeps of forward(), each storage once, without the tensors `skip`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in skip}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = forward()  # noqa: F841, its graph must live while the bytes are counted
    return bytes_of(t for t in kept if t.untyped_storage().data_ptr() not in known)


def autocast_forward(model, ids):
    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return hiper.last_hidden_state(model, ids)

    return forward


# ---- numbers of parameters ---------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.model_type)
def test_parameters_are_those_of_the_model(shape, critic):
    s = plan.count_sizes(shape, critic)
    policy = policy_of(shape, critic)

    def count(module):
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    assert s.actor == count(policy.actor)
    assert s.critic == count(policy.critic)
    assert s.heads == count(policy.value_heads)
    assert s.actor + s.critic + s.heads == count(policy)


@pytest.mark.parametrize(
    "name, published", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)]
)
def test_built_in_shapes_have_the_published_number_of_parameters(name, published):
    s = plan.count_sizes(plan.built_in(QWEN.format(name)))
    assert s.actor == published
    assert s.heads == 3 * (s.hidden + 1)
    own_output_projection = 152064 * 3584 if name == "7B" else 0  # the critic has none
    assert s.actor - s.critic == own_output_projection


def test_the_tiny_shape_is_the_trainers(tiny_tokenizer):
    ours = plan.built_in("tiny")
    theirs = tiny_model(tiny_tokenizer).config
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


# ---- bytes against tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_weights_gradients_and_adam_take_what_their_tensors_take(critic):
    """To the byte, on a real model after a real step of the trainer's optimizer."""
    config = Config()
    policy = policy_of(SHAPES[1], critic)
    optimizer = make_optimizer(policy, config)
    ids = torch.arange(40).view(2, 20)
    output = policy(ids, torch.tensor([9, 5]), torch.tensor([11, 3]), torch.tensor([4, -1]))
    values = output.v_high.sum() + output.v_low.sum() + output.v_switch.sum()
    (output.logprobs.sum() + values).backward()
    for p in policy.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    memory, _ = plan.memory(plan.count_sizes(SHAPES[1], critic), config)
    parts = {name: size for name, (size, _) in memory.items()}
    own = [p for name, p in policy.named_parameters() if not name.startswith("actor.")]
    assert parts["actor weights, float32"] == bytes_of(policy.actor.parameters())
    assert parts["critic and heads, float32"] == bytes_of(own)
    reference = policy_of(SHAPES[1], "none").bfloat16()
    assert parts["reference weights, bf16"] == bytes_of(reference.parameters())
    assert parts["gradients, float32"] == bytes_of(p.grad for p in policy.parameters())
    states = optimizer.state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert parts["Adam's two moments, float32"] == bytes_of(moments)
    groups = [sum(p.nbytes for p in group["params"]) for group in optimizer.param_groups]
    assert parts["Adam's scratch copy of one group"] == max(groups)


def test_moments_in_8_bits_take_what_their_tensors_take():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = Config(optimizer="adamw8bit")
    shape = Qwen2Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    policy = policy_of(shape)
    optimizer = make_optimizer(policy, config)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    taken = bytes_of(
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name in names
    )
    parts, _ = plan.memory(plan.count_sizes(shape), config)
    assert parts["Adam's two moments, 8 bits"][0] == pytest.approx(taken, rel=0.01)


def test_moments_in_8_bits_take_less_where_nothing_is_sharded():
    config = Config(optimizer="adamw8bit")
    s = plan.count_sizes(small())
    parts, peaks = plan.memory(s, config)
    _, most = plan.memory(s, Config())
    assert peaks["update"] < most["update"]
    assert peaks["step"] < most["step"]
    assert not any("scratch" in name for name in parts)
    # In shards it is PyTorch's Adam.
    assert plan.memory(s, config, 8) == plan.memory(s, Config(), 8)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=lambda c: c.model_type)
def test_activations_are_what_autograd_saves(shape):
    """Saved tensors of a forward under bf16 autocast, within 5 %."""
    model = policy_of(shape).actor.base_model
    s = plan.count_sizes(shape)
    ids = torch.arange(256).view(2, 128) % 200
    size = saved_bytes(autocast_forward(model, ids), list(model.parameters()))
    copies = 2 * s.critic_linear  # of all its matrices, which the graph keeps alive
    planned = ids.numel() * (s.layers * plan.layer_activations(s) + 2 * 4 * s.hidden)
    assert planned == pytest.approx(size - copies, rel=0.05)


def test_checkpointing_keeps_the_layers_inputs():
    shape = small(num_hidden_layers=6)
    model = policy_of(shape).actor.base_model.train()
    s = plan.count_sizes(shape, "shared")
    ids = torch.arange(256).view(2, 128)
    model.activation_checkpointing_enable()
    size = saved_bytes(autocast_forward(model, ids), list(model.parameters()))
    planned = ids.numel() * (s.layers * 4 * s.hidden + 2 * 4 * s.hidden)
    assert size == pytest.approx(planned, rel=0.1)
    assert plan.activations(s, ids.numel(), True) > size


def test_the_cache_is_what_the_model_keeps():
    shape = small()
    model = policy_of(shape).actor
    s = plan.count_sizes(shape)
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    keys = [layer.keys for layer in cache.layers]
    values = [layer.values.bfloat16() for layer in cache.layers]  # transformers 5.23: float32
    assert plan.kv_cache(s, 3, 20) == bytes_of([*keys, *values])


def test_a_chunk_of_logits_is_never_larger_than_planned():
    """Its float32 logits and softmax, and as much again on the way back."""
    s = plan.count_sizes(plan.built_in(QWEN.format("1.5B")))
    assert plan.logits(s, 10**6) == 16 * plan.CHUNK == 16 * 2**25
    assert plan.logits(s, 10) == 160 * s.vocab


# ---- what follows from them --------------------------------------------------------------------

BIG = Config(
    model=QWEN.format("1.5B"),
    episodes=128,
    num_envs=128,
    max_new_tokens=512,
    micro_batch_tokens=16384,
    gradient_checkpointing=True,
)
S = plan.count_sizes(plan.built_in(BIG.model))


@pytest.mark.parametrize(
    "phase, name, values",
    [
        ("rollout", "num_envs", (1, 8, 128)),
        ("rollout", "max_prompt_tokens", (256, 1024, 2048)),
        ("rollout", "max_new_tokens", (24, 512)),
        ("update", "micro_batch_tokens", (4096, 16384, 65536)),
        ("update", "gradient_checkpointing", (True, False)),
        ("update", "kl_coef", (0.0, 0.01)),
    ],
)
def test_more_takes_more(phase, name, values):
    plain = BIG
    if name == "kl_coef":
        plain = replace(BIG, kl_coef=0.0, untrained_kl_coef=0.0)
    peaks = [plan.memory(S, replace(plain, **{name: value}))[1][phase] for value in values]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == len(peaks)


def test_a_shared_critic_and_a_smaller_model_take_less():
    shared = plan.count_sizes(plan.built_in(BIG.model), "shared")
    none = plan.count_sizes(plan.built_in(BIG.model), "none")
    half = plan.count_sizes(plan.built_in(QWEN.format("0.5B")))
    for phase, peak in plan.memory(S, BIG)[1].items():
        assert plan.memory(half, BIG)[1][phase] < peak
        assert plan.memory(shared, BIG)[1][phase] < peak
        assert plan.memory(none, BIG)[1][phase] < plan.memory(shared, BIG)[1][phase]
    assert plan.memory(S, BIG)[1] == plan.memory(S, replace(BIG, seed=5, lr=1.0, iterations=7))[1]


def test_larger_and_more_gpus_never_spare_less():
    spare = [[plan.fits(S, BIG, gpu, n)[0] for n in (1, 2, 4, 128)] for gpu in plan.GPUS]
    assert all(row == sorted(row) for row in spare)
    assert all(list(column) == sorted(column) for column in zip(*spare, strict=True))
    one_env = max(plan.memory(S, replace(BIG, num_envs=1))[1].values())
    assert plan.fits(S, BIG, 24, 128) == (pytest.approx(24 * 0.9 - one_env / 1e9), "")


def test_the_flags_that_are_offered_make_it_fit():
    offered = 0
    for gpu in range(40, 160, 5):
        for start in (BIG, replace(BIG, gradient_checkpointing=False, micro_batch_tokens=65536)):
            spare, flags = plan.fits(S, start, gpu, 1)
            assert spare < 0 or not flags
            if not flags:
                continue
            words = dict(re.findall(r"--(\w+) (\w+)", flags))
            changes = {name: value == "True" or int(value) for name, value in words.items()}
            better = replace(start, **changes)
            assert plan.fits(S, better, gpu, 1)[0] >= 0
            assert better != start
            offered += 1
    assert offered


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.model_type)
def test_layers_and_the_rest_are_the_whole(shape, critic):
    """What FSDP gathers at once: a layer's weights, and those in none."""
    s = plan.count_sizes(shape, critic)
    kinds = ("DecoderLayer", "GPT2Block")
    modules = policy_of(shape, critic).modules()
    layers = [module for module in modules if type(module).__name__.endswith(kinds)]
    assert len(layers) == s.layers * (2 if s.critic else 1)
    assert s.block == sum(p.numel() for p in layers[0].parameters())
    assert s.outside + len(layers) * s.block == s.actor + s.critic + s.heads


def test_shards_divide_weights_gradients_and_moments():
    """By the number of GPUs; besides, only what is gathered differs."""
    alone = plan.memory(S, BIG)[0]
    parts = plan.memory(S, BIG, 8)[0]
    divided = ("weights", "heads", "moments", "gradients", "scratch")
    for name in alone.keys() & parts.keys():
        factor = 8 if any(word in name for word in divided) else 1
        size, phases = alone[name]
        assert parts[name] == (pytest.approx(size / factor), phases), name
    assert all(name.startswith(("gathered", "autocast")) for name in alone.keys() ^ parts.keys())
    # The critic's embedding, its last norm and the heads are gathered with the actor.
    actor_and_embedding = S.actor + S.vocab * S.hidden + S.hidden + S.heads
    assert parts["gathered: the actor, bf16"][0] == 2 * actor_and_embedding
    spare = [plan.fits(S, BIG, 80, n, True)[0] for n in (2, 4, 8, 16)]
    assert spare == sorted(spare)
    assert plan.fits(S, BIG, 80, 16)[0] < spare[1]


def test_ddp_keeps_its_buckets_of_gradients():
    alone, many = plan.memory(S, BIG), plan.memory(S, BIG, replicas=2)
    gradients = alone[0]["gradients, float32"][0]
    assert many[1]["rollout"] == alone[1]["rollout"] + gradients
    assert many[1]["update"] == alone[1]["update"]
    start = replace(BIG, num_envs=100, episodes=800)  # the rollout is the peak
    assert plan.fits(S, start, 80, 1)[0] - plan.fits(S, start, 80, 2)[0] > 0.9 * gradients / 1e9


def test_7b_fits_on_eight_gpus_in_shards_and_on_none_whole():
    big = plan.count_sizes(plan.built_in(QWEN.format("7B")))
    assert plan.fits(big, BIG, 80, 8, True)[0] > 0 > plan.fits(big, BIG, 141, 8)[0]


# ---- the command -------------------------------------------------------------------------------


def command(cwd, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ALFWORLD_DATA": "nowhere"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )


def test_the_command_needs_neither_data_nor_weights(tmp_path):
    config = str(ROOT / "configs" / "alfworld-1.5b.yaml")
    done = command(tmp_path, "--plan", config, "--num_envs", "64")
    assert done.returncode == 0, done.stderr
    assert "actor 1,543,714,304, critic 1,543,714,304" in done.stdout
    assert "built in" in done.stdout
    assert "replicated" in done.stdout
    lines = re.findall(r"^ *(\d+) GB: 1 GPU (?:yes|no), \d+\.\d", done.stdout, re.M)
    assert lines == ["24", "80", "141"]
    assert "KV cache, 64 x 2560 tokens" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_nothing_but_its_configuration(tmp_path, capsys):
    SHAPES[1].save_pretrained(tmp_path)
    train.main(["--model", str(tmp_path), "--plan"])
    printed = capsys.readouterr().out
    assert f"actor {plan.count_sizes(SHAPES[1]).actor:,}, critic" in printed
    assert printed.count(" GB: ") == 6


def test_group_methods_have_no_critic(capsys):
    train.main("--plan --method grpo --kl_coef 0 --untrained_kl_coef 0".split())
    assert "critic 0, heads 0, reference 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, shown",
    [
        ("--model no/such/model", "no/such/model"),
        ("--model T5", "T5 is an encoder-decoder"),
        ("--num_envs 0", "--num_envs"),
        ("--critic none", "none"),
        ("--num_env 3", "num_env"),
        ("missing.yaml", "missing.yaml"),
    ],
)
def test_it_refuses_in_one_sentence(tmp_path, capsys, words, shown):
    T5Config(d_model=64, num_layers=1, num_heads=2).save_pretrained(tmp_path / "T5")
    with pytest.raises(SystemExit) as exit:
        train.main([*words.replace("T5", str(tmp_path / "T5")).split(), "--plan"])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert shown in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_bad_model_ends_the_command_with_code_2(tmp_path):
    done = command(tmp_path, "--plan", "--model", "no/such/model")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no model")


# ---- configurations for accelerate -------------------------------------------------------------


@pytest.mark.parametrize(
    "name, machines, processes, kind",
    [
        ("1gpu", 1, 1, "NO"),
        ("4gpu", 1, 4, "MULTI_GPU"),
        ("8gpu", 1, 8, "MULTI_GPU"),
        ("2nodes", 2, 16, "MULTI_GPU"),
        ("fsdp", 1, 8, "FSDP"),
    ],
)
def test_accelerate_reads_its_configurations(name, machines, processes, kind):
    read = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert (read.num_machines, read.num_processes) == (machines, processes)
    assert read.mixed_precision == "bf16"
    assert read.distributed_type.value == kind
    assert not read.use_cpu
    assert bool(read.main_process_ip) == (machines > 1)
    assert bool(read.fsdp_config) == (kind == "FSDP")
    assert not read.deepspeed_config


def test_the_disk_of_a_run():
    """docs/llm.md states these two numbers."""
    s = plan.count_sizes(plan.built_in("Qwen/Qwen2.5-1.5B-Instruct"))
    checkpoint, whole = plan.disk(s, Config())
    assert round(checkpoint / 1e9) == 37
    assert round(whole / 1e9) == 130
    assert round(plan.disk(s, Config(optimizer="adamw8bit"))[0] / 1e9) == 19


def test_a_micro_batch_has_at_least_one_row():
    row = BIG.max_prompt_tokens + BIG.max_new_tokens
    peaks = [plan.memory(S, replace(BIG, micro_batch_tokens=n))[1] for n in (1, row, row + 1)]
    assert peaks[0] == peaks[1]
    assert peaks[1]["update"] < peaks[2]["update"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_critic_of_its_own_keeps_as_much_as_the_actor(checkpointing):
    """Both backbones wait for one backward pass: all of each, or the inputs of its layers."""
    shared = plan.count_sizes(small(), "shared")
    separate = plan.count_sizes(small(), "separate")
    layer = 4 * shared.hidden if checkpointing else plan.layer_activations(shared)
    backbone = shared.layers * layer + 2 * 4 * shared.hidden
    both, one = (plan.activations(s, 10, checkpointing) for s in (separate, shared))
    assert both - one == 10 * backbone
