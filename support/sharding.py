"""Sharded weights (FSDP2), for models that do not fit on one GPU: `accelerate launch --use_fsdp train.py ...`.

Every process keeps a part of each weight, its gradient and its Adam moments. A layer is put together for its pass forward or backward and
let go after it, so all processes must make the same passes (`even`). Generation cannot: its weights stay together meanwhile (`unsharded`).
Without FSDP everything here hands back what it is given.
"""

import os
import sys
import warnings
from contextlib import contextmanager

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
    "false"  # or transformers loads weights in the first process alone
)


def wanted(accelerator):
    """Whether accelerate was asked for FSDP; its version 1 has no use here. Also on the CPU, where accelerate itself knows none."""
    return accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def place(policy, accelerator):
    """An ActorCritic with its weights in memory -> the same on the device, in shards where they are wanted."""
    if not wanted(accelerator):
        return policy.to(accelerator.device)
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    how = dict(
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
    )
    for layer in [
        module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)
    ]:  # HF's decoder layers
        fully_shard(layer, **how)
    fully_shard(policy, **how)
    warnings.filterwarnings(
        "ignore", ".*returned a view tensor"
    )  # of values, which nobody writes into
    one = torch.ones(1, dtype=torch.long, device=accelerator.device)
    with torch.no_grad():
        policy(
            one.expand(1, 2), one, one, -one
        )  # whose forward comes first is the root: not a layer's, in generate
    return policy


@contextmanager
def unsharded(policy):
    """Meanwhile the actor's weights are whole in every process, which may use it or not, without the others. All must enter."""
    parts = [
        module for module in (policy, *policy.actor.modules()) if isinstance(module, FSDPModule)
    ]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def even(policy, batches):
    """Lists of rows -> as many in every process: [] stands for a pass that counts for nothing."""
    if not isinstance(policy, FSDPModule):
        return batches
    most = torch.tensor(len(batches), device=policy.heads.weight.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return batches + [[]] * (int(most) - len(batches))


def whole(state, keep):
    """A state dict with its shards put together, on the CPU; None in their place where it is not to be kept."""
    if isinstance(state, dict):
        return {name: whole(part, keep) for name, part in state.items()}
    if isinstance(state, DTensor):
        full = state.full_tensor()  # one at a time, and by all processes
        return full.cpu() if keep else None
    return state


def like(x, p):
    """A whole tensor x, in shards where p is."""
    return (
        distribute_tensor(x, p.device_mesh, p.placements)
        if isinstance(p, DTensor) and x.shape == p.shape
        else x
    )


def leave(accelerator):
    """The end, for one process or for all: of many, each ends at once. Gloo's threads outlive their group, and one that lets go of its last
    tensor while Python takes itself apart aborts the process, whose work was done."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
