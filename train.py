"""Train an LLM agent with HiPER: `python train.py [CONFIG.yaml] [--flag value ...]`.

One iteration: play episodes, score them with the old policy, turn rewards into advantages (HAE's three, or a baseline's), update with PPO.
Without flags: a tiny Qwen2 from scratch, warm-started on a few noisy demonstrations, in the household world, on the CPU.
`--model NAME_OR_PATH` takes any Hugging Face causal LM instead, `--env` another world.

Many GPUs: `accelerate launch train.py ...`. Each process plays its share of the episodes; gradients are summed over all, with one
global token count and one global advantage normalisation, so that N processes make the step that one would.

Every iteration seeds itself from (seed, iteration, rank): a run that was stopped and started again goes on as if it had not been.
"""

import errno
import math
import random
import sys
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from support import checkpoint
import envs
import hiper
from support import plan
from support import cloning as scratch
from support import sharding as shard
from config import UserError, check, open_out, read_config
from credit import assign, needs_keep
from eval import evaluate, fail
from hae import normalize
from support.metrics import alarm, summary, table, tell
from rollout import batch_of, collect, kept, micro_batches, score


# ---- setting up -------------------------------------------------------------------------------------------------------


def build(config, out, runner, accelerator):
    """-> (policy, tokenizer, reference or None). The start model is `--model`, or cloned from scratch into out/start."""
    start = config.model or Path(config.start or out / "start")
    if not config.model and not (start / "config.json").exists():
        if accelerator.is_main_process:
            clone(config, out, runner, accelerator)
        accelerator.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    tokenizer.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    load = lambda dtype: AutoModelForCausalLM.from_pretrained(
        start, dtype=dtype, attn_implementation=config.attends
    ).eval()
    torch.manual_seed(config.seed)
    policy = hiper.ActorCritic(
        load(torch.float32), config.critic if config.critical else "shared", config.temperature
    )
    if config.gradient_checkpointing:
        for backbone in filter(None, (policy.actor, policy.critic)):
            backbone.gradient_checkpointing_enable()
    if not config.model:
        policy.heads.load_state_dict(
            torch.load(start / "heads.pt", map_location="cpu", weights_only=True)
        )
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    reference = (
        hiper.ActorCritic(load(half), temperature=config.temperature)
        if config.kl or config.kl_rest
        else None
    )
    return (
        shard.place(policy, accelerator),
        tokenizer,
        reference and shard.place(reference, accelerator),
    )


def clone(config, out, runner, accelerator):
    """Tokenizer, tiny model and cloned expert -> out/start, in Hugging Face's format."""
    size = envs.size(config.env, runner.split)
    few = min(
        config.demo_tasks, size
    )  # spread over the split, a task's demonstrations side by side
    tasks = (
        [n * few // config.demos * size // few for n in range(config.demos)]
        if few
        else range(min(config.demos, size))
    )
    shown = scratch.demonstrations(
        runner,
        tasks,
        plan_noise=config.plan_noise,
        act_noise=config.act_noise,
        slips=config.slips,
        blunders=config.blunders,
        style=config.style,
        seed=config.seed,
        slots=config.slots,
        disguises=config.disguises,
    )
    tokenizer = scratch.train_tokenizer([text for *texts, _ in shown for text in texts])
    torch.manual_seed(config.seed)
    policy = hiper.ActorCritic(scratch.tiny_model(tokenizer, config.attends), "shared").to(
        accelerator.device
    )
    scratch.clone(
        policy,
        tokenizer,
        shown,
        epochs=config.clone_epochs,
        lr=config.clone_lr,
        seed=config.seed,
        gamma=config.gamma,
        success_reward=config.success_reward,
        max_prompt=config.max_prompt,
        tokens=config.tokens_per_batch,
        progress=lambda steps: tqdm(steps, "cloning the expert", unit="step"),
    )
    temporary = out / "start.tmp"
    policy.actor.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(policy.heads.state_dict(), temporary / "heads.pt")
    temporary.rename(out / "start")


def optimizer_of(policy, config):
    """AdamW over two groups: the actor, and what belongs to the critic alone."""
    actor = list(policy.actor.parameters())
    own = [p for name, p in policy.named_parameters() if not name.startswith("actor.")]
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(
        [{"params": actor, "lr": config.lr}, {"params": own, "lr": config.critic_lr}],
        eps=1e-5,
        weight_decay=0.0,
    )


# ---- one iteration ----------------------------------------------------------------------------------------------------


def whitener(accelerator):
    """`normalize` over the turns of all processes: a function (adv [B, T], where [B, T], scale) -> [B, T]."""

    def whiten(adv, where, scale=True):
        both = torch.stack([adv.flatten(), where.flatten()]).T.to(accelerator.device)  # [B T, 2]
        everyone = accelerator.gather(accelerator.pad_across_processes(both)).cpu()
        width = len(everyone) // accelerator.num_processes
        mine = normalize(everyone[:, 0], everyone[:, 1].bool(), scale)[
            accelerator.process_index * width :
        ]
        return mine[: adv.numel()].view_as(adv)

    return whiten


def checkpointing(policy, on):
    """HF recomputes the activations of layers in training mode only. The modules below them stay out of it (no dropout), and so does
    generation, which would lose its cache."""
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on


def update(policy, optimizer, samples, old, ref, credit, config, accelerator, actor_learns):
    """PPO on one iteration's turns -> mean losses and diagnostics, as floats over all processes."""
    device, trained, heads = accelerator.device, credit.trained, credit.targets
    spoken = torch.arange(trained.shape[1]) < samples.lengths[:, None]  # [N, L] response tokens
    parts = ("logp", "values") if heads else ("logp",)
    sizes = [len(p) + len(r) for p, r in zip(samples.prompts, samples.responses)]
    turns = accelerator.reduce(torch.tensor(len(sizes), device=device), "sum").item()
    total = defaultdict(float)
    checkpointing(policy, True)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(sizes)).tensor_split(math.ceil(turns / config.minibatch)):
            counts = torch.stack(
                [
                    trained[rows].sum(),
                    spoken[rows].sum(),
                    *(where[rows].sum() for _, where in heads.values()),
                ]
            )
            n_trained, n_spoken, *n_valued = (
                accelerator.reduce(counts.to(device), "sum").clamp(min=1).tolist()
            )  # global
            for part in shard.even(
                policy, micro_batches([sizes[i] for i in rows], config.tokens_per_batch)
            ):
                index = (
                    rows[part] if part else torch.zeros(1, dtype=torch.long)
                )  # any turn, without weight
                with accelerator.autocast():
                    new = policy(*samples.rows(index.tolist(), device), parts=parts)
                width = new.logp.shape[1]
                here = lambda x: x[index, :width].to(device) if x.ndim == 2 else x[index].to(device)
                learns, said = here(trained), here(spoken)  # [n, L]
                surrogate, clipped = hiper.policy_loss(
                    new.logp, here(old.logp), here(credit.adv), config.clip
                )
                policy_term = (surrogate * learns).sum() / n_trained
                k3 = (
                    hiper.kl_k3(new.logp, here(ref.logp)) * said
                    if ref
                    else torch.zeros_like(new.logp)
                )
                kl_term = k3.sum() / n_spoken
                held = (k3 * torch.where(learns, config.kl, config.kl_rest)).sum() / n_spoken
                value_term = torch.zeros((), device=device)
                for (head, (y, where)), n in zip(heads.items(), n_valued):
                    loss = hiper.value_loss(
                        new.value(head), here(old.value(head)), here(y), config.value_clip
                    )
                    value_term = value_term + (loss * here(where)).sum() / n
                ((value_term + (policy_term + held if actor_learns else 0)) * bool(part)).backward()
                for name, x in {
                    "policy_loss": policy_term,
                    "value_loss": value_term,
                    "kl": kl_term,
                    "clip_fraction": (clipped * learns).sum() / n_trained,
                    "entropy": (new.entropy * learns).sum() / n_trained,
                }.items():
                    total[name] += (
                        bool(part)
                        * float(x.detach())
                        / config.epochs
                        / math.ceil(turns / config.minibatch)
                    )
            step(policy, optimizer, config, accelerator, actor_learns)
    checkpointing(policy, False)
    names = list(total)
    sums = accelerator.reduce(
        torch.tensor([total[k] for k in names], device=device), "sum"
    ).tolist()
    return dict(zip(names, sums))


def step(policy, optimizer, config, accelerator, actor_learns):
    """One optimizer step on the sum of all processes' gradients (their losses are shares of one global mean)."""
    for group, learns in zip(optimizer.param_groups, (actor_learns, True)):
        params = group["params"]
        for p in params:
            p.grad = (
                torch.zeros_like(p) if p.grad is None else p.grad
            )  # every process must take part
            if shard.wanted(accelerator):
                p.grad *= accelerator.num_processes  # FSDP has taken their mean
            elif accelerator.num_processes > 1:
                p.grad = accelerator.reduce(p.grad, "sum")
        torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        if not learns:
            for p in params:
                p.grad = None  # nor moved by Adam's momentum
    optimizer.step()
    optimizer.zero_grad()


def explained_variance(values, targets, where):
    """1 - Var(target - value) / Var(target) over the turns where the head has a target, 0 where all targets are equal; any one shape."""
    v, y = values[where], targets[where]
    return (
        float(1 - (y - v).var() / y.var())
        if len(y) > 1 and y.std() > 1e-4 * (1 + y.abs().max())
        else 0.0
    )


def iterate(policy, tokenizer, reference, optimizer, runner, config, accelerator, iteration):
    """Play, score, credit, update -> (metrics, episodes, credit)."""
    rank, world = accelerator.process_index, accelerator.num_processes
    set_seed(config.seed * 1_000_003 + iteration * 1_009 + rank)
    fraction = 1 - (1 - config.lr_end) * iteration / config.iterations
    for group, lr in zip(optimizer.param_groups, (config.lr, config.critic_lr)):
        group["lr"] = lr * fraction
    size = envs.size(config.env, runner.split)
    pick = random.Random(config.seed * 1_000_003 + iteration)  # the same on every process
    tasks = [pick.randrange(size) for _ in range(config.episodes // config.group_size)][rank::world]
    tasks = [
        task for task in tasks for _ in range(config.group_size)
    ]  # a task's episodes stay in one process
    parts = ("logp", "values") if config.critical else ("logp",)
    clock = {"rollout": time.perf_counter()}
    with accelerator.autocast():
        with shard.unsharded(policy):
            episodes = collect(
                policy.actor,
                tokenizer,
                runner,
                tasks,
                slots=config.slots,
                temperature=config.temperature,
                style=config.style,
            )
        clock["score"] = time.perf_counter()
        batch = batch_of(episodes, tokenizer)
        valued = lambda samples: score(
            policy, samples, tokens=config.tokens_per_batch, parts=("values",)
        )
        old = score(policy, batch.samples, tokens=config.tokens_per_batch, parts=parts)
        ref = (
            score(reference, batch.samples, tokens=config.tokens_per_batch, parts=("logp",))
            if reference
            else None
        )
        ends = valued(batch.ends) if config.critical else None
        v_keep = None
        if needs_keep(config):  # the counterfactual, as if KEEP had been written
            carried = [turn.carried for e in episodes for turn in e.turns]
            v_keep = valued(kept(batch.samples.prompts, carried, tokenizer)).v_low
    credit = assign(batch, old, config, whitener(accelerator), ends, v_keep)
    clock["update"] = time.perf_counter()
    learns = iteration >= config.critic_warmup or not config.critical
    losses = update(policy, optimizer, batch.samples, old, ref, credit, config, accelerator, learns)
    clock["end"] = time.perf_counter()
    names = list(clock)
    seconds = {a: clock[b] - clock[a] for a, b in zip(names, names[1:])}
    everyone = gather_object(episodes)  # of all processes, and so are these
    fit = gather_object(
        [{head: (old.value(head), *target) for head, target in credit.targets.items()}]
    )
    metrics = {
        "iteration": iteration,
        **summary(everyone),
        **losses,
        "lr": config.lr * fraction,
        "explained_variance": {
            k: explained_variance(*map(torch.cat, zip(*(part[k] for part in fit)))) for k in fit[0]
        },
        "seconds": seconds,
        "turns_per_second": sum(len(e.turns) for e in everyone) / seconds["rollout"],
    }
    return metrics, episodes, credit


# ---- the run ----------------------------------------------------------------------------------------------------------


def run(config, accelerator, out):
    main, module = accelerator.is_main_process, envs.world(config.env)
    logging.set_verbosity_error()
    split = config.eval_split or module.SPLITS[-1]
    with envs.Runner(config.env, module.SPLITS[0], config.env_workers) as runner:
        policy, tokenizer, reference = build(config, out, runner, accelerator)
        optimizer, first, log = optimizer_of(policy, config), 0, {"lines": [], "evals": []}
        saved = checkpoint.load(
            out, mmap=shard.wanted(accelerator)
        )  # or each process would hold all of it
        if saved:
            first, log = checkpoint.restore(policy, optimizer, saved)
        del saved

        keep = lambda iteration: checkpoint.save(
            out,
            policy,
            tokenizer,
            optimizer,
            iteration,
            log,
            checkpoint.best_yet(log["lines"], config.save_every),
            main,
        )

        def test(iteration):
            with shard.unsharded(policy):
                if not main:
                    return
                tasks = range(envs.size(config.env, split))[: config.eval_episodes or None]
                with (
                    envs.Runner(config.env, split, config.env_workers) as other,
                    accelerator.autocast(),
                ):
                    result = evaluate(
                        policy.actor,
                        tokenizer,
                        other,
                        tasks,
                        temperature=config.eval_temperature,
                        slots=config.slots,
                        style=config.style,
                        seed=config.seed,
                    )
                log["evals"].append(
                    {
                        "iteration": iteration,
                        "split": split,
                        "temperature": config.eval_temperature,
                        **result,
                    }
                )
                tqdm.write(
                    f"{split}, {len(tasks)} tasks, temperature {config.eval_temperature}, iteration {iteration}:\n{table(result)}"
                )

        if first == 0:
            test(0)  # not where a run goes on: it shall report as if unbroken
        elif first == config.iterations and main:
            tqdm.write(f"{out} has all its {first} iterations: nothing is left to do")
        bar = tqdm(
            range(first, config.iterations),
            initial=first,
            total=config.iterations,
            desc=config.method,
            unit="it",
            disable=not main,
        )
        for iteration in bar:
            metrics, episodes, credit = iterate(
                policy, tokenizer, reference, optimizer, runner, config, accelerator, iteration
            )
            log["lines"].append(metrics)
            bar.set_postfix(
                success=f"{metrics['success']:.0%}", switch_rate=f"{metrics['switch_rate']:.2f}"
            )
            if main:
                checkpoint.write_log(out, log)
                trouble = alarm(
                    log["lines"], config.method == "hiper" and config.segments == "learned"
                )
                if trouble:
                    tqdm.write(f"warning: {trouble}")
                if config.show_every and iteration % config.show_every == 0:
                    tqdm.write(
                        tell(episodes[0], {name: adv[0] for name, adv in credit.shown.items()})
                    )
            if (iteration + 1) % config.save_every == 0 and iteration + 1 < config.iterations:
                keep(iteration + 1)
            accelerator.wait_for_everyone()
        if first < config.iterations:
            test(config.iterations)
            keep(config.iterations)
        if main:
            before, after = (100 * log["evals"][i]["success"] for i in (0, -1))
            tqdm.write(
                f"{split}: {before:.1f} % at the start, {after:.1f} % after {config.iterations} iterations; all in {out}"
            )
    return log


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    try:
        config = read_config([word for word in words if word != "--plan"])
        if "--plan" in words:
            return plan.show(config)
        check(config)
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision="bf16" if torch.cuda.is_available() and not config.cpu else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )  # for whom the others wait
        if config.episodes // config.group_size < accelerator.num_processes:
            raise UserError(
                f"--episodes {config.episodes} in groups of {config.group_size} leave some of the "
                f"{accelerator.num_processes} processes without one"
            )
        if shard.wanted(accelerator) and config.optimizer != "adamw":
            raise UserError(
                f"--optimizer {config.optimizer} knows no weights in shards: with FSDP take adamw, whose moments are "
                "in shards too"
            )
        out = Path(config.out)
        if accelerator.is_main_process:
            open_out(out, config)
        accelerator.wait_for_everyone()
        run(config, accelerator, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(
            fail(
                f"cannot write to {config.out} ({error.strerror}): make room, then give the same command again; "
                "it goes on from the last checkpoint"
            )
        )
    except UserError as error:
        sys.exit(fail(error))
    shard.leave(accelerator)


if __name__ == "__main__":
    main()
