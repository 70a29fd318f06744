"""Directions of concepts: PCA against scikit-learn, attribution against finite differences, reports, files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from sklearn.decomposition import PCA

from lightning_peft.callbacks import PEFT
from lightning_peft.concepts import (
    activation_difference_pca,
    attribution_rank,
    chosen_directions,
    load_directions,
    sae_decoder_directions,
    save_directions,
    write_report,
)
from lightning_peft.concepts.directions import blocks_by_position
from lightning_peft.models import CausalLM
from tests.conformance.data import Rows
from tests.tiny import tiny_bert, tiny_llama, tiny_t5, tiny_tokenizer


def batches() -> list[dict[str, torch.Tensor]]:
    loader = Rows("tokens", batch_size=4, rows=12, plain=True).train_dataloader()
    return [{key: batch[key] for key in ("input_ids", "attention_mask", "labels")} for batch in loader]


def changed(network: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    tuned = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return tuned


def differences(base, tuned, layer: int) -> torch.Tensor:
    """By transformers' own hidden states: entry l + 1 is block l's output (the last one's is normed)."""
    found = []
    with torch.no_grad():
        for batch in batches():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            after, before = (n(**inputs, output_hidden_states=True).hidden_states[layer + 1] for n in (tuned, base))
            found.append((after - before)[batch["labels"] != -100])
    return torch.cat(found)


def test_components_are_those_of_scikit_learn():
    base = tiny_llama(layers=3).eval()
    tuned = changed(base)
    directions, shares = activation_difference_pca(tuned, batches(), [0, 1], components=4, base=base)
    for layer in (0, 1):
        pca = PCA(4, svd_solver="full").fit(differences(base, tuned, layer).double().numpy())
        expected = torch.from_numpy(pca.components_).float()
        torch.testing.assert_close((directions[layer] * expected).sum(1).abs(), torch.ones(4), rtol=1e-4, atol=1e-4)
        share = torch.from_numpy(pca.explained_variance_ratio_).float()
        torch.testing.assert_close(shares[layer], share, rtol=1e-3, atol=1e-5)


def test_the_base_may_be_the_network_without_its_adapters():
    module = CausalLM(tiny_llama(layers=2))
    base = copy.deepcopy(module.model)
    PEFT({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]}).attach(module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    by_switch, _ = activation_difference_pca(module.model, batches(), [0], components=2)
    by_copy, _ = activation_difference_pca(module.model, batches(), [0], components=2, base=base)
    torch.testing.assert_close(by_switch[0], by_copy[0], rtol=1e-4, atol=1e-4)
    assert module.model.training  # as it was


def test_a_planted_change_is_the_first_component():
    base = tiny_llama(layers=2).eval()
    tuned = copy.deepcopy(base)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    tuned.model.layers[0].register_forward_hook(lambda _, __, out: out + out[..., :1] * planted)
    directions, shares = activation_difference_pca(tuned, batches(), [0], components=2, base=base)
    assert abs(float(directions[0][0] @ planted)) > 0.999
    assert float(shares[0][0]) > 0.999


def test_decoder_rows():
    decoder = torch.randn(7, 4)
    assert torch.equal(sae_decoder_directions(decoder, [5, 0]), decoder[[5, 0]])
    with pytest.raises(ValueError, match=r"latents \[7\] are not there: the decoder has 7"):
        sae_decoder_directions(decoder, [1, 7])


def test_attribution_is_the_losss_slope_when_a_latent_is_taken_out():
    network = tiny_llama(layers=2).double().eval()
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(5, 32, generator=generator).double()
    encoder = torch.randn(32, 5, generator=generator).double()

    def encode(h: torch.Tensor) -> torch.Tensor:
        return torch.relu(h.double() @ encoder)

    made = attribution_rank(network, batches(), 0, encode, decoder)
    slopes, count = torch.zeros(5, dtype=torch.float64), 0
    for batch in batches():
        kept = batch["labels"] != -100
        count += int(kept.sum())
        for latent in range(5):
            losses = []
            for step in (-1e-3, 1e-3):

                def less(_, __, out, step=step, latent=latent, kept=kept):
                    return out - step * kept[..., None] * encode(out)[..., latent : latent + 1] * decoder[latent]

                handle = network.model.layers[0].register_forward_hook(less)
                with torch.no_grad():
                    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
                    losses.append(
                        float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:]))
                    )
                handle.remove()
            slopes[latent] += (losses[1] - losses[0]) / 2e-3
    torch.testing.assert_close(made.double(), slopes / count, rtol=1e-2, atol=1e-6)


def test_a_report_is_written_and_the_choice_read_back(tmp_path):
    network = tiny_llama(layers=2).eval()
    directions = {0: torch.eye(32)[:2], 1: torch.eye(32)[2:5]}
    path = write_report(tmp_path / "report.json", directions, network, batches(), tiny_tokenizer(), examples=3)
    entries = json.loads(path.read_text())
    assert [(one["layer"], one["direction"]) for one in entries] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    for one in entries:
        assert len(one["top"]) == len(one["bottom"]) == 3
        assert one["top"] == sorted(one["top"], reverse=True)
        assert one["bottom"] == sorted(one["bottom"])
        assert all("[[" in text for _, text in one["top"])
    # The farthest of all, found by hand.
    with torch.no_grad():
        states = [
            network(b["input_ids"], attention_mask=b["attention_mask"], output_hidden_states=True) for b in batches()
        ]
    best = max(float(s.hidden_states[1][..., 0][b["labels"] != -100].max()) for s, b in zip(states, batches()))
    assert entries[0]["top"][0][0] == pytest.approx(best, rel=1e-5)
    assert (tmp_path / "report.png").stat().st_size > 1000

    with pytest.raises(ValueError, match="marks no direction"):
        chosen_directions(directions, path)
    entries[1]["ablate"] = entries[4]["ablate"] = True
    path.write_text(json.dumps(entries))
    chosen = chosen_directions(directions, path)
    assert torch.equal(chosen[0], directions[0][[1]])
    assert torch.equal(chosen[1], directions[1][[2]])
    with pytest.raises(ValueError, match="marks direction 2 of layer 1, which the directions do not have"):
        chosen_directions({0: directions[0], 1: directions[1][:1]}, path)


def test_files(tmp_path):
    directions = {3: torch.randn(2, 8), 0: torch.randn(1, 8)}
    path = save_directions(tmp_path / "d.safetensors", directions, {"model": "m"})
    read = load_directions(path)
    assert sorted(read) == [0, 3]
    assert all(torch.equal(read[layer], directions[layer]) for layer in read)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_directions(tmp_path / "other.safetensors")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="directions are matrices"):
        load_directions(tmp_path / "w.safetensors")


def test_blocks_by_position():
    assert blocks_by_position(tiny_llama(layers=3), [0, -1])[-1].block == "model.layers.2"
    assert blocks_by_position(tiny_t5(), [1])[1].block == "decoder.block.1"
    assert blocks_by_position(tiny_bert(), [0])[0].block == "bert.encoder.layer.0"
    with pytest.raises(ValueError, match="layer 2 is not there: LlamaForCausalLM has 2 blocks, 0 to 1"):
        blocks_by_position(tiny_llama(), [2])


def test_what_does_not_fit_is_refused():
    network = tiny_llama().eval()
    masked = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    with pytest.raises(ValueError, match="no token of the batches counts"):
        activation_difference_pca(network, masked, [0], base=network)
    with pytest.raises(ValueError, match="components=33 must lie between 1 and the width of the network, 32"):
        activation_difference_pca(network, batches(), [0], components=33, base=network)
