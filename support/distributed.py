"""Many processes, as far as Accelerate does not cover them.

Accelerate prepares the model (DDP or FSDP2), runs backward, clips and saves. It lacks two things
that an agent needs with sharded weights (FSDP2): weights that are whole while each process
generates at its own pace (`whole_weights`), and the same number of passes on every process
(`equal_passes`), since each pass gathers weights from all. A process that hangs is named (`meet`),
and an error that all have is said once (`end`).
"""

import functools
import logging
import os
import re
import sys
import threading
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from config import ConfigError
from hae import normalize
from support.lora import frozen_names
from support.metrics import printable

EXCHANGE = timedelta(minutes=30)  # for one exchange, in which all processes do the same
STUCK = timedelta(minutes=15)  # how much longer than the others a process may play
LONG = timedelta(hours=12)  # the same in cloning, which one process does, and in evaluation
AGREE = timedelta(seconds=20)  # in which processes that all fail find each other

DDP = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else gradients are held twice
# Each process reads the whole checkpoint. The alternative fails at the heads, which are sharded
# before Accelerate would send the weights around.
os.environ.setdefault("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


def join_processes():
    """Connect the processes of this run -> Accelerate's PartialState.

    The CPU is used where there is no GPU, and with ACCELERATE_USE_CPU=true.
    """
    state = PartialState(cpu=_on_cpu(), timeout=EXCHANGE)
    if state.num_processes > 1:
        for purpose in ("meet", "end"):
            _group(purpose)
    return state


def computes_in_bfloat16(cpu, pretrained):
    """Whether forward passes run in bfloat16: on GPUs, and on CPUs that have units for it.

    There for pretrained models only: the tiny ones are too small to gain by it.
    """
    if not cpu:
        return True
    able = torch.cpu.get_capabilities()
    return pretrained and bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def make_accelerator(tracker=None, out=None, pretrained=False):
    """bfloat16 autocast where `computes_in_bfloat16`, else float32; weights stay float32.

    pretrained: whether `--model` is given.
    tracker: what `--track` names; out: the run's folder, where it writes.

    Hugging Face's warnings and loading bars are turned off here, for training and evaluation.
    """
    cpu = _on_cpu()
    join_processes()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    # It warns at each save that tied weights are saved once.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if computes_in_bfloat16(cpu, pretrained) else "no",
        log_with=tracker,
        project_dir=out,
        kwargs_handlers=[DDP],
    )


def _on_cpu():
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    return asked or not torch.cuda.is_available()


def is_sharded(accelerator):
    """Whether the run uses FSDP2."""
    return accelerator.is_fsdp2


def prepare(policy, optimizer, accelerator):
    """`Accelerator.prepare`, with FSDP2's units and precision set first -> (policy, optimizer)."""
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        plugin.auto_wrap_policy = functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={type(layer) for layer in layers}
        )
        plugin.mixed_precision_policy = _mixed_precision(accelerator)
        _shard_value_heads(policy, optimizer)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if is_sharded(accelerator):
        if policy.value_heads is not None:
            optimizer.param_groups[-1]["params"].extend(policy.value_heads.parameters())
        _first_pass(policy, accelerator)
    else:
        _save_without_wrapper(accelerator)
    return policy, optimizer


def _save_without_wrapper(accelerator):
    """DDP puts `module.` before each name. Without it any number of processes can load a state.

    Frozen weights are those of the start model: they are not saved.
    """

    def trained_state(model):
        frozen = frozen_names(model)
        return {name: x for name, x in model.state_dict().items() if name not in frozen}

    def before_saving(models, weights, folder):
        weights[:] = [trained_state(accelerator.unwrap_model(model)) for model in models]

    def before_loading(models, folder):
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_load_state_pre_hook(before_loading)


def _shard_value_heads(policy, optimizer):
    """Make them a unit of their own, which stays float32, and take them out of the optimizer.

    Accelerate finds a parameter's shards by its address in memory, and shards without rows (three
    heads on four processes) all have the address 0. So the heads rejoin the optimizer later.
    """
    if policy.value_heads is None:
        return
    heads = set(policy.value_heads.parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in heads]
    fully_shard(policy.value_heads)


def prepare_reference(reference, accelerator):
    """The frozen reference on the device, or in shards like the policy."""
    reference.requires_grad_(False)
    if not is_sharded(accelerator):
        return reference.to(accelerator.device)
    precision = _mixed_precision(accelerator)
    for module in reference.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mp_policy=precision)
    fully_shard(reference, mp_policy=precision)
    _first_pass(reference, accelerator)
    return reference


def _mixed_precision(accelerator):
    """Compute in bfloat16, reduce gradients in float32, leave inputs and outputs as they are: with
    cast inputs the residual stream, which both value functions are read from, would be bfloat16."""
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    return MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _first_pass(policy, accelerator):
    """FSDP2's root is the module whose forward comes first. In generation that is a layer."""
    one = torch.ones(1, dtype=torch.long, device=accelerator.device)
    with torch.no_grad():
        policy(one.expand(1, 2), one, one, one - 2)


@contextmanager
def whole_weights(policy):
    """Inside, each process has the actor's whole weights and may use them without the others.

    All processes must enter and leave it.
    """
    candidates = (policy, *policy.actor.modules())
    units = [module for module in candidates if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def equal_passes(policy, batches):
    """As many micro-batches on every process: [] stands for a pass that has no weight."""
    if not isinstance(policy, FSDPModule):
        return batches
    most = torch.tensor(len(batches), device=next(policy.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return batches + [[]] * (int(most) - len(batches))


def gradient_sync(policy, accelerator, last):
    """Processes exchange gradients in the last micro-batch only.

    Under FSDP2 they do in each: unsynchronised gradients would be whole, 4 bytes a parameter.
    """
    if last or is_sharded(accelerator):
        return nullcontext()
    return accelerator.no_sync(policy)


def normalize_global(adv, where, scale=True):
    """`hae.normalize` over the turns of all processes, whose shapes may differ."""
    parts = gather_object([(adv.flatten(), where.flatten())])
    everyone = normalize(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), scale)
    if len(parts) == 1:
        return everyone.view_as(adv)
    rank = torch.distributed.get_rank()
    mine = everyone.split([len(part[0]) for part in parts])[rank]
    return mine.view_as(adv)


# ---- meeting and ending ------------------------------------------------------------------------


@functools.cache
def _group(purpose):
    """A group of all processes on the CPU, made by all at once. Only gloo's barrier names the
    processes that do not come."""
    return torch.distributed.new_group(backend="gloo", timeout=3 * LONG)


def meet(accelerator, what, wait=None):
    """Wait until all processes have done `what`, at most `wait` (STUCK) longer than this one.

    ConfigError names those that have not.
    """
    if accelerator.num_processes == 1:
        return
    wait = wait or STUCK
    # The main process waits for each other one, and those for it: longer, so that it can name one.
    limit = wait if accelerator.is_main_process else 2 * wait + AGREE
    problem = _barrier("meet", limit)
    if problem is None:
        return
    found = re.search(r"Ranks? ([\d, ]+) failed to pass", problem)
    if accelerator.is_main_process and not found:  # its connection is closed
        raise ConfigError(
            f"another process ended before it had finished {what}: look at what it said last"
        )
    who = found[1] if accelerator.is_main_process else "0"
    raise ConfigError(
        f"process {who} of {accelerator.num_processes} (the first is 0) died, or did not "
        f"finish {what} within {limit.total_seconds() / 60:.3g} minutes of process "
        f"{accelerator.process_index}: look at what it said last"
    )


def _barrier(purpose, limit):
    """Wait for all processes, at most `limit` -> None, or what went wrong.

    In a thread, since gloo keeps to the limit on the first process only.
    """
    problems = ["no answer"]

    def wait():
        try:
            torch.distributed.monitored_barrier(_group(purpose), timeout=limit, wait_all_ranks=True)
            problems[0] = None
        except RuntimeError as error:
            problems[0] = str(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(limit.total_seconds() + 5)  # the first process's own limit comes first
    return problems[0]


@contextmanager
def exchange_errors(accelerator):
    """ConfigError that names the process that died or hangs, where an exchange with it fails."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes > 1 and "gloo" in str(error):
            meet(accelerator, "its part of an exchange", AGREE)
        raise


def say(accelerator, text):
    """Print once, above the progress bar."""
    if accelerator.is_main_process:
        tqdm.write(text)


def end(error, accelerator):
    """Say in one line what ended the run, and end this process with exit code 2.

    The main process says it, and any other one that fails while the main process does not.
    """
    if accelerator.is_main_process:
        fail(error)
    if accelerator.num_processes == 1:
        sys.exit(2)
    if _barrier("end", AGREE) and not accelerator.is_main_process:  # the main one does not fail
        fail(error)
    leave(2)


def fail(sentence):
    """Print in one line what is wrong and return exit code 2."""
    print(f"error: {printable(' '.join(str(sentence).split()))}", file=sys.stderr, flush=True)
    return 2


def leave(code):
    """End one of many processes at once: gloo's threads outlive their group, and one that frees
    its last tensor while Python shuts down aborts a process that was done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(accelerator):
    """The end of a run."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:
        leave(0)
