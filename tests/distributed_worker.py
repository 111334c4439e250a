"""What each process of tests/test_distributed.py does: `distributed_worker.py FOLDER ddp|fsdp`.

It reads FOLDER/given.pkl and leaves its answers in FOLDER/ddp.0.pkl and so on. Accelerate ignores
FSDP on the CPU, so the accelerator's type is set by hand.
"""

import copy
import pickle
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import hiper  # noqa: E402
import train  # noqa: E402
from conftest import tiny_config  # noqa: E402
from rollout import make_batch  # noqa: E402
from script_tools import flags  # noqa: E402
from support import checkpoint, distributed, lora, ppo  # noqa: E402
from support.generation import generate  # noqa: E402
from support.loading import make_optimizer  # noqa: E402
from support.scoring import compute_logprobs_and_values  # noqa: E402
from update_tools import iterate, make_run, weights  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def make_accelerator(kind, mixed_precision="no"):
    AcceleratorState._reset_state()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_CPU
    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, kwargs_handlers=[distributed.DDP]
    )
    if kind == "fsdp":
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False
        )
    return accelerator


def make_policy(actor, critic):
    """Value heads that are not zero, the same on every process. "lora": both with adapters."""
    if critic == "lora":
        torch.manual_seed(0)
        policy, _ = lora.make_policy(copy.deepcopy(actor), "separate", 4, torch.float32)
    else:
        policy = hiper.ActorCritic(copy.deepcopy(actor), critic)
    if policy.value_heads is not None:
        generator = torch.Generator().manual_seed(1)
        torch.nn.init.normal_(policy.value_heads.weight, generator=generator)
    return policy


def play(given, way, accelerator):
    """One iteration of a way -> (metrics, weights, micro-batches in each minibatch)."""
    changes = dict(way)
    policy = make_policy(given["actor"], changes.pop("backbone"))
    if changes.pop("alone", False):
        alone = given["alone"]
        changes["minibatch_of"] = lambda response: int(tuple(response) in alone)
    result = iterate(policy, given["tokenizer"], given["episodes"], accelerator, **changes)
    assert isinstance(result.run.model, FSDPModule) == distributed.is_sharded(accelerator)
    accelerator.free_memory()
    return result.metrics, result.weights, [len(part) for part in result.minibatches]


def play_with_nan(given, accelerator):
    """An iteration in which the loss of the second process alone is NaN -> as `play`."""
    loss_terms = ppo.loss_terms

    def harmed(*words):
        terms = loss_terms(*words)
        if accelerator.process_index == 1:
            terms["policy_loss"] = terms["policy_loss"] * float("nan")
        return terms

    ppo.loss_terms = harmed
    answer = play(given, {"backbone": "separate"}, accelerator)
    ppo.loss_terms = loss_terms
    return answer


# ---- under FSDP2 -------------------------------------------------------------------------------


def is_sharded(module):
    return all(isinstance(parameter, DTensor) for parameter in module.parameters())


def generate_at_its_own_pace(given, accelerator):
    """Greedy responses under `whole_weights`, as many steps as this process likes -> id lists,
    and whether the weights were shards before and after."""
    actor = given["actor"]
    policy = make_policy(actor, "shared")
    optimizer = make_optimizer(policy, tiny_config())
    policy, _ = distributed.prepare(policy, optimizer, accelerator)
    before = is_sharded(policy)
    prompts = given["prompts"]
    steps = 3 if accelerator.process_index else 9
    responses = []
    with distributed.whole_weights(policy):
        for _ in range(1 + accelerator.process_index):  # and calls
            responses = generate(
                policy.actor,
                given["tokenizer"],
                prompts,
                temperature=0.0,
                max_new_tokens=steps,
                tag="<never>",
            )
    after = is_sharded(policy)
    tied = policy.actor.lm_head.weight is policy.actor.get_input_embeddings().weight
    accelerator.free_memory()
    return {"responses": responses, "sharded": (before, after), "tied": tied}


def save_and_load(given, folder, accelerator):
    """Two AdamW steps, a checkpoint between them; loaded again the second gives the same bits."""
    config = tiny_config(
        iterations=2, lr=1e-3, critic_lr=1e-3, kl_coef=0.0, untrained_kl_coef=0.0, save_every=1
    )
    policy = make_policy(given["actor"], "separate")
    policy, optimizer = distributed.prepare(policy, make_optimizer(policy, config), accelerator)
    run = make_run(policy, config, accelerator, optimizer, given["tokenizer"])
    batch = make_batch(given["episodes"], given["tokenizer"])
    rows = range(len(batch.samples.prompts))
    everything = [[row] for row in rows[: 4 + 3 * accelerator.process_index]]

    def step():
        old = compute_logprobs_and_values(run.model, batch.samples, everything)
        ends = compute_logprobs_and_values(run.model, batch.final_states, [[0, 1]], logprobs=False)
        advantages = hiper.hiper_advantages(
            batch, old, config, distributed.normalize_global, end_values=ends
        )
        ppo.update(run, batch.samples, [everything], old, None, advantages, True)

    def moments():
        return {
            (n, name): value.full_tensor().clone()
            for n, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, DTensor)
        }

    lines = [{"iteration": 0, "success": 0.5, "switches_per_episode": 1.0, "episode_length": 4.0}]
    log = {"lines": lines, "evals": []}
    start = weights(run.model)
    step()
    saved, saved_moments = weights(run.model), moments()
    checkpoint.save_checkpoint(folder, run, 1, log)
    step()
    ended = weights(run.model)
    loaded = checkpoint.load_checkpoint(folder, run)
    again, again_moments = weights(run.model), moments()
    step()
    accelerator.free_memory()
    return {
        "start": start,
        "saved": saved,
        "saved_moments": saved_moments,
        "ended": ended,
        "loaded": loaded,
        "log": log,
        "again": again,
        "again_moments": again_moments,
        "ended_again": weights(run.model),
    }


def in_bfloat16(given, folder, kind):
    """An iteration with the reference in bfloat16 -> metrics and dtypes."""
    accelerator = make_accelerator(kind, "bf16")
    dtypes = {}
    compute = hiper.ActorCritic._values

    def spy(self, hidden):
        dtypes["heads"] = self.value_heads.weight.dtype
        dtypes["residual stream"] = hidden.dtype
        values = compute(self, hidden)
        dtypes["values"] = values[0].dtype
        return values

    hiper.ActorCritic._values = spy
    actor = given["actor"].bfloat16().float()  # weights that bfloat16 can hold
    reference = hiper.ActorCritic(copy.deepcopy(actor).bfloat16(), "none")
    policy = make_policy(actor, "separate")
    result = iterate(
        policy,
        given["tokenizer"],
        given["episodes"],
        accelerator,
        reference=reference,
        micro_batch_tokens=100,
        gradient_checkpointing=True,
    )
    hiper.ActorCritic._values = compute
    dtypes["weights"] = next(iter(result.run.model.parameters())).dtype
    dtypes["reference"] = next(iter(result.run.reference.parameters())).dtype
    with accelerator.autocast(), distributed.whole_weights(result.run.model):
        responses = generate(
            result.run.model.actor,
            given["tokenizer"],
            given["prompts"],
            temperature=1.0,
            max_new_tokens=2 + accelerator.process_index,
        )
    moved = any(
        not torch.equal(value, dict(policy.named_parameters())[name])
        for name, value in result.weights.items()
    )
    units = sum(isinstance(module, FSDPModule) for module in result.run.model.modules())
    accelerator.free_memory()
    return {
        "metrics": result.metrics,
        "dtypes": dtypes,
        "responses": responses,
        "moved": moved,
        "units": units,
    }


def whole_runs(folder):
    """train.py's `main` under FSDP2: a run, and one that goes on from its second checkpoint."""
    train.make_accelerator = lambda *_, **__: make_accelerator("fsdp")
    train.finish = lambda accelerator: (accelerator.free_memory(), accelerator.wait_for_everyone())
    words = {"eval_episodes": 2, "gradient_checkpointing": True}
    train.main(flags(folder / "run", **words))
    if Accelerator().is_main_process:
        (folder / "run" / "checkpoint").rename(folder / "newer")
        (folder / "run" / "checkpoint.old").rename(folder / "run" / "checkpoint")
        (folder / "run" / "actor").rename(folder / "actor")
    Accelerator().wait_for_everyone()
    train.main(flags(folder / "run", **words))


def main(folder, kind):
    given = pickle.loads((folder / "given.pkl").read_bytes())
    accelerator = make_accelerator(kind)
    assert accelerator.num_processes == 2
    assert distributed.is_sharded(accelerator) == (kind == "fsdp")
    ways = {n: way for n, way in given["ways"].items() if kind == "ddp" or n != "lora"}
    answers = {name: play(given, way, accelerator) for name, way in ways.items()}
    if kind == "fsdp":
        answers["generated"] = generate_at_its_own_pace(given, accelerator)
        (folder / "saved").mkdir(exist_ok=True)
        answers["checkpoint"] = save_and_load(given, folder / "saved", accelerator)
    else:
        answers["nan"] = play_with_nan(given, accelerator)
    answers["bfloat16"] = in_bfloat16(given, folder, kind)
    if kind == "fsdp":
        whole_runs(folder)
    (folder / f"{kind}.{accelerator.process_index}.pkl").write_bytes(pickle.dumps(answers))
    distributed.finish(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
