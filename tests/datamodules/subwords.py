"""A byte-level tokenizer trained in the process: blanks belong to words and any character can be written."""

from __future__ import annotations

from tests.tiny import CHAT_TEMPLATE


def subword_tokenizer(texts: list[str], entries: int = 400, bos: bool = False):
    """Byte pairs learnt from `texts`, with <pad> 0, <s> 1, <|im_start|> 3 and <|im_end|> 4 (the end of a text).

    Args:
        texts: What it learns from.
        entries: Size of the vocabulary at most; 256 bytes and five special tokens are always there.
        bos: Put <s> in front of every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=["<pad>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made
