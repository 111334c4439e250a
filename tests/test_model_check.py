"""What `--model` cannot be is one sentence and exit code 2, before anything is written."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
)

import eval as evaluation
import train
from config import ConfigError
from conftest import tiny_config
from script_tools import assert_user_error
from support.cloning import tiny_model
from support.loading import check_output_layer, load_actor, load_tokenizer

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def words(**special):
    """A word-level tokenizer of three words."""
    vocabulary = {"go": 0, "take": 1, "[UNK]": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def make(kind, tokenizer):
    """-> (model, its tokenizer or None)"""
    rows = len(tokenizer)
    qwen = tiny_model(tokenizer, hidden=16, layers=1)
    if kind == "encoder-decoder":
        shape = T5Config(vocab_size=rows, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
        return T5ForConditionalGeneration(shape), tokenizer
    if kind == "masked":
        return BertForMaskedLM(BertConfig(vocab_size=rows, **SMALL)), tokenizer
    if kind == "state-space":
        shape = MambaConfig(vocab_size=rows, hidden_size=16, num_hidden_layers=1, state_size=4)
        return MambaForCausalLM(shape), tokenizer
    if kind == "headless":
        return Qwen2Model(qwen.config), tokenizer
    if kind == "classifier":
        return Qwen2ForSequenceClassification(qwen.config), tokenizer
    if kind == "short":
        shape = GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=64)
        return GPT2LMHeadModel(shape), tokenizer
    if kind == "other tokenizer":
        qwen.resize_token_embeddings(20)
    if kind == "endless":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=rows, max_position_embeddings=4096, **SMALL)
        ), words()
    return qwen, None if kind == "no tokenizer" else tokenizer


@pytest.mark.parametrize(
    "kind, said",
    [
        ("encoder-decoder", "an encoder-decoder: --model takes a causal LM"),
        ("masked", "a BertForMaskedLM: --model takes a causal LM"),
        ("state-space", "without attention and its KV cache"),
        ("headless", "a Qwen2Model: --model takes a causal LM"),
        ("classifier", "a Qwen2ForSequenceClassification"),
        ("short", "at most 64 tokens"),
        ("no tokenizer", "no tokenizer"),
        ("endless", "neither an end token nor a padding token"),
        ("other tokenizer", "do not belong together"),
        ("no weights", "no weights"),
    ],
)
def test_what_a_model_cannot_be(tiny_tokenizer, tmp_path, monkeypatch, capfd, kind, said):
    """In training, and with --plan or eval.py where that is the same code."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make(kind, tiny_tokenizer)
    model.save_pretrained("model")
    if tokenizer:
        tokenizer.save_pretrained("model")
    if kind == "no weights":
        (tmp_path / "model" / "model.safetensors").unlink()
    assert said in assert_user_error(train.main, ["--model", "model"], tmp_path, capfd)
    if kind == "masked":
        assert said in assert_user_error(evaluation.main, ["--model", "model"], tmp_path, capfd)
    if kind == "state-space":
        assert said in assert_user_error(
            train.main, ["--model", "model", "--plan"], tmp_path, capfd
        )


def test_a_model_that_reads_in_both_directions_is_refused(tiny_tokenizer):
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(vocab_size=64, **SMALL)).eval()
    with pytest.raises(ConfigError, match="reads in both directions"):
        check_output_layer(bert, tiny_config(model="bert"))


def test_the_check_of_the_output_layer_does_not_need_a_gpu(tiny_actor):
    """It runs on the CPU in float32, where flash attention does not."""

    def needs_a_gpu(*_, **__):
        raise RuntimeError("FlashAttention only supports fp16 and bf16 on a GPU")

    AttentionInterface.register("needs_a_gpu", needs_a_gpu)
    tiny_actor.set_attn_implementation("needs_a_gpu")
    check_output_layer(tiny_actor, tiny_config(attention="needs_a_gpu"))
    with pytest.raises(RuntimeError, match="on a GPU"):  # it is still the model's
        tiny_actor(input_ids=torch.tensor([[0, 1]]))


def test_weights_that_cannot_be_loaded_are_refused(tiny_actor, tmp_path):
    tiny_actor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_actor(tmp_path, tiny_config(), torch.float32)
    state = {name: value for name, value in tiny_actor.state_dict().items() if "norm" not in name}
    tiny_actor.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match="lack .*norm"):
        load_actor(tmp_path, tiny_config(), torch.float32)
    torch.nn.init.constant_(tiny_actor.lm_head.weight[3], torch.nan)
    tiny_actor.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="embed_tokens.weight holds NaN"):
        load_actor(tmp_path, tiny_config(), torch.float32)


def test_an_end_token_may_be_the_padding_token(tmp_path):
    """Generation needs both: each stands in for the other."""
    words(pad_token="go").save_pretrained(tmp_path / "pad")
    words(eos_token="take").save_pretrained(tmp_path / "eos")
    assert load_tokenizer(tmp_path / "pad").eos_token_id == 0
    assert load_tokenizer(tmp_path / "eos").pad_token_id == 1
