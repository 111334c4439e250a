"""Forward passes over many turns in micro-batches of similar length."""

import torch

from hiper import PolicyOutput
from support.batch import append_keep_block
from support.distributed import equal_passes


def micro_batches(lengths, max_tokens, rows=None):
    """Rows sorted by length and cut so that rows x longest <= max_tokens -> list of row lists.

    lengths: of all rows; rows: the ones to use (default all). One row is always allowed.
    """
    rows = range(len(lengths)) if rows is None else rows
    cuts = []
    batch = []
    for n in sorted(rows, key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[n] > max_tokens:
            cuts.append(batch)
            batch = []
        batch.append(n)
    return [*cuts, batch] if batch else cuts


@torch.no_grad()
def compute_logprobs_and_values(policy, samples, batches, *, logprobs=True, values=True):
    """Forward `samples` in these micro-batches -> PolicyOutput on the CPU, in their order."""
    device = next(policy.parameters()).device
    shape = samples.masks.action.shape
    token_level = [torch.zeros(shape) for _ in range(2)]
    turn_level = [torch.zeros(shape[0]) for _ in range(3)]
    for rows in equal_passes(policy, batches):
        inputs = samples.model_inputs(rows or [0], device)
        output = policy(*inputs, logprobs=logprobs, values=values)
        if not rows:  # this pass only keeps the processes in step
            continue
        for whole, part in zip(token_level, output[:2], strict=True):
            if part is not None:
                whole[rows, : part.shape[1]] = part.float().cpu()
        for whole, part in zip(turn_level, output[2:], strict=True):
            if part is not None:
                whole[rows] = part.float().cpu()
    return PolicyOutput(*token_level, *turn_level)


def score(run, batch, batches, actor_learns=True):
    """-> (PolicyOutput of the N turns, reference log-probs, PolicyOutput of the final states,
    V_low of the carried subgoals [N]); the last three are None where they are not needed.

    run: its config, model, tokenizer and reference are used. batches: training scores the old
    policy in the micro-batches of the update, so that the ratio is 1 in the first PPO step.
    actor_learns: without it no reference is needed, since its KL trains the actor alone.
    """
    config = run.config
    old = compute_logprobs_and_values(run.model, batch.samples, batches)
    ref_logprobs = end_values = v_keep = None
    if run.reference and actor_learns:
        output = compute_logprobs_and_values(run.reference, batch.samples, batches)
        ref_logprobs = output.logprobs
    if config.has_critic and config.bootstrap:
        end_values = score_values(run, batch.final_states)
    if config.needs_keep_value:  # as if KEEP had been written
        prompts = batch.samples.prompts
        kept = append_keep_block(prompts, batch.prev_subgoals, run.tokenizer)
        v_keep = score_values(run, kept).v_low
    return old, ref_logprobs, end_values, v_keep


def score_values(run, samples):
    """PolicyOutput with values only."""
    batches = micro_batches(samples.total_lengths(), run.config.micro_batch_tokens)
    return compute_logprobs_and_values(run.model, samples, batches, logprobs=False)
