"""Train an LLM agent with HiPER: `python train.py [CONFIG.yaml] [--flag value ...]`.

One iteration: collect episodes, score them under the old policy, estimate advantages (HAE's
three, or a baseline's), update with PPO, log.

    python train.py                                            the household game, on a CPU
    python train.py --env alfworld --model Qwen/Qwen2.5-1.5B-Instruct        the paper, on a GPU
    accelerate launch --num_processes 4 train.py --model ...                 four GPUs

Several processes make the update that one would make: each plays its share of the episodes,
token counts and advantage normalisation are global. Each iteration seeds itself from (seed,
iteration, process), so a run that was stopped goes on as if it had not been.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch loads: idle threads sleep

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

import envs
import hiper
from baselines import baseline_advantages
from config import Config, ConfigError
from eval import choose_tasks, evaluate
from rollout import collect, make_batch
from support import checkpoint, task_sampling, terminal, tracking, viewer
from support.arguments import read_train_arguments
from support.check_config import check, check_processes
from support.distributed import (
    end,
    exchange_errors,
    finish,
    join_processes,
    make_accelerator,
    meet,
    normalize_global,
    prepare,
    prepare_reference,
    say,
    whole_weights,
)
from support.files import disk_errors
from support.loading import (
    check_world_and_model,
    describe_run,
    load_policy,
    make_optimizer,
)
from support.metrics import format_table, summarize, timed
from support.ppo import draw_minibatches, explained_variances, update
from support.scoring import score
from support.stopping import Stopped, Stopping, end_stopped


@dataclass
class Run:
    """What an iteration works with. `policy` is prepared by Accelerate, `model` is inside it."""

    config: Config
    accelerator: Accelerator
    pool: envs.EnvPool
    tokenizer: object
    policy: torch.nn.Module
    model: hiper.ActorCritic
    optimizer: object
    reference: hiper.ActorCritic | None
    lines: list = ()  # the log's, one per past iteration
    families: dict = field(default_factory=dict)  # task -> its task_type, for task_sampling


# ---- one iteration -----------------------------------------------------------------------------


def train_iteration(run, iteration):
    """Collect, score, estimate advantages, update, log.

    -> (metrics, episodes, PolicyOutput of the old policy, advantages).
    """
    config, accelerator = run.config, run.accelerator
    lr = start_iteration(run, iteration)
    actor_learns = iteration >= config.critic_warmup or not config.has_critic
    seconds = {}

    # 1. Collect episodes with the current policy.
    with timed("rollout", seconds), accelerator.autocast(), whole_weights(run.model):
        tasks = draw_tasks(run, iteration)
        bar = terminal.Playing(accelerator, tasks, "playing")
        episodes = collect(run.model.actor, run.tokenizer, run.pool, tasks, config, progress=bar)
        meet(accelerator, "its rollout")

    # 2. Score them: log-probabilities and values of the old policy, log-probs of the reference.
    with timed("score", seconds), accelerator.autocast():
        batch = make_batch(episodes, run.tokenizer, config.group_size)
        minibatches = draw_minibatches(run, batch.samples)
        passes = sum(minibatches, [])
        old, ref_logprobs, end_values, v_keep = score(run, batch, passes, actor_learns)

    # 3. Estimate advantages.
    if config.method == "hiper":
        advantages = hiper.hiper_advantages(
            batch, old, config, normalize_global, end_values=end_values, v_keep=v_keep
        )
    else:
        advantages = baseline_advantages(
            batch, old, config, normalize_global, end_values=end_values
        )

    # 4. Update the policy and the critic with PPO.
    with timed("update", seconds):
        losses = update(
            run, batch.samples, minibatches, old, ref_logprobs, advantages, actor_learns
        )

    # 5. Log.
    everyone = gather_object(episodes)  # of all processes
    turns = sum(len(episode.turns) for episode in everyone)
    metrics = {
        "iteration": iteration,
        **summarize(everyone),
        **task_sampling.record(config, everyone),
        **losses,
        "lr": lr,
        "explained_variance": explained_variances(old, advantages.targets),
        "seconds": seconds,
        "turns_per_second": turns / seconds["rollout"],
    }
    return metrics, episodes, old, advantages


def start_iteration(run, iteration):
    """Seed the iteration and set its learning rates -> the actor's."""
    config = run.config
    seed = config.seed * 1_000_003 + iteration * 1_009 + run.accelerator.process_index
    set_seed(seed % 2**32)  # NumPy takes no larger one
    fraction = 1 - (1 - config.final_lr_fraction) * iteration / config.iterations
    actor_group, critic_group = run.optimizer.param_groups
    actor_group["lr"] = config.lr * fraction
    critic_group["lr"] = config.critic_lr * fraction
    return actor_group["lr"]


def draw_tasks(run, iteration):
    """This process's share of the iteration's tasks; the episodes of one draw stay together."""
    config, accelerator = run.config, run.accelerator
    drawn = task_sampling.draw(run, iteration, config.drawn_tasks)
    mine = drawn[accelerator.process_index :: accelerator.num_processes]
    return [task for task in mine for _ in range(config.group_size)]


# ---- the run -----------------------------------------------------------------------------------


def make_run(config, out, pool, accelerator):
    """Model, reference and optimizer, prepared for the devices; cloned first if need be."""
    model, tokenizer, reference = load_policy(config, out, pool, accelerator)
    policy, optimizer = prepare(model, make_optimizer(model, config), accelerator)
    if reference is not None:
        reference = prepare_reference(reference, accelerator)
    model = accelerator.unwrap_model(policy)
    return Run(config, accelerator, pool, tokenizer, policy, model, optimizer, reference)


def train(config, accelerator, out):
    """All iterations, from the last checkpoint on -> the log."""
    split = envs.world(config.env).SPLITS[0]
    with (
        envs.EnvPool(config.env, split, **envs.world_options(config)) as pool,
        Stopping(out, accelerator) as stopping,
        exchange_errors(accelerator),
    ):
        run = make_run(config, out, pool, accelerator)
        say(accelerator, describe_run(run, out))
        first, log = checkpoint.load_checkpoint(out, run)
        tracking.start(accelerator, config, first)
        run.lines = log["lines"]
        if first == 0:
            evaluate_run(run, log, 0)
        train_iterations(run, out, first, log, stopping)
        if log["evals"][-1]["iteration"] < config.iterations:
            evaluate_run(run, log, config.iterations)
            checkpoint.save_log(out, run, log)
        elif first == config.iterations:
            say(accelerator, f"{out} has all its {first} iterations: nothing is left to do")
    first, last = log["evals"][0], log["evals"][-1]
    before, after = 100 * first["success"], 100 * last["success"]
    say(
        accelerator,
        f"{first['split']}: {before:.1f} % at the start, {after:.1f} % after "
        f"{config.iterations} iterations; all in {out}",
    )
    return log


def train_iterations(run, out, first, log, stopping):
    """Iterations `first` to the last, with their log lines, warnings and checkpoints."""
    config, accelerator = run.config, run.accelerator
    bar = terminal.training_bar(first, config, accelerator)
    for iteration in stopping.whole(range(first, config.iterations)):
        metrics, episodes, old, advantages = train_iteration(run, iteration)
        log["lines"].append(metrics)
        terminal.tell_iteration(bar, run, log["lines"], episodes, advantages)
        tracking.log_iteration(run, metrics, episodes, advantages)
        if accelerator.is_main_process:
            checkpoint.write_log(out, log)
        done = iteration + 1
        stopped = stopping.asked()
        if stopped or done % config.save_every == 0 or done == config.iterations:
            checkpoint.save_checkpoint(out, run, done, log)
            viewer.write_training(out, done, run, episodes, old, advantages)
            stopped = stopped or stopping.asked()  # while it was being saved
        if stopped:
            raise stopped


def evaluate_run(run, log, iteration):
    """One pass over the evaluation split, shared among the processes, into the log."""
    config, accelerator = run.config, run.accelerator
    split = envs.world(config.env).SPLITS[-1]
    tasks = choose_tasks(envs.size(config.env, split), config.eval_episodes)
    if config.model:  # no more memory than training takes
        config = replace(config, num_envs=config.slots(accelerator.num_processes))
    with accelerator.autocast(), whole_weights(run.model):
        result = evaluate(run.model.actor, run.tokenizer, accelerator, config, split, tasks)
    log["evals"].append({"iteration": iteration, **result})
    tracking.log_evaluation(accelerator, result, iteration)
    say(
        accelerator,
        f"{split}, {len(tasks)} tasks, temperature {result['temperature']}, "
        f"iteration {iteration}:\n{format_table(result)}",
    )


def main(argv=None):
    state = join_processes()
    try:
        config, plan, tracker = read_train_arguments(argv)
        if plan:
            from support import memory_plan

            return memory_plan.show(config)
        check(config)
        check_world_and_model(config)
        accelerator = make_accelerator(tracker, config.out, pretrained=bool(config.model))
        check_processes(config, accelerator)
        out = Path(config.out)
        with disk_errors(out), checkpoint.run_dir(out, config, accelerator):
            train(config, accelerator, out)
    except (ConfigError, FloatingPointError, envs.WorldError) as error:
        end(error, state)
    except Stopped as stopped:
        end_stopped(stopped, accelerator)
    finish(accelerator)


if __name__ == "__main__":
    main()
