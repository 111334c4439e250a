"""What the parts of benchmarks/gpu.py share: a made-up world, the policy and its device."""

import copy
import gc
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator

from config import Config
from rollout import AgentState, build_prompts
from support.scoring import compute_logprobs_and_values, micro_batches

# ---- the made-up world -------------------------------------------------------------------------


class World:
    """Episode `index` has 1 to `longest` turns. Actions fill the prompt and change nothing."""

    longest = 8
    actions = 50  # about so many are admissible

    def __init__(self, split, index):
        self.index = index
        self.turn = 0
        self.last = 1 + 29 * index % self.longest

    def reset(self, seed=None):
        count = self.actions * (8 + (self.index + self.turn) % 5) // 10
        return f"You are at shelf {self.turn}. On it you see nothing.", {
            "task": "put a clean mug in shelf 3",
            "task_type": "made-up",
            "won": False,
            "score": 0.0,
            "admissible": [f"take mug {n} from shelf {n % 20}" for n in range(count)],
        }

    def step(self, action):
        self.turn += 1
        observation, info = self.reset()
        return observation, 0.0, self.turn == self.last, False, info

    def close(self):
        pass


made_up = ModuleType("made_up_world")
made_up.SPLITS = ("train",)
made_up.size = lambda split: 10**6
made_up.make = World
sys.modules["made_up_world"] = made_up


# ---- what the parts share ----------------------------------------------------------------------


class Lab:
    """The flags, the device and, once `build` has run, tokenizer, sizes and policy."""

    def __init__(self, args):
        self.args = args
        self.gpu = torch.cuda.is_available()
        self.accelerator = Accelerator(mixed_precision="bf16", cpu=not self.gpu)
        self.device = self.accelerator.device
        self.policy = torch.nn.Identity()
        self.flops = self.bandwidth = math.nan
        self.config = Config(
            max_prompt_tokens=2 * args.prompt, max_new_tokens=args.response, lr=0.0, critic_lr=0.0
        )

    def tokens_that_fit(self):
        """Of a small and a large micro-batch: without checkpointing 8192 need 114 GB, 2048 72."""
        memory = torch.cuda.get_device_properties(0).total_memory if self.gpu else math.inf
        return [8192, 16384] if memory > 120e9 else [2048, 8192]

    def states(self, n):
        return [AgentState(self.config, i, *World("train", i).reset()) for i in range(n)]

    def prompts(self, n):
        """First prompts of n episodes, as ids."""
        return build_prompts(self.states(n), self.tokenizer)

    def actor(self, half):
        """-> (float32 weights as train.py has them, or a bf16 copy; the context to generate in)"""
        if not half:
            return self.policy.actor, self.accelerator.autocast()
        actor = copy.deepcopy(self.policy.actor)
        for p in actor.parameters():  # not the rotation's frequencies, which are buffers
            p.data = p.data.bfloat16()
        self.peak()  # that of copying is of no interest
        return actor, nullcontext()

    def score(self, samples, tokens, policy=None):
        batches = micro_batches(samples.total_lengths(), tokens)
        with self.accelerator.autocast():
            return compute_logprobs_and_values(policy or self.policy, samples, batches)

    def checkpointing(self, on):
        for backbone in (self.policy.actor, self.policy.critic):
            if on:
                backbone.activation_checkpointing_enable()
            else:
                backbone.gradient_checkpointing_disable()

    def clean(self):
        """Nothing of a part stays behind, not even of one that failed."""
        self.policy.zero_grad()
        self.policy.eval()
        gc.collect()
        torch.cuda.empty_cache()  # nothing without a GPU
        self.peak()

    def peak(self):
        """GB allocated at most since the last call; nan without a GPU."""
        if not self.gpu:
            return math.nan
        most = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return most
