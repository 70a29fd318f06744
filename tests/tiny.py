"""Tiny networks and a tokenizer, built in the process from configs: no downloads, two layers, vocabulary 128."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 128
HIDDEN = 32
SPECIAL = ["<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "system user assistant a b c d e f g h i j k l m n o p q r s t u v w x y z yes no maybe the cat dog sat on mat "
    "one two three four five six seven eight nine ten red green blue question answer hello world good bye"
)

#: ChatML, as SmolLM2 has it, without `{% generation %}` marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} \n {{ message['content'] }} <|im_end|> \n "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE, pad_token: str = "<pad>", eos_token: str = "<|im_end|>"):
    """A word-level tokenizer of 128 entries: words stand between blanks, a newline is a word of its own."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, "\n", *dict.fromkeys(TEXT.split())]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    assert len(words) == VOCABULARY
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad_token,
        eos_token=eos_token,
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<eos>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(dropout: float = 0.0, tie: bool = False, layers: int = 2, hidden: int = HIDDEN, **kwargs: Any):
    """A Llama with two layers and grouped keys; `dropout` is that of attention, the only one it has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attention_dropout": dropout,
        "tie_word_embeddings": tie,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 4,
    }
    return _built(LlamaForCausalLM, LlamaConfig, {**settings, **kwargs})


def tiny_gpt2(dropout: float = 0.0, layers: int = 2, hidden: int = HIDDEN, **kwargs: Any):
    """A GPT-2 with two layers and a tied head; `dropout` acts on embeddings, attention and residuals."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 4,
    }
    return _built(GPT2LMHeadModel, GPT2Config, {**settings, **kwargs})


def tiny_bert(
    dropout: float = 0.0,
    head: str = "BertForSequenceClassification",
    layers: int = 2,
    hidden: int = HIDDEN,
    **kwargs: Any,
):
    """A BERT with two layers under any head of transformers, such as "BertModel" or "BertForMaskedLM"."""
    import transformers

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "pad_token_id": 0,
    }
    return _built(getattr(transformers, head), transformers.BertConfig, {**settings, **kwargs})


def tiny_vit(dropout: float = 0.0, layers: int = 2, hidden: int = HIDDEN, **kwargs: Any):
    """A ViT with two layers that tells 3 classes of grey images of 8 x 8 pixels apart, in patches of 4 x 4."""
    from transformers import ViTConfig, ViTForImageClassification

    settings = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "num_labels": 3,
    }
    return _built(ViTForImageClassification, ViTConfig, {**settings, **kwargs})


def tiny_t5(dropout: float = 0.0, layers: int = 2, hidden: int = HIDDEN, **kwargs: Any):
    """A T5 with two layers on each side, its embeddings shared by encoder, decoder and head."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {
        "vocab_size": VOCABULARY,
        "d_model": hidden,
        "d_kv": hidden // 4,
        "d_ff": 2 * hidden,
        "num_layers": layers,
        "num_heads": 4,
        "dropout_rate": dropout,
        "pad_token_id": 0,
        "eos_token_id": 4,
        "decoder_start_token_id": 0,
    }
    return _built(T5ForConditionalGeneration, T5Config, {**settings, **kwargs})


def tiny_mixtral(dropout: float = 0.0, layers: int = 2, hidden: int = HIDDEN, **kwargs: Any):
    """A Mixtral with two layers of four experts, two of which read a token; their matrices are 3-D tensors."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 4,
    }
    return _built(MixtralForCausalLM, MixtralConfig, {**settings, **kwargs})


def _built(network: Any, config: Any, settings: dict[str, Any]) -> torch.nn.Module:
    """The network from seed 0, the global generator left as it was, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network(config(**settings)).train()
