"""Bad input to train.py and eval.py: one sentence, exit code 2, nothing written or lost."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import eval as evaluation
import train
from config import FIELDS, ConfigError
from conftest import tiny_config
from script_tools import assert_user_error
from support import checkpoint, cloning, demonstrations
from support.arguments import read_config, read_eval_arguments, read_settings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with files that are no configuration, and one run that never learnt."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "on.yaml": b"on: 3\n",
        "number.yaml": b"7: 3\n",
        "list.yaml": b"lr: [1, 2]\n",
        "name.yaml": b"env: [household]\n",
        "binary.yaml": bytes(range(256)),
        "zeros.yaml": bytes(64),
        "latin.yaml": "model: \u00e9".encode("latin-1"),
        "deep.yaml": b"[" * 5000,
        "tabs.yaml": b"lr:\t1\n\tseed: 2\n",
        "twice.yaml": b"seed: 1\n---\nseed: 2\n",
        "date.yaml": b"seed: 2020-01-01\n",
        "tag.yaml": b"lr: !!python/object:os.system x\n",
        "nul.yaml": b'out: "a\\0b"\n',
        "text.yaml": b"just some words\n",
        "brackets.yaml": b"[]",
        "zero.yaml": b"0",
        "numbered.yaml": b"env_options: {1: 2}\n",
        "bom.yaml": "\ufefflr: what\n".encode(),
        "utf16.yaml": "lr: 1".encode("utf-16"),
        "leaves.py": b"import sys\nsys.exit(3)\n",
        "file": b"in the way",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, content in {
        "empty": "",
        "cut": '{"lr": 1e-',
        "list": "[]",
        "word": '"x"',
        "null": "null",
        "typed": '{"lr": "much"}',
        "bounds": '{"num_envs": 0, "bc_episodes": 1}',
        "none": '{"seed": null}',
        "unknown": '{"learning_rate": 1}',
    }.items():
        (tmp_path / name / "actor").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(content)
    return tmp_path


TRAIN = [
    ("on.yaml", "no field True"),
    ("number.yaml", "no field 7"),
    ("list.yaml", "--lr must be a number"),
    ("name.yaml", "--env must be text"),
    ("binary.yaml", "cannot read"),
    ("zeros.yaml", "cannot read"),
    ("latin.yaml", "cannot read"),
    ("deep.yaml", "cannot read"),
    ("tabs.yaml", "cannot read"),
    ("twice.yaml", "cannot read"),
    ("date.yaml", "--seed must be a whole number"),
    ("tag.yaml", "cannot read"),
    ("nul.yaml", "--out a"),
    ("text.yaml", "field: value"),
    ("brackets.yaml", "field: value"),
    ("zero.yaml", "field: value"),
    ("numbered.yaml", "--env_options must be a JSON object"),
    ("bom.yaml", "--lr must be a number"),
    ("utf16.yaml", "cannot read"),
    (".", "cannot read"),
    ("file/x.yaml", "cannot read"),
    ("~/no/such.yaml", "cannot read"),
    ("on.yaml on.yaml", "there is no flag 'on.yaml'"),
    ("-lr 1", "did you mean '--lr'?"),
    ("--learning_rat 1", "there is no flag '--learning_rat'"),
    ("--SEED 1", "did you mean '--seed'?"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999", "--seed must be at most"),
    ("--seed 1e3", "--seed must be a whole number"),
    ("--seed", "--seed"),
    ("--iterations 3.0", "--iterations must be a whole number"),
    ("--lr 1,5", "--lr must be a number"),
    ("--gamma=", "--gamma must be a number"),
    ("--bootstrap 2", "--bootstrap must be true or false"),
    ("--attention magic", "--attention must be eager or sdpa or flash_attention_2"),
    ("--env_options {", "--env_options must be a JSON object"),
    ("--env_options 3", "--env_options must be a JSON object"),
    ("--env_options null", "--env_options must be a JSON object"),
    ("--env_options " + "[" * 9000, "--env_options must be a JSON object"),
    ('--env_options {"max_steps":"x"}', "max_steps must be a whole number"),
    ('--env_options {"max_steps":-1}', "max_steps must be a whole number"),
    ('--env_options {"max_steps":true}', "max_steps must be a whole number"),
    ('--env_options {"workers":3}', "workers"),
    ('--env_options {"split":"seen"}', "split"),
    ('--env_options {"":1}', "make()"),
    ('--env_options {"chain":0}', "household's chain must be a whole number"),
    ('--env_options {"routine":"x"}', "household's routine must be a whole number"),
    ("--env household.py", "no world"),
    ("--env config", "no world"),
    ("--env leaves", "'leaves' does not work: SystemExit: 3"),
    ("--env ../x", "no world"),
    ("--env " + "x" * 300, "no world"),
    ("--out ~nobody_of_that_name/run", "there is no such user"),
    ("--out file", "not a run of this script"),
    ("--out file/run", "--out file/run cannot be made"),
    ("--out .", "not a run of this script"),
    ("--out " + "x" * 300, "cannot be made"),
    ("--out empty", "empty/config.json"),
    ("--out cut", "cut/config.json"),
    ("--out list", "list/config.json"),
    ("--out word", "word/config.json"),
    ("--out typed", "--lr must be a number"),
    ("--out unknown", "no setting 'learning_rate'"),
    ("--model ~/nothing", "no model"),
    ("--model file", "no model"),
    ("--model file/x", "no model"),
    ("--model https://example.org/x", "no model"),
]
EVAL = [
    ("empty", "empty/config.json"),
    ("cut", "cut/config.json"),
    ("list", "list/config.json"),
    ("null", "null/config.json"),
    ("typed", "--lr must be a number"),
    ("bounds", "--num_envs"),
    ("none", "--seed must be a whole number"),
    ("unknown", "no setting 'learning_rate'"),
    ("file", "file"),
    ("empty --json file/x", "no folder"),
    ("empty --json .", "no file that can be written"),
    ("empty --temperature nan", "--temperature"),
    ("empty --temperature -1", "--temperature"),
    ("empty --temperature 1e-40", "--temperature"),
    ("empty --seed -1", "--seed"),
    ("empty --seed 99999999999999999999", "--seed"),
    ("empty --episodes 1.5", "--episodes"),
    ("--model empty --env household", "no model"),
    ("--model empty --env household --env_options {", "--env_options"),
    ("--model empty --env " + "x" * 300, "no world"),
]


@pytest.mark.parametrize("words, said", TRAIN)
def test_train_refuses(folder, capfd, words, said):
    assert said in assert_user_error(train.main, words.split(" "), folder, capfd)


@pytest.mark.parametrize("words, said", EVAL)
def test_eval_refuses(folder, capfd, words, said):
    assert said in assert_user_error(evaluation.main, words.split(" "), folder, capfd)


def test_an_unknown_split_is_refused(folder, tiny_actor, tiny_tokenizer, capfd):
    tiny_actor.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    words = ["--model", "model", "--split", "test"]
    assert "household has no split 'test'" in assert_user_error(
        evaluation.main, words, folder, capfd
    )


def test_a_folder_that_may_not_be_written(folder, capfd, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = assert_user_error(train.main, ["--out", "new"], folder, capfd)
    assert "--out new cannot be made or written: Permission denied" in said


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "mine.yaml").write_text("seed: 5\n")
    config = read_config(["~/mine.yaml", "--out", "~/run", "--model", "~/model"])
    assert (config.seed, config.out) == (5, f"{folder}/run")
    assert config.model == f"{folder}/model"
    args = read_eval_arguments(["~/run", "--json", "~/result.json"])
    assert (args.out, args.json) == (folder / "run", folder / "result.json")


def test_a_failed_first_try_does_not_block_the_next(folder):
    """The folder holds settings and nothing learnt: the corrected command takes it."""
    out = folder / "run"
    checkpoint.prepare_run_dir(out, tiny_config(lr=1.0)).close()
    checkpoint.prepare_run_dir(out, tiny_config(lr=0.5)).close()
    assert read_settings(out / "config.json").lr == 0.5


def test_until_the_first_checkpoint_only_what_shaped_the_clone_must_stay(folder, capfd):
    out = folder / "run"
    (out / "start").mkdir(parents=True)
    checkpoint.prepare_run_dir(out, tiny_config(lr=5.0)).close()
    for changes in (dict(gamma=0.5), dict(history=1), dict(seed=1), dict(bc_episodes=7)):
        with pytest.raises(ConfigError, match=f"another run .{next(iter(changes))} "):
            checkpoint.prepare_run_dir(out, tiny_config(lr=5.0, **changes))
    checkpoint.prepare_run_dir(out, tiny_config(lr=6e-4, kl_coef=0.1)).close()
    assert "lr 5.0 before, 0.0006 now" in capfd.readouterr().out
    (out / "checkpoint.old").mkdir()
    with pytest.raises(ConfigError, match="another run"):
        checkpoint.prepare_run_dir(out, tiny_config(lr=5.0, kl_coef=0.1))


def test_what_cloning_reads_is_known_to_shape_it():
    source = Path(cloning.__file__).read_text() + Path(demonstrations.__file__).read_text()
    read = set(re.findall(r"\bconfig\.(\w+)", source))
    assert {"gamma", "bc_episodes", "num_envs"} < read <= checkpoint.CLONED | checkpoint.FREE


def test_a_configuration_with_and_without_versions(folder):
    """config.json says what a run is made with; a run of other versions, or of a time when they
    were not recorded, is the same run."""
    out = folder / "run"
    config = tiny_config(out=str(out))
    checkpoint.prepare_run_dir(out, config).close()
    saved = json.loads((out / "config.json").read_text())
    assert saved["versions"] == checkpoint.versions()
    if (Path(checkpoint.__file__).parent.parent / ".git").exists():
        assert len(saved["versions"]["commit"].split("-dirty-")[0]) == 40
    (out / "checkpoint").mkdir()
    for versions in ({"versions": {"torch": "1.0"}}, {}):
        old = {**dataclasses.asdict(config), **versions}
        (out / "config.json").write_text(json.dumps(old))
        assert read_settings(out / "config.json") == config
        assert checkpoint.differences(out / "config.json", dataclasses.asdict(config)) == {}
        checkpoint.prepare_run_dir(out, config).close()
    with pytest.raises(ConfigError, match="another run"):
        checkpoint.prepare_run_dir(out, dataclasses.replace(config, lr=1.0))


def test_other_numbers_of_processes_and_threads_are_said(folder, capfd):
    """They are recorded. A run that goes on with others is another run from there on."""
    import torch

    out = folder / "run"
    config = tiny_config(out=str(out))
    checkpoint.prepare_run_dir(out, config, 2).close()
    counts = {"processes": 2, "threads": torch.get_num_threads()}
    assert json.loads((out / "config.json").read_text())["counts"] == counts
    checkpoint.prepare_run_dir(out, config, 3).close()  # nothing was learnt yet
    (out / "checkpoint").mkdir()
    checkpoint.prepare_run_dir(out, config, 3).close()
    assert capfd.readouterr().out == ""
    checkpoint.prepare_run_dir(out, config, 1).close()
    said = capfd.readouterr().out
    assert "goes on with 1 processes (3 before). From here on it is another run" in said
    saved = json.loads((out / "config.json").read_text())
    del saved["counts"]  # a run of an earlier version
    (out / "config.json").write_text(json.dumps(saved))
    checkpoint.prepare_run_dir(out, config, 1).close()
    assert capfd.readouterr().out == ""


def test_the_largest_seed_can_be_used():
    """NumPy's seeds end at 2**32."""
    from types import SimpleNamespace

    config = tiny_config(seed=FIELDS["seed"].metadata["high"])
    run = SimpleNamespace(
        config=config,
        accelerator=SimpleNamespace(process_index=3),
        optimizer=SimpleNamespace(param_groups=[{}, {}]),
    )
    assert train.start_iteration(run, 7) > 0
