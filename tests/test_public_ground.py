"""The code stands on the public interfaces of its libraries: nothing private, nothing patched."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SOURCES = {"tests", "runs", *(path.parent.name for path in ROOT.glob("*/pyvenv.cfg"))}
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not NOT_SOURCES & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
OURS = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}

# Documented in spite of their names: NamedTuple's methods, and leaving a process at once.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}
# TextWorld has no public way to bound its caches.
EXCEPTIONS = {
    "worlds/alfworld_engine.py": {"_entity_infos", "_parse_and_convert", "_memento_cache"},
}
PATCHED = {"forward", "generation_config", "generate"}  # of somebody else's objects


def is_private(name):
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not dunder and name not in PUBLIC


def root_of(node):
    """The name that an expression begins with: `a` of `a.b[0].c()`; else None."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return None
    return node.id


def assigned(node):
    """The targets of an assignment, tuples and lists unpacked."""
    targets = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars:
        targets = [node.optional_vars]
    parts = []
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        else:
            parts.append(target.value if isinstance(target, ast.Starred) else target)
    return parts


def named_attribute(node):
    """The attribute in getattr(x, "name"), setattr, delattr, hasattr; and the function's name."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None, None
    if node.func.id not in ("getattr", "setattr", "delattr", "hasattr") or len(node.args) < 2:
        return None, None
    name = node.args[1]
    return (name.value if isinstance(name, ast.Constant) else None), node.func.id


def imported_names(tree):
    """{name in this file: the top-level package that it comes from}"""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                names[alias.asname or package] = package
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = node.module.split(".")[0]
    return names


def findings(source, allowed=()):
    """What in a source file is private or patched -> list of "line: what"."""
    tree = ast.parse(source)
    imported = imported_names(tree)
    found = []

    def is_ours(node):
        root = root_of(node)
        if root in ("self", "cls"):
            return isinstance(node, ast.Name)  # not what self holds
        return imported.get(root) in OURS

    def report(node, what):
        found.append(f"{node.lineno}: {what}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not is_ours(node.value) and node.attr not in allowed:
                report(node, f"private attribute {node.attr}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in OURS:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            for name in filter(is_private, names):
                report(node, f"private import {name}")
        if isinstance(node, ast.Import):
            for name in filter(
                is_private, (part for a in node.names for part in a.name.split("."))
            ):
                report(node, f"private import {name}")
        name, function = named_attribute(node)
        if isinstance(name, str):
            if is_private(name) and name not in allowed and not is_ours(node.args[0]):
                report(node, f"private attribute {name} by {function}")
            if function == "setattr" and name in PATCHED:
                report(node, f"patched {name}")
        for target in assigned(node):
            if not isinstance(target, ast.Attribute):
                continue
            if target.attr in PATCHED:
                report(target, f"patched {target.attr}")
            package = imported.get(root_of(target))
            switch = ast.unparse(target).startswith("torch.backends.")
            if package and package not in OURS | sys.stdlib_module_names and not switch:
                report(target, f"patched {package}: {target.attr}")
        if isinstance(node, ast.keyword) and node.arg == "custom_generate":
            report(node.value, "custom_generate")
        if isinstance(node, ast.Name | ast.Attribute):
            if "custom_generate" in (getattr(node, "id", ""), getattr(node, "attr", "")):
                report(node, "custom_generate")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_and_nothing_patched(path):
    name = path.relative_to(ROOT).as_posix()
    found = findings(path.read_text(), EXCEPTIONS.get(name, ()))
    assert not found, f"{name}: " + "; ".join(found)


def test_no_source_mentions_custom_generate():
    for path in SOURCES:
        assert "custom_generate" not in path.read_text(), path


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions_are_needed(name):
    """One that is gone from the code is to be taken out of the list."""
    text = (ROOT / name).read_text()
    assert all(re.search(rf"\b{attribute}\b", text) for attribute in EXCEPTIONS[name])


def test_the_sources_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"hiper.py", "train.py", "support/generation.py", "worlds/household.py"} <= names
    assert not any("test" in name for name in names)
    assert len(names) > 30
    assert not OURS & {"torch", "transformers", "accelerate"}
    assert not OURS & (set(sys.stdlib_module_names) - {"__init__"})


@pytest.mark.parametrize(
    "bad",
    [
        "model._no_split_modules",
        "len(model._modules)",
        "config._attn_implementation = 'sdpa'",
        "protocol._body(block)",
        "generation_config._eos_token_tensor",
        "self.model._tied_weights_keys",
        "self.accelerator._models[0]",
        "cls.model._keys",
        "torch._C._cuda_init()",
        "torch.nn.functional._in_projection(x)",
        "import torch\nx = torch._dynamo.config",
        "import torch._dynamo",
        "from torch._inductor import config",
        "from transformers.generation.utils import _speculative_sampling",
        "from transformers import modeling_utils as m\nm._init_weights = False",
        "getattr(model, '_hf_hook')",
        "getattr(model, '_hf_hook', None)",
        "hasattr(accelerator, '_schedulers')",
        "setattr(model, '_is_stateful', True)",
        "model.forward = mine",
        "model.layers[0].forward = mine",
        "self.actor.forward, x = mine, 1",
        "setattr(model, 'forward', mine)",
        "actor.generation_config = config",
        "own, actor.generation_config = actor.generation_config, config",
        "actor.generate = mine",
        "actor.generate(ids, custom_generate=loop)",
        "actor.generate(ids, **{custom_generate: loop})",
        "import torch\ntorch.nn.Linear.reset_parameters = mine",
        "import torch.nn as nn\nnn.Linear = Mine",
        "from transformers import Qwen2ForCausalLM\nQwen2ForCausalLM.loss_function = mine",
    ],
)
def test_what_must_be_found(bad):
    assert findings(bad)


@pytest.mark.parametrize(
    "good",
    [
        "self._values(hidden)",
        "cls._read()",
        "def f(self):\n    self._cache = 1",
        "getattr(self, '_cache', None)",
        "_private_function(1)",
        "model.__class__",
        "output._replace(v_low=x)",
        "values._asdict()",
        "os._exit(0)",
        "from support.protocol import _body",
        "from support import protocol\nprotocol._body(block)",
        "module.training = True",
        "parameter.grad = None",
        "plugin.mixed_precision_policy = policy",
        "tokenizer.pad_token_id = 0",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True",
        "import os\nos.environ['A'] = '1'",
        "import sys\nsys.argv = ['x']",
        "forward = model.forward",
        "actor.generation_config.min_p",
        "actor.generate(input_ids=ids)",
        "class A:\n    def forward(self):\n        self.length = 1",
    ],
)
def test_what_may_be_written(good):
    assert not findings(good)
