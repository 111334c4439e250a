"""What training makes of episodes: samples (prompt, response) and padded [B, T] arrays.

B episodes, T turns of the longest, N turns in all, P prompt tokens, L response tokens.
"""

from dataclasses import dataclass

import torch

import hiper
from hiper import Masks
from support.generation import tokenize_texts
from support.protocol import switch_words


@dataclass(frozen=True)
class Samples:
    """N (prompt, response) pairs, as `ActorCritic` scores them."""

    prompts: list  # N id lists
    responses: list  # N id lists
    lengths: torch.Tensor  # int [N] response tokens
    masks: Masks  # bool [N, L] each
    switch_word: torch.Tensor  # bool [N, L], see support.protocol.switch_words
    subgoal_pos: torch.Tensor  # int [N] where V_low is read, see hiper.subgoal_positions

    def model_inputs(self, rows, device):
        """The arguments of `ActorCritic.forward` for these rows (a list)."""
        sequences = [self.prompts[n] + self.responses[n] for n in rows]
        width = max(len(sequence) for sequence in sequences)
        ids = [sequence + [0] * (width - len(sequence)) for sequence in sequences]  # right-padded
        prompt_lengths = [len(self.prompts[n]) for n in rows]
        return (
            torch.tensor(ids, device=device),  # [n, P + L]
            torch.tensor(prompt_lengths, device=device),  # [n]
            self.lengths[rows].to(device),  # [n]
            self.subgoal_pos[rows].to(device),  # [n]
        )

    def response_mask(self):
        """bool [N, L]: all response tokens, whatever they say."""
        return torch.arange(self.masks.action.shape[1]) < self.lengths[:, None]

    def total_lengths(self):
        """N lengths of prompt and response together."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [len(prompt) + len(response) for prompt, response in pairs]


def make_samples(prompts, responses, tokenizer):
    """Id lists -> Samples. The masks are read from the sampled ids."""
    lengths = torch.tensor([len(response) for response in responses])
    width = int(lengths.max())
    ids = torch.tensor([response + [0] * (width - len(response)) for response in responses])
    return Samples(
        prompts=prompts,
        responses=responses,
        lengths=lengths,
        masks=hiper.decision_masks(ids, lengths, tokenizer),
        switch_word=switch_words(ids, lengths, tokenizer),
        subgoal_pos=hiper.subgoal_positions(ids, lengths, tokenizer),
    )


@dataclass(frozen=True)
class Batch:
    """Episodes as hae.py wants them; arrays are [B, T] where nothing else is said."""

    samples: Samples  # the N turns, episode after episode
    final_states: Samples  # the B states after the last turns, with the carried subgoal kept
    episode_idx: torch.Tensor  # int [N]
    turn_idx: torch.Tensor  # int [N]
    mask: torch.Tensor  # bool: the turn exists
    rewards: torch.Tensor  # float
    switch: torch.Tensor  # bool: a segment starts
    state: torch.Tensor  # int, equal numbers for equal observations
    progress: torch.Tensor  # float: of the task after the turn, 0 where the world tells none
    truncated: torch.Tensor  # bool [B]
    group: torch.Tensor  # int [B], equal numbers for the episodes of one drawn task
    prev_subgoals: list  # N texts: o_{t-1}

    def to_grid(self, turns):
        """[N] -> [B, T], zero off the mask."""
        grid = turns.new_zeros(self.mask.shape)
        return grid.index_put((self.episode_idx, self.turn_idx), turns)

    def to_turns(self, grid):
        """[B, T] -> [N]"""
        return grid[self.episode_idx, self.turn_idx]


def make_batch(episodes, tokenizer, group_size=1):
    """Episodes -> Batch. Each `group_size` episodes in a row are of one drawn task."""
    turns = [turn for episode in episodes for turn in episode.turns]
    episode_idx = [b for b, episode in enumerate(episodes) for _ in episode.turns]
    turn_idx = [t for episode in episodes for t in range(len(episode.turns))]
    place = (torch.tensor(episode_idx), torch.tensor(turn_idx))
    shape = (len(episodes), max(turn_idx) + 1)
    number_of = {}  # observation -> its number
    states = [number_of.setdefault(turn.observation, len(number_of)) for turn in turns]

    def grid(values, dtype):
        return torch.zeros(shape, dtype=dtype).index_put(place, torch.tensor(values, dtype=dtype))

    return Batch(
        samples=make_samples(
            [turn.prompt for turn in turns], [turn.response for turn in turns], tokenizer
        ),
        final_states=append_keep_block(
            [episode.final_prompt for episode in episodes],
            [episode.turns[-1].subgoal for episode in episodes],
            tokenizer,
        ),
        episode_idx=place[0],
        turn_idx=place[1],
        mask=grid([True] * len(turns), torch.bool),
        rewards=grid([turn.reward for turn in turns], torch.float),
        switch=grid([turn.is_segment_start for turn in turns], torch.bool),
        state=grid(states, torch.long),
        progress=grid([turn.progress for turn in turns], torch.float),
        truncated=torch.tensor([episode.truncated for episode in episodes]),
        group=torch.arange(len(episodes)) // group_size,
        prev_subgoals=[turn.prev_subgoal for turn in turns],
    )


def append_keep_block(prompts, subgoals, tokenizer):
    """Samples as if KEEP and the carried subgoal had been written: the counterfactual V_low."""
    texts = [hiper.format_plan(subgoal, switch=False) for subgoal in subgoals]
    blocks = tokenize_texts(tokenizer, texts)
    return make_samples(prompts, blocks, tokenizer)
