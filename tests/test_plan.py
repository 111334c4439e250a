"""plan.py: counts and bytes against real tiny models and their tensors; and the command as a user gives it."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, T5Config

import hiper
from support import plan
import train
from config import Config

ROOT = Path(__file__).parent.parent
QWEN = "Qwen/Qwen2.5-{}-Instruct"


def small(**changes):
    return Qwen2Config(
        **{
            **dict(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=160,
                vocab_size=300,
                tie_word_embeddings=True,
            ),
            **changes,
        }
    )


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
    """Of their storages, each counted once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def saved(run, skip):
    """Bytes of what autograd keeps of run(), each storage once, without the tensors `skip`."""
    kept, known = [], {t.untyped_storage().data_ptr() for t in skip}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = run()
    return bytes_of(t for t in kept if t.untyped_storage().data_ptr() not in known), result


# ---- numbers of parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.model_type)
def test_parameters_are_those_of_the_model(shape, critic):
    s, policy = plan.sizes(shape, critic), policy_of(shape, critic)
    count = lambda module: sum(p.numel() for p in module.parameters()) if module is not None else 0
    assert (s.actor, s.critic, s.heads) == (
        count(policy.actor),
        count(policy.critic),
        count(policy.heads),
    )
    assert s.actor + s.critic + s.heads == count(policy)


@pytest.mark.parametrize(
    "name, published", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)]
)
def test_built_in_shapes_have_the_published_number_of_parameters(name, published):
    s = plan.sizes(plan.built_in(QWEN.format(name)))
    assert s.actor == published and s.heads == 3 * (s.hidden + 1)
    assert s.actor - s.critic == (
        152064 * 3584 if name == "7B" else 0
    )  # the critic has no output projection of its own


def test_the_tiny_shape_is_the_trainer_s(tiny_tokenizer):
    from support import cloning as scratch

    ours, theirs = plan.built_in("tiny"), scratch.tiny_model(tiny_tokenizer).config
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


# ---- bytes against tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_weights_gradients_and_adam_take_what_their_tensors_take(critic):
    """To the byte, on a real model after a real step of the trainer's optimizer."""
    config, policy = Config(), policy_of(SHAPES[1], critic)
    optimizer = train.optimizer_of(policy, config)
    ids = torch.arange(40).view(2, 20)
    scores = policy(ids, torch.tensor([9, 5]), torch.tensor([11, 3]), torch.tensor([4, -1]))
    (
        scores.logp.sum() + scores.v_high.sum() + scores.v_low.sum() + scores.v_switch.sum()
    ).backward()
    for p in policy.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    parts = {
        name: size
        for name, (size, _) in plan.memory(plan.sizes(SHAPES[1], critic), config)[0].items()
    }
    own = [p for name, p in policy.named_parameters() if not name.startswith("actor.")]
    assert parts["actor weights, float32"] == bytes_of(policy.actor.parameters())
    assert parts["critic and heads, float32"] == bytes_of(own)
    assert parts["reference weights, bf16"] == bytes_of(
        policy_of(SHAPES[1]).actor.bfloat16().parameters()
    )
    assert parts["gradients, float32"] == bytes_of(p.grad for p in policy.parameters())
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    assert parts["Adam's two moments, float32"] == bytes_of(moments)
    groups = [sum(p.nbytes for p in group["params"]) for group in optimizer.param_groups]
    assert parts["Adam's scratch copy of one group"] == max(groups)


def test_moments_in_8_bits_take_what_their_tensors_take():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config, shape = (
        Config(optimizer="adamw8bit"),
        Qwen2Config(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
    )
    policy = policy_of(shape, "separate")
    optimizer = train.optimizer_of(policy, config)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    taken = bytes_of(
        x
        for state in optimizer.state.values()
        for name, x in state.items()
        if name in ("state1", "state2", "absmax1", "absmax2")
    )
    parts, peaks = plan.memory(plan.sizes(shape), config)
    assert parts["Adam's two moments, 8 bits"][0] == pytest.approx(taken, rel=0.01)
    whole, most = plan.memory(plan.sizes(shape), Config())
    assert (
        peaks["update"] < most["update"]
        and peaks["step"] < most["step"]
        and not any("scratch" in name for name in parts)
    )
    assert plan.memory(plan.sizes(shape), config, 8) == plan.memory(
        plan.sizes(shape), Config(), 8
    )  # in shards it is PyTorch's


@pytest.mark.parametrize("shape", SHAPES[:4], ids=lambda c: c.model_type)
def test_activations_are_what_autograd_saves(shape):
    """Saved tensors of a forward under bf16 autocast, within 5 %."""
    model, s, ids = (
        policy_of(shape).actor.base_model,
        plan.sizes(shape),
        torch.arange(256).view(2, 128) % 200,
    )

    def forward(on=True):
        with torch.autocast("cpu", torch.bfloat16) if on else nullcontext():
            return model(input_ids=ids, use_cache=False).last_hidden_state

    size, _ = saved(forward, list(model.parameters()))
    copies = 2 * s.critic_linear  # of all its matrices, which the graph keeps alive
    planned = ids.numel() * (s.layers * plan.layer(s) + 2 * 4 * s.hidden)
    assert planned == pytest.approx(size - copies, rel=0.05)


def test_checkpointing_keeps_the_layers_inputs():
    shape = small(num_hidden_layers=6)
    model, s, ids = (
        policy_of(shape).actor.base_model.train(),
        plan.sizes(shape, "shared"),
        torch.arange(256).view(2, 128),
    )
    model.gradient_checkpointing_enable()

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, use_cache=False).last_hidden_state

    size, _ = saved(forward, list(model.parameters()))
    assert size == pytest.approx(
        ids.numel() * (s.layers * 4 * s.hidden + 2 * 4 * s.hidden), rel=0.1
    )
    assert plan.activations(s, ids.numel(), True) > size


def test_the_cache_is_what_the_model_keeps():
    shape = small()
    model, s, ids = policy_of(shape).actor, plan.sizes(shape), torch.arange(60).view(3, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert plan.kv_cache(s, 3, 20) == bytes_of(
        t for kept in cache.layers for t in (kept.keys, kept.values)
    )


def test_a_chunk_of_logits_is_never_larger_than_planned():
    """Forward of one chunk: its float32 logits and softmax; the plan allows for as much again on the way back."""
    s = plan.sizes(plan.built_in(QWEN.format("1.5B")))
    assert (
        plan.logits(s, 10**6) == 16 * plan.CHUNK == 16 * 2**25
        and plan.logits(s, 10) == 160 * s.vocab
    )


# ---- what follows from them -------------------------------------------------------------------------------------------

BIG = Config(
    model=QWEN.format("1.5B"),
    episodes=128,
    slots=128,
    max_response=512,
    tokens_per_batch=16384,
    gradient_checkpointing=True,
)
S = plan.sizes(plan.built_in(BIG.model))


@pytest.mark.parametrize(
    "phase, name, values",
    [
        ("rollout", "slots", (1, 8, 128)),
        ("rollout", "max_prompt", (256, 1024, 2048)),
        ("rollout", "max_response", (24, 512)),
        ("update", "tokens_per_batch", (4096, 16384, 65536)),
        ("update", "gradient_checkpointing", (True, False)),
        ("update", "kl", (0.0, 0.01)),
    ],
)
def test_more_takes_more(phase, name, values):
    plain = replace(BIG, kl=0.0, kl_rest=0.0) if name == "kl" else BIG
    peaks = [plan.memory(S, replace(plain, **{name: value}))[1][phase] for value in values]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)


def test_a_shared_critic_and_a_smaller_model_take_less():
    shared, half = (
        plan.sizes(plan.built_in(BIG.model), "shared"),
        plan.sizes(plan.built_in(QWEN.format("0.5B"))),
    )
    for phase, peak in plan.memory(S, BIG)[1].items():
        assert plan.memory(half, BIG)[1][phase] < peak and plan.memory(shared, BIG)[1][phase] < peak
    assert plan.memory(S, BIG)[1] == plan.memory(S, replace(BIG, seed=5, lr=1.0, iterations=7))[1]


def test_what_fits():
    """Larger and more GPUs never spare less; the flags that are offered do make it fit."""
    spare = [[plan.fits(S, BIG, gpu, n)[0] for n in (1, 2, 4, 128)] for gpu in plan.GPUS]
    assert all(row == sorted(row) for row in spare) and all(
        list(column) == sorted(column) for column in zip(*spare)
    )
    assert plan.fits(S, BIG, 24, 128) == (
        pytest.approx(24 * 0.9 - max(plan.memory(S, replace(BIG, slots=1))[1].values()) / 1e9),
        "",
    )
    offered = 0
    for gpu in range(40, 160, 5):
        for start in (BIG, replace(BIG, gradient_checkpointing=False, tokens_per_batch=65536)):
            spare, flags = plan.fits(S, start, gpu, 1)
            assert spare < 0 or not flags
            if flags:
                words = dict(re.findall(r"--(\w+) (\w+)", flags))
                better = replace(
                    start, **{n: {"True": True}.get(x) or int(x) for n, x in words.items()}
                )
                assert plan.fits(S, better, gpu, 1)[0] >= 0 and better != start
                offered += 1
    assert offered


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.model_type)
def test_layers_and_the_rest_are_the_whole(shape, critic):
    """What FSDP gathers at once: a layer's weights, and those in none."""
    s, policy = plan.sizes(shape, critic), policy_of(shape, critic)
    layers = [
        module
        for module in policy.modules()
        if type(module).__name__.endswith(("DecoderLayer", "GPT2Block"))
    ]
    assert len(layers) == s.layers * (2 if s.critic else 1) and s.block == sum(
        p.numel() for p in layers[0].parameters()
    )
    assert s.outside + len(layers) * s.block == s.actor + s.critic + s.heads


def test_shards_divide_weights_gradients_and_moments():
    """By the number of GPUs; nothing else but what is put together differs. 7B fits on eight of 80 GB so, and on none whole."""
    alone, parts = plan.memory(S, BIG)[0], plan.memory(S, BIG, 8)[0]
    for name in alone.keys() & parts.keys():
        divided = any(
            word in name for word in ("weights", "heads", "moments", "gradients", "scratch")
        )
        assert parts[name] == (
            pytest.approx(alone[name][0] / (8 if divided else 1)),
            alone[name][1],
        ), name
    assert all(
        name.startswith(("put together", "autocast")) for name in alone.keys() ^ parts.keys()
    )
    actor_and_embedding = (
        S.actor + S.vocab * S.hidden + S.hidden + S.heads
    )  # the critic's, its last norm, heads
    assert parts["put together: the actor, bf16"][0] == 2 * actor_and_embedding
    spare = [plan.fits(S, BIG, 80, n, True)[0] for n in (2, 4, 8, 16)]
    assert spare == sorted(spare) and plan.fits(S, BIG, 80, 16)[0] < spare[1]
    big = plan.sizes(plan.built_in(QWEN.format("7B")))
    assert plan.fits(big, BIG, 80, 8, True)[0] > 0 > plan.fits(big, BIG, 141, 8)[0]


# ---- the command ------------------------------------------------------------------------------------------------------


def command(cwd, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "ALFWORLD_DATA": "nowhere",
        },
    )


def test_the_command_needs_neither_data_nor_weights(tmp_path):
    done = command(
        tmp_path, "--plan", str(ROOT / "configs" / "alfworld-1.5b.yaml"), "--slots", "64"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "actor 1,543,714,304, critic 1,543,714,304" in done.stdout
        and "built in" in done.stdout
        and "replicated" in done.stdout
    )
    assert re.findall(r"^ *(\d+) GB: 1 GPU (?:yes|no), \d+\.\d", done.stdout, re.M) == [
        "24",
        "80",
        "141",
    ]
    assert "KV cache, 64 x 2560 tokens" in done.stdout and list(tmp_path.iterdir()) == []


def test_a_folder_with_nothing_but_its_configuration(tmp_path, capsys):
    SHAPES[1].save_pretrained(tmp_path)
    train.main(["--model", str(tmp_path), "--plan"])
    said = capsys.readouterr().out
    assert f"actor {plan.sizes(SHAPES[1]).actor:,}, critic" in said and said.count(" GB: ") == 6
    train.main(["--plan", "--method", "grpo", "--kl", "0", "--kl_rest", "0"])
    assert "critic 0, heads 387, reference 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model no/such/model", "no/such/model"),
        ("--model T5", "T5Config"),
        ("--slots 0", "--slots"),
        ("--critic none", "none"),
        ("--slot 3", "slots"),
        ("missing.yaml", "missing.yaml"),
    ],
)
def test_it_refuses_in_one_sentence(tmp_path, capsys, words, said):
    T5Config(d_model=64, num_layers=1, num_heads=2).save_pretrained(tmp_path / "T5")
    with pytest.raises(SystemExit) as exit:
        train.main([*words.replace("T5", str(tmp_path / "T5")).split(), "--plan"])
    out, err = capsys.readouterr()
    assert (
        exit.value.code == 2
        and out == ""
        and said in err
        and err.startswith("error: ")
        and len(err.splitlines()) == 1
    )


def test_a_bad_model_ends_the_command_with_code_2(tmp_path):
    done = command(tmp_path, "--plan", "--model", "no/such/model")
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: no model")
    )


# ---- configurations for accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, machines, processes",
    [("1gpu", 1, 1), ("4gpu", 1, 4), ("8gpu", 1, 8), ("2nodes", 2, 16), ("fsdp", 1, 8)],
)
def test_accelerate_reads_its_configurations(name, machines, processes):
    read = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert (read.num_machines, read.num_processes) == (
        machines,
        processes,
    ) and read.mixed_precision == "bf16"
    assert (
        read.distributed_type.value
        == ("NO" if processes == 1 else "FSDP" if name == "fsdp" else "MULTI_GPU")
        and not read.use_cpu
    )
    assert (
        bool(read.main_process_ip) == (machines > 1)
        and bool(read.fsdp_config) == (name == "fsdp")
        and not read.deepspeed_config
    )
