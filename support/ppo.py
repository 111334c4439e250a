"""The PPO update: one iteration's turns, in minibatches of micro-batches, on all processes.

Every mean is one token-weighted mean over the whole minibatch, whatever process or micro-batch a
token is in: each micro-batch's loss is its share of that mean.
"""

import math
from collections import defaultdict

import torch
from accelerate.utils import gather_object

import hiper
from config import SUCCESS_REWARD
from support.distributed import equal_passes, gradient_sync, say
from support.scoring import micro_batches

MAX_GRAD_NORM = 1.0  # for actor and critic each
# Of the value loss where the critic shares the actor's backbone: values in units of the success
# reward. At weight 1 the actor's gradient would be the critic's.
SHARED_VALUE_WEIGHT = 1 / SUCCESS_REWARD**2
MAX_SKIPPED = 3  # steps in a row that may be left out because a gradient is not finite


def draw_minibatches(run, samples):
    """Random minibatches of this process's turns, as many on each process, cut into micro-batches.

    -> a list of minibatches, each a list of micro-batches, each a list of rows.
    """
    config, device = run.config, run.accelerator.device
    lengths = samples.total_lengths()
    turns = run.accelerator.reduce(torch.tensor(len(lengths), device=device), "sum").item()
    count = math.ceil(turns / config.minibatch_size)
    parts = torch.randperm(len(lengths)).tensor_split(count)
    return [micro_batches(lengths, config.micro_batch_tokens, part.tolist()) for part in parts]


def update(run, samples, minibatches, old, ref_logprobs, advantages, actor_learns):
    """PPO on one iteration's turns -> mean losses and diagnostics over all processes."""
    config, accelerator = run.config, run.accelerator
    totals = defaultdict(float)
    skipped = in_a_row = 0
    value_weight = SHARED_VALUE_WEIGHT if run.model.critic is None else 1.0
    train_actor(run, actor_learns)
    set_checkpointing(run.model, True)
    for epoch in range(config.epochs):
        if epoch:
            minibatches = draw_minibatches(run, samples)
        for minibatch in minibatches:
            counts = count_tokens(run, samples, advantages, minibatch)
            passes = equal_passes(run.model, minibatch or [[]])
            for n, rows in enumerate(passes):
                with gradient_sync(run.policy, accelerator, n == len(passes) - 1):
                    terms = loss_terms(
                        run, samples, rows or [0], old, ref_logprobs, advantages, counts
                    )
                    loss = terms["value_loss"] * value_weight
                    loss = loss + (terms["policy_loss"] + terms["kl_loss"]) * actor_learns
                    weight = bool(rows) * accelerator.num_processes  # DDP and FSDP average
                    accelerator.backward(loss * weight)
                for name, term in terms.items():
                    share = bool(rows) / (config.epochs * len(minibatches))
                    totals[name] += float(term.detach()) * share
            if optimizer_step(run, actor_learns):
                in_a_row = 0
            else:
                skipped += 1
                in_a_row += 1
                say(accelerator, "warning: a gradient is NaN or infinite: this step is left out")
            if in_a_row == MAX_SKIPPED:
                raise FloatingPointError(
                    f"{MAX_SKIPPED} gradients in a row were NaN or infinite; the weights are those "
                    "before them. Try a smaller --lr, and look at the rewards of the world"
                )
    set_checkpointing(run.model, False)
    train_actor(run, True)
    sums = torch.tensor(list(totals.values()), device=accelerator.device)
    sums = accelerator.reduce(sums, "sum").tolist()
    metrics = {
        name: value if math.isfinite(value) else None  # JSON knows no NaN
        for name, value in zip(totals, sums, strict=True)
        if name != "kl_loss"
    }
    return {**metrics, "skipped_steps": skipped}


def loss_terms(run, samples, rows, old, ref_logprobs, advantages, counts):
    """The loss of one micro-batch, term by term. Each is a share of one global mean."""
    config, device = run.config, run.accelerator.device
    with run.accelerator.autocast():
        new = run.policy(*samples.model_inputs(rows, device), values=config.has_critic)
    width = new.logprobs.shape[1]

    def tokens(x):  # [N, L] -> [n, l]
        return x[rows, :width].to(device)

    def turns(x):  # [N] -> [n]
        return x[rows].to(device)

    trained = tokens(advantages.token_mask)
    response = tokens(samples.response_mask())
    surrogate, clipped = hiper.policy_loss(
        new.logprobs, tokens(old.logprobs), tokens(advantages.advantages), config.clip_range
    )
    kl = torch.zeros_like(new.logprobs)
    if ref_logprobs is not None:
        kl = hiper.kl_k3(new.logprobs, tokens(ref_logprobs)) * response
    kl_weight = torch.where(trained, config.kl_coef, config.untrained_kl_coef)
    value_loss = torch.zeros((), device=device)
    for head, (target, where) in advantages.targets.items():
        squares = hiper.value_loss(
            new.value(head), turns(old.value(head)), turns(target), config.value_clip
        )
        value_loss = value_loss + (squares * turns(where)).sum() / counts[head]
    return {
        "policy_loss": (surrogate * trained).sum() / counts["response"],
        "value_loss": value_loss,
        "kl_loss": (kl * kl_weight).sum() / counts["response"],
        "kl_to_reference": kl.sum() / counts["response"],
        "clip_fraction": (clipped * trained).sum() / counts["trained"],
        "entropy": (new.entropy * trained).sum() / counts["trained"],
    }


def count_tokens(run, samples, advantages, minibatch):
    """How many tokens and values the minibatch's means are over, on all processes together."""
    rows = [row for rows in minibatch for row in rows]
    counts = {
        "trained": advantages.token_mask[rows].sum(),
        "response": samples.lengths[rows].sum(),
        **{head: where[rows].sum() for head, (_, where) in advantages.targets.items()},
    }
    sums = torch.stack(list(counts.values())).to(run.accelerator.device)
    sums = run.accelerator.reduce(sums, "sum").clamp(min=1).tolist()
    return dict(zip(counts, sums, strict=True))


def optimizer_step(run, actor_learns):
    """Clip, step, zero -> whether the step was made: not where a gradient is NaN or infinite.

    In the critic's warm-up the actor's gradients are dropped. The norms are of the whole gradient,
    so all processes decide alike.
    """
    actor_group, critic_group = run.optimizer.param_groups
    finite = True
    for group in (actor_group, critic_group):
        norm = run.accelerator.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
        finite = finite and math.isfinite(float(norm))
    if not actor_learns:
        for parameter in actor_group["params"]:
            parameter.grad = None
    if finite:
        run.optimizer.step()
    run.optimizer.zero_grad()
    return finite


def train_actor(run, actor_learns):
    """Without gradients for the actor a critic-only iteration takes half the time, or less.

    Not with many processes: DDP waits for the gradient of every parameter.
    """
    if run.accelerator.num_processes == 1:
        for parameter in run.optimizer.param_groups[0]["params"]:
            parameter.requires_grad_(bool(actor_learns))


def set_checkpointing(model, on):
    """Hugging Face recomputes activations of layers in training mode only.

    The modules inside a layer stay in evaluation mode (no dropout). Generation needs it off.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on


def explained_variances(old, targets):
    """{head: 1 - Var(target - value) / Var(target)} over all processes, before the update."""
    mine = {head: (old.value(head)[where], y[where]) for head, (y, where) in targets.items()}
    everyone = gather_object([mine])
    result = {}
    for head in mine:
        values = torch.cat([part[head][0] for part in everyone])
        target = torch.cat([part[head][1] for part in everyone])
        result[head] = explained_variance(values, target)
    return result


def explained_variance(values, targets):
    """1 - Var(target - value) / Var(target); 0 where all targets are equal. [M], [M] -> float."""
    if len(targets) < 2 or targets.std() <= 1e-4 * (1 + targets.abs().max()):
        return 0.0
    return float(1 - (targets - values).var() / targets.var())
