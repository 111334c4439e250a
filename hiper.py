"""HiPER: the plan-execute policy, its advantages and its loss.

Each turn one LLM plans and executes. It writes three blocks,

    <switch>KEEP|SWITCH</switch><subgoal>...</subgoal><action>...</action>

so the policy factorises (paper, section 3):

    pi(q, o, a | s) = pi(q | s, o_prev) pi(o | s)^q pi(a | s, o)

and the policy gradient has one term per decision, each with its own advantage (Theorem 4.1):

    grad J = E sum_t [ grad log pi(q_t) A_switch + q_t grad log pi(o_t) A_high
                       + grad log pi(a_t) A_low ]

One turn in this file: `plan_execute_prompt` -> (generate) -> `parse` -> (environment step) ->
`decision_masks` -> `ActorCritic` -> `hiper_advantages` -> `policy_loss`, `kl_k3`, `value_loss`.

Notation: N turns (samples), P prompt tokens, L response tokens, H hidden size, B episodes,
T turns of the longest episode; q switch, o subgoal, a action, s state (prompt).

Deviations from the paper
    1. The KL to the reference runs over all response tokens, the policy term over the trained
       ones, and both are divided by the number of response tokens. Tokens that no decision
       trains (KEEP's subgoal, text outside the blocks) may have a KL weight of their own.
    2. `normalize=jointly` scales the three advantages together (see `normalize_decisions`).
Deviations from the released code
    3. Masks come from the sampled ids, not from text that is tokenised again.
    4. One token-weighted mean over all processes and micro-batches, not a mean of means.
    5. On KEEP the carried subgoal stays, whatever the subgoal block repeats.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import DECISIONS
from hae import hae, switch_gain
from support.protocol import (  # noqa: F401, prompt, parser and masks belong to the method
    Decision,
    Masks,
    decision_masks,
    flat_prompt,
    format_flat_response,
    format_plan,
    format_response,
    parse,
    parse_flat,
    plan_execute_prompt,
    subgoal_positions,
)

# ---- actor-critic ------------------------------------------------------------------------------


class PolicyOutput(NamedTuple):
    """What one forward pass says of N turns; None for what was not asked for."""

    logprobs: torch.Tensor  # [N, L] log pi of each response token, 0 on padding
    entropy: torch.Tensor  # [N, L] without gradient
    v_high: torch.Tensor  # [N] V_high(s)            read at the last prompt token
    v_low: torch.Tensor  # [N] V_low(s, o)          read at the end of the subgoal block
    v_switch: torch.Tensor  # [N] V_switch(s, o_prev)  read at the last prompt token

    def value(self, head):
        """[N] of head "high", "low" or "switch"."""
        return getattr(self, f"v_{head}")


class ActorCritic(nn.Module):
    """A causal LM with three linear value heads.

    critic: "shared" puts the heads on the actor's backbone, "separate" on a copy of it, "none"
    leaves them out (group methods, reference). The heads compute in float32: advantages are
    differences of values, and near 10 bfloat16 has steps of 0.06.
    """

    def __init__(self, actor, critic="shared"):
        super().__init__()
        if critic not in ("separate", "shared", "none"):
            raise ValueError(f"critic must be separate, shared or none, not {critic!r}")
        self.actor = actor
        self.critic = deepcopy(actor.base_model) if critic == "separate" else None
        self.value_heads = None
        if critic != "none":
            self.value_heads = nn.Linear(actor.config.hidden_size, 3)  # V_high, V_low, V_switch
            nn.init.zeros_(self.value_heads.weight)
            nn.init.zeros_(self.value_heads.bias)

    def forward(
        self, ids, prompt_lengths, response_lengths, subgoal_pos, *, logprobs=True, values=True
    ):
        """Score N turns -> PolicyOutput.

        ids: int [N, P + L], each row prompt then response, right-padded: causal attention needs
        no mask then, and positions equal those of generation. prompt_lengths,
        response_lengths: int [N] tokens. subgoal_pos: int [N], see `subgoal_positions`.
        """
        token_logprobs = entropy = v_high = v_low = v_switch = None
        hidden = None
        if logprobs or self.critic is None:
            hidden = last_hidden_state(self.actor.base_model, ids)  # [N, P + L, H]
        if logprobs:
            token_logprobs, entropy = response_logprobs(
                hidden, ids, prompt_lengths, response_lengths, self.actor.get_output_embeddings()
            )
        if values and self.value_heads is not None:
            if self.critic is not None:
                hidden = last_hidden_state(self.critic, ids)
            rows = torch.arange(len(ids), device=ids.device)
            v_high, _, v_switch = self._values(hidden[rows, prompt_lengths - 1])
            _, v_low, _ = self._values(hidden[rows, prompt_lengths + subgoal_pos])
        return PolicyOutput(token_logprobs, entropy, v_high, v_low, v_switch)

    def _values(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_heads(hidden.float())  # [N, 3]
        return [column.clone() for column in values.unbind(1)]  # [N] each; FSDP2 wants no views


def last_hidden_state(backbone, ids):
    """[N, S] ids -> [N, S, H]. The residual stream is float32 where autocast is on.

    So a bfloat16 reference computes exactly what a float32 policy with the same weights does.
    """
    embedded = backbone.get_input_embeddings()(ids)
    if torch.is_autocast_enabled(ids.device.type):
        embedded = embedded.float()
    return backbone(inputs_embeds=embedded, use_cache=False).last_hidden_state


def response_logprobs(hidden, ids, prompt_lengths, response_lengths, output_layer):
    """Log-probability and entropy of the response tokens -> float32 [N, L], [N, L]."""
    width = int(response_lengths.max())
    in_response = torch.arange(width, device=ids.device) < response_lengths[:, None]  # [N, L]
    row, column = in_response.nonzero(as_tuple=True)  # [M] each
    pos = prompt_lengths[row] + column  # [M] the response tokens' places in `ids`
    logprobs, entropy = logprobs_and_entropy(hidden[row, pos - 1], ids[row, pos], output_layer)
    empty = torch.zeros(in_response.shape, device=ids.device)
    return empty.index_put((in_response,), logprobs), empty.index_put((in_response,), entropy)


def logprobs_and_entropy(hidden, targets, output_layer, chunk=2**25):
    """Log-probability and entropy of M tokens, without all [M, V] logits in memory at once.

    hidden: [M, H]; targets: int [M]; chunk: logits in memory at once. -> float32 [M], [M].
    """

    def score_chunk(hidden_chunk, target_chunk):
        logits = output_layer(hidden_chunk).float()  # [m, V]
        log_z = logits.logsumexp(-1)
        with torch.no_grad():
            log_p = logits - log_z[:, None]  # not the logits, whose size would multiply roundings
            entropy = -log_p.exp().mul_(log_p).sum(-1)
        return logits.gather(-1, target_chunk[:, None]).squeeze(-1) - log_z, entropy

    rows = max(1, chunk // output_layer.weight.shape[0])
    if len(hidden) <= rows:
        return score_chunk(hidden, targets)
    parts = [
        checkpoint(score_chunk, hidden_chunk, target_chunk, use_reentrant=False)
        for hidden_chunk, target_chunk in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# ---- advantages --------------------------------------------------------------------------------


class TokenAdvantages(NamedTuple):
    """What a method hands to the PPO update."""

    advantages: torch.Tensor  # [N, L] each token's advantage
    token_mask: torch.Tensor  # bool [N, L], the tokens that are trained
    targets: dict  # value head -> (target [N], bool [N] where it has one)
    raw: dict  # name -> [B, T], before normalisation, for people to read


def hiper_advantages(batch, old, config, normalize, *, end_values, v_keep=None):
    """HiPER: the advantages of switch, subgoal and action, each on its own tokens.

    batch: support.batch.Batch; old: PolicyOutput of the turns; end_values: of the states after
    each episode's last turn, None to count truncated episodes as ended. normalize:
    `hae.normalize` over all processes. v_keep: [N] V_low(s_t, o_{t-1}), needed by
    switch_advantage=closed_form.
    """
    estimates, targets = _estimate(batch, old, config, end_values=end_values, v_keep=v_keep)
    opens = batch.switch & batch.mask  # [B, T] a subgoal is chosen
    decides = batch.mask.clone()  # [B, T] the agent chooses between KEEP and SWITCH:
    decides[:, 0] = False  # not at turn 0,
    decides &= config.segments == "learned"  # nor where segments are imposed
    trained = config.decisions.split(",")
    where = {"switch": decides, "subgoal": opens, "action": batch.mask}
    for kind, mask in batch.samples.masks._asdict().items():  # a malformed turn may lack a block
        where[kind] = where[kind] & batch.to_grid(mask.any(1)) & (kind in trained)
    scaled = normalize_decisions(estimates, where, normalize, config.normalize)
    advantages, token_mask = token_advantages(
        batch.samples.masks,
        {kind: batch.to_turns(turns) for kind, turns in where.items()},
        {kind: batch.to_turns(estimate) for kind, estimate in scaled.items()},
    )
    everywhere = batch.to_turns(batch.mask)  # [N] all True
    value_targets = {
        "high": (batch.to_turns(targets.ret_high), batch.to_turns(opens)),
        "low": (batch.to_turns(targets.ret_low), everywhere),
        "switch": (batch.to_turns(targets.ret_switch), everywhere),
    }
    raw = {f"A_{kind}": estimates[kind] * batch.mask for kind in ("subgoal", "action", "switch")}
    return TokenAdvantages(advantages, token_mask, value_targets, raw)


def _estimate(batch, old, config, *, end_values, v_keep):
    """-> ({decision: advantage [B, T]}, the HAE that holds the value targets)."""
    v_high, v_low, v_switch = (batch.to_grid(old.value(h)) for h in ("high", "low", "switch"))
    end_high = end_low = None  # a truncated episode counts as ended
    if end_values is not None:
        end_high = end_values.v_high * batch.truncated  # [B]
        end_low = end_values.v_low * batch.truncated
    inputs = dict(
        rewards=batch.rewards,
        switch=batch.switch,
        mask=batch.mask,
        v_high=v_high,
        v_low=v_low,
        v_switch=v_switch,
        gamma=config.gamma,
        end_high=end_high,
        end_low=end_low,
    )
    estimate = hae(**inputs, lam_low=config.lam_low, lam_high=config.lam_high)
    targets = estimate
    if config.value_target == "td0":  # the paper's one-step targets
        targets = hae(**inputs, lam_low=0.0, lam_high=0.0)
    adv_switch = estimate.adv_switch
    if config.switch_advantage == "closed_form":  # the paper's
        p_written = (old.logprobs * batch.samples.switch_word).sum(1).exp()  # [N] of the word
        p_switch = torch.where(batch.to_turns(batch.switch), p_written, 1 - p_written)
        v_keep = batch.to_grid(v_keep)
        adv_switch = switch_gain(batch.switch, batch.to_grid(p_switch), v_high, v_keep)
    advantages = {
        "switch": adv_switch,
        "subgoal": estimate.adv_subgoal,
        "action": estimate.adv_action,
    }
    return advantages, targets


def normalize_decisions(advantages, where, normalize, how):
    """Centre each decision's advantages [B, T]; scale them to unit variance, jointly or each.

    "jointly" keeps the proportions that the policy gradient has (Theorem 4.1). "per_decision"
    (the paper) weights solved and unsolved decisions equally.
    """
    if how == "per_decision":
        return {kind: normalize(advantages[kind], where[kind]) for kind in DECISIONS}
    centred = [normalize(advantages[kind], where[kind], scale=False) for kind in DECISIONS]
    together = torch.cat([where[kind] for kind in DECISIONS], 1)
    scaled = normalize(torch.cat(centred, 1), together)  # [B, 3 T]
    return dict(zip(DECISIONS, scaled.chunk(3, 1), strict=True))


def token_advantages(masks, where, advantages):
    """Put each decision's advantage on that decision's tokens (Theorem 4.1).

    masks: Masks [N, L]; where: {decision: bool [N], the turns that take it}; advantages:
    {decision: [N]}. -> (advantages [N, L], trained tokens bool [N, L]).
    """
    switch = masks.switch & where["switch"][:, None]
    subgoal = masks.subgoal & where["subgoal"][:, None]  # q_t: none on KEEP turns
    action = masks.action & where["action"][:, None]

    term_q = switch * advantages["switch"][:, None]  # grad log pi(q_t) A_switch
    term_o = subgoal * advantages["subgoal"][:, None]  # q_t grad log pi(o_t) A_high
    term_a = action * advantages["action"][:, None]  # grad log pi(a_t) A_low
    return term_q + term_o + term_a, switch | subgoal | action


# ---- loss --------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, clip_range=0.2):
    """PPO's clipped surrogate, to be minimised; and whether the clip was active. Both [N, L]."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss, (clipped * advantages < ratio * advantages).detach()


def kl_k3(logprobs, ref_logprobs):
    """Schulman's k3 estimator of KL(pi || ref), [N, L]: exp(d) - d - 1, d = log ref - log pi."""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def value_loss(value, old_value, target, value_clip=0.5):
    """Half the squared error [N]: the larger of the free and the clipped value's; 0: no clip."""
    loss = (value - target) ** 2
    if value_clip:
        near = old_value + (value - old_value).clamp(-value_clip, value_clip)
        loss = torch.maximum(loss, (near - target) ** 2)
    return loss / 2
