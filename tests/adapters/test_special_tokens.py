"""PASTA: only special tokens' states change, each by its own vector, row by row and across a cache."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft.adapters.special_tokens import SpecialTokensConfig, special_slots, special_token_ids
from lightning_peft.callbacks.peft import PEFT
from tests.adapted import Classifier, Foreign, fit
from tests.adapters.networks import IDS, TEXT, adapted, answer, base, check_round_trips, filled, trained
from tests.tiny import tiny_tokenizer

CLS, SEP = 5, 6
CONFIG = SpecialTokensConfig(token_ids=[CLS, SEP])
ROWS = torch.tensor([[CLS, 20, 21, SEP, 22, SEP, 0], [CLS, 30, SEP, 0, 0, 0, 0]])  # a pair, and a single sentence


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("share", ["order", "token"])
def test_round_trips(family, share, tmp_path):
    ids = sorted({int(i) for i in IDS.flatten()})
    config = SpecialTokensConfig(token_ids=ids, positions=7, share=share)
    check_round_trips(family, config, tmp_path)


def test_slots_are_counted_row_by_row():
    slots, count = special_slots(ROWS, torch.tensor([CLS, SEP]), 3)
    assert slots.tolist() == [[0, 3, 3, 1, 3, 2, 3], [0, 3, 1, 3, 3, 3, 3]]
    assert count.tolist() == [3, 2]
    slots, _ = special_slots(ROWS, torch.tensor([CLS, SEP]), 2, share="token")
    assert slots.tolist() == [[0, 2, 2, 1, 2, 1, 2], [0, 2, 1, 2, 2, 2, 2]]


def test_padding_that_is_a_special_token_does_not_count():
    rows = torch.tensor([[SEP, SEP, CLS, 20, SEP]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    slots, count = special_slots(rows, torch.tensor([CLS, SEP]), 2, attention_mask=mask)
    assert slots.tolist() == [[2, 2, 0, 2, 1]]
    assert count.tolist() == [2]


def test_vectors_are_added_to_special_tokens_alone():
    """The input of every block: the base's, plus v_l^(p) at the p-th special token, written out row by row."""
    network = filled(adapted("bert", CONFIG))
    plain = base("bert")
    layers = network.base_model.model.bert.encoder.layer
    places = [(0, 0, 0), (0, 3, 1), (0, 5, 2), (1, 0, 0), (1, 2, 1)]  # row, token, p

    def add(module, args, kwargs, layer):
        hidden = args[0].clone()
        for row, token, p in places:
            hidden[row, token] += layer.special_tokens_adapters["default"].vectors[p]
        return (hidden, *args[1:]), kwargs

    given = {}
    for i, (layer, own) in enumerate(zip(layers, plain.bert.encoder.layer)):
        own.register_forward_pre_hook(lambda m, a, k, layer=layer: add(m, a, k, layer), with_kwargs=True)
        layer.register_forward_pre_hook(lambda m, a, i=i: given.update({i: a[0].clone()}))
        layer.base_layer.register_forward_pre_hook(lambda m, a, i=i: given.update({i: a[0] - given[i]}))
    torch.testing.assert_close(network(input_ids=ROWS)[0], plain(input_ids=ROWS)[0], rtol=0, atol=1e-5)
    special = torch.zeros_like(ROWS, dtype=torch.bool)
    for row, token, _ in places:
        special[row, token] = True
    for change in given.values():
        assert not change[~special].any()
        assert change[special].abs().sum(-1).all()


def test_gradients_by_hand():
    """A vector's is the sum of its tokens' upstream gradients, which differ by row, token and channel."""
    from lightning_peft.adapters.special_tokens import SpecialTokensAdapter

    adapter = SpecialTokensAdapter(4, CONFIG).double()
    slots, _ = special_slots(ROWS, torch.tensor([CLS, SEP]), 3)
    upstream = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (adapter(slots) * upstream).sum().backward()
    expected = torch.stack([upstream[0, 0] + upstream[1, 0], upstream[0, 3] + upstream[1, 2], upstream[0, 5]])
    torch.testing.assert_close(adapter.vectors.grad, expected)


def test_count_and_saved_size(tmp_path):
    """L x P x H numbers and no others."""
    network = adapted("gpt2", CONFIG)
    assert sum(p.numel() for p in trained(network).values()) == 2 * 3 * 32
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 2 * 3 * 32
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 2 * 3 * 32 + 1000


def test_the_papers_share_of_bert_large():
    assert pytest.approx(0.00015, abs=2e-5) == 24 * 2 * 1024 / 335e6  # vectors alone; the paper's 0.029 % has the head


def test_the_head_trains_and_nothing_else():
    module = Classifier()
    PEFT({"peft_type": "SPECIAL_TOKENS", "token_ids": [5, 6, 7], "positions": 8}).attach(module)
    names = list(trained(module))
    assert all("special_tokens_adapters" in name or "classifier.modules_to_save" in name for name in names)
    assert any("classifier" in name for name in names)
    assert not any("pooler" in name for name in trained(module))


def test_a_decoder_with_chat_markers(tmp_path):
    """Ids come from the tokenizer that the config names, and are saved as numbers."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    network = adapted("llama", SpecialTokensConfig(tokenizer=str(tmp_path / "tokenizer"), positions=4))
    names = ["<eos>", "<|im_start|>", "<|im_end|>"]
    assert network.peft_config["default"].token_ids == sorted(tokenizer.convert_tokens_to_ids(names))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = torch.tensor([[start, 20, end, start, 21, end]])
    plain = base("llama")(input_ids=ids)[0]
    out = filled(network)(input_ids=ids)[0]
    assert (plain - out).abs().amax(-1).all()


@pytest.mark.parametrize("share", ["order", "token"])
def test_generation_goes_on_counting(share):
    """With a cache the vectors are those of the whole row, also where a later token is special."""
    network = filled(adapted("llama", SpecialTokensConfig(token_ids=[CLS, SEP], positions=4, share=share)))
    rows = torch.tensor([[CLS, 20, SEP, 21, SEP, 22], [CLS, 20, 21, 22, SEP, 23]])
    whole = network(input_ids=rows, use_cache=False).logits
    first = network(input_ids=rows[:, :3], use_cache=True)
    cache = first.past_key_values
    later = [network(input_ids=rows[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(3, 6)]
    torch.testing.assert_close(torch.cat([first.logits, *later], 1), whole, rtol=0, atol=1e-5)


def test_generate():
    network = filled(adapted("llama", SpecialTokensConfig(token_ids=[CLS, SEP], positions=30)), std=1.0)
    prompt = torch.tensor([[CLS, 20, SEP, 21]])
    options = {"max_new_tokens": 6, "do_sample": False}
    with_cache = network.generate(input_ids=prompt, use_cache=True, **options)
    assert torch.equal(with_cache, network.generate(input_ids=prompt, use_cache=False, **options))


def test_two_stacks_have_their_own_ids():
    """T5: the encoder's special tokens do not touch the decoder's."""
    network = filled(adapted("t5", SpecialTokensConfig(token_ids=[CLS])))
    plain = base("t5")
    encoder, decoder = torch.tensor([[20, CLS, 21]]), torch.tensor([[22, 23]])
    seen = {}
    for stack in ("encoder", "decoder"):
        block = network.base_model.model.get_submodule(f"{stack}.block.0")
        block.register_forward_pre_hook(lambda m, a, s=stack: seen.update({s: a[0].clone()}))
        block.base_layer.register_forward_pre_hook(lambda m, a, s=stack: seen.update({s: a[0] - seen[s]}))
    out = network(input_ids=encoder, decoder_input_ids=decoder)[0]
    assert not torch.equal(out, plain(input_ids=encoder, decoder_input_ids=decoder)[0])
    assert seen["encoder"][0, 1].abs().sum() > 0
    assert not seen["encoder"][0, [0, 2]].any()
    assert not seen["decoder"].any()


def test_a_row_s_slots_are_of_its_own_forward():
    """Two forwards before one backward, as in contrastive training, with recomputed activations."""
    gradients = []
    for recompute in (False, True):
        network = filled(adapted("bert", CONFIG)).train()
        if recompute:
            network.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        out = network(input_ids=ROWS)[0].sum() + 2 * network(input_ids=ROWS.flip(0)[:, :3])[0].pow(2).sum()
        out.backward()
        gradients.append({name: p.grad for name, p in trained(network).items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-6)


def test_it_trains_in_a_trainer():
    module = Foreign()
    callback = PEFT({"peft_type": "SPECIAL_TOKENS", "token_ids": list(range(5, 30)), "positions": 8})
    callback.attach(module)
    before = {name: p.detach().clone() for name, p in trained(module).items()}
    fit(module, [callback], steps=3)
    assert any(not torch.equal(before[name], p) for name, p in trained(module).items())


def test_normal_start_and_dropout():
    torch.manual_seed(0)
    config = SpecialTokensConfig(token_ids=[CLS, SEP], init="normal", dropout=0.5, positions=40)
    network = adapted("bert", config)
    values = torch.cat([p.detach().flatten() for n, p in network.named_parameters() if "vectors" in n])
    assert values.std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(network(input_ids=ROWS)[0], network(input_ids=ROWS)[0])
    network.train()
    assert not torch.equal(network(input_ids=ROWS)[0], network(input_ids=ROWS)[0])


# -- errors -----------------------------------------------------------------------------------------------------------


def test_more_special_tokens_than_vectors():
    network = adapted("bert", SpecialTokensConfig(token_ids=[CLS, SEP], positions=2))
    with pytest.raises(
        ValueError, match=r"holds 3 special tokens and there are vectors for positions=2: set positions=3"
    ):
        network(input_ids=ROWS)


def test_embeddings_without_ids():
    network = adapted("bert", CONFIG)
    answer(network, "bert")  # a forward before must not lend its slots
    with pytest.raises(ValueError, match="need input_ids"):
        network(inputs_embeds=torch.zeros(2, 7, 32))


def test_a_cache_from_elsewhere():
    plain = base("llama")
    cache = plain(input_ids=IDS, use_cache=True).past_key_values
    network = adapted("llama", CONFIG)
    with pytest.raises(ValueError, match="the cache holds 7 tokens"):
        network(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)


def test_a_tokenizer_without_special_tokens():
    class Plain:
        all_special_ids, pad_token_id, eos_token_id, unk_token_id, mask_token_id = [0, 2], 0, None, 2, None
        name_or_path = "plain"

    with pytest.raises(ValueError, match="'plain' has no special tokens"):
        special_token_ids(Plain())


def test_no_tokenizer_to_read():
    with pytest.raises(ValueError, match="there is no tokenizer to read their ids from"):
        adapted("llama", SpecialTokensConfig())


def test_images_have_no_tokens():
    with pytest.raises(ValueError, match="embeds no token ids"):
        adapted("vit", CONFIG)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": "place"}, "share='place' is not known"),
        ({"init": "ones"}, "init='ones' is not known"),
        ({"positions": 0}, "positions=0 must be at least 1"),
        ({"dropout": -0.1}, "dropout=-0.1 must be"),
        ({"token_ids": []}, "names no special token"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        SpecialTokensConfig(**given)
