"""Copy a finished run into a small folder: `python examples/make.py RUN FOLDER`.

Kept are the settings, the log, the actor and the critic, the weights in half precision; that is
what eval.py, the viewer and the report need. Training cannot go on from it.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(run, place):
    if place.exists():
        sys.exit(f"error: {place} exists already")
    (place / "checkpoint").mkdir(parents=True)
    settings = json.loads((run / "config.json").read_text())
    settings["out"] = str(place)
    (place / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    for name in ("metrics.jsonl", "evals.jsonl"):
        shutil.copy(run / name, place)
    actor = AutoModelForCausalLM.from_pretrained(run / "actor", dtype=torch.float16)
    actor.save_pretrained(place / "actor")
    AutoTokenizer.from_pretrained(run / "actor").save_pretrained(place / "actor")
    state = torch.load(run / "checkpoint" / "pytorch_model.bin", weights_only=True)
    critic = {name: w.half() for name, w in state.items() if not name.startswith("actor.")}
    torch.save(critic, place / "checkpoint" / "pytorch_model.bin")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/make.py RUN FOLDER")
    main(*map(Path, sys.argv[1:]))
