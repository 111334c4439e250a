"""Evaluate a trained agent: `python eval.py OUT [--split unseen] [--episodes N] [--greedy]`,
or any model without training: `python eval.py --model M --env E`.

One pass over the split's tasks, each played once; success is what the world says. The protocol
is printed with the result. OUT holds the last checkpoint's actor; OUT/best is the one that
succeeded most in training, for use and not for tables.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch loads: idle threads sleep

import torch
from accelerate.utils import gather_object

import envs
from config import EVAL_TEMPERATURE, ConfigError
from rollout import collect
from support import report, viewer
from support.arguments import read_eval_arguments
from support.distributed import LONG, end, finish, join_processes, make_accelerator, meet
from support.loading import choose_tasks, load_evaluated, load_played, load_tokenizer
from support.metrics import show_evaluation, summarize, write_evaluation
from support.terminal import Playing


def evaluate(
    actor,
    tokenizer,
    accelerator,
    config,
    split,
    tasks,
    *,
    temperature=EVAL_TEMPERATURE,
    seed=None,
    **roles,
):
    """Play `tasks` once, shared among the processes -> summary, with split and temperature.

    The random state of training is left alone. roles: planner, executor, progress of `collect`.
    """
    mine = tasks[accelerator.process_index :: accelerator.num_processes]
    seed = config.seed if seed is None else seed
    roles["progress"] = Playing(accelerator, mine, split, roles.get("progress"))
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        envs.EnvPool(config.env, split, **envs.world_options(config)) as pool,
    ):
        torch.manual_seed(seed + accelerator.process_index)
        episodes = collect(actor, tokenizer, pool, mine, config, temperature=temperature, **roles)
    meet(accelerator, "its evaluation", LONG)
    everyone = gather_object(episodes)
    return {"split": split, "temperature": temperature, "seed": seed, **summarize(everyone)}


def main(argv=None):
    state = join_processes()
    try:
        args = read_eval_arguments(argv)
        if args.report:
            return report.write_report(args.report, args.html)
        config, folder, described = load_evaluated(args)
        split = args.split or envs.world(config.env).SPLITS[-1]
        size = envs.size(config.env, split)
        tasks = choose_tasks(size, args.episodes)
        accelerator = make_accelerator(pretrained=bool(config.model))
        tokenizer = load_tokenizer(folder)
        actor = load_played(folder, config, accelerator)
        played = []
        with accelerator.autocast():
            result = evaluate(
                actor,
                tokenizer,
                accelerator,
                config,
                split,
                tasks,
                temperature=0.0 if args.greedy else args.temperature,
                seed=args.seed,
                progress=played.append,
            )
            if args.html or args.show:
                viewer.show_episodes(args, played, actor, config, tokenizer, accelerator)
        protocol = {
            **described,
            "split": split,
            "tasks": f"{len(tasks)} of {size}, each once",
            "temperature": result["temperature"],
            "seed": result["seed"],
        }
        if accelerator.is_main_process:
            show_evaluation(result, protocol, config.env)
            if args.json:
                write_evaluation(args.json, result, protocol)
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        end(error, state)
    finish(accelerator)


if __name__ == "__main__":
    main()
