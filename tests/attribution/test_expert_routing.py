"""Routing scores by a hand count, and the choice of experts on the authors' published numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.attribution.expert_routing import drawn, expert_layers, relevant_experts, routing_scores
from lightning_peft.roles import weights_by_role
from tests.tiny import tiny_llama, tiny_mixtral

SEQUENCES = [[5, 9, 30, 41], [7, 8], [60, 61, 62, 63, 64, 65, 66]]

#: deepseek-ai/ESFT, results/expert_scores/law/summary.json, token scores of layers 15 and 19 of DeepSeek-V2-Lite.
LAW_15 = """
.0153 .0119 .0096 .0774 .0205 .0229 .0069 .0087 .0069 .0113 .0290 .0118 .0230 .0099 .0041 .0086 .0126 .0144 .0042 .0291
.0006 .0128 .0053 .0154 .0116 .0105 .0258 .0251 .0083 .0613 .0432 .0105 .0080 .0098 .0087 .0115 .0107 .0224 .0090 .0082
.0057 .0116 .0095 .0211 .0204 .0085 .0074 .0114 .0160 .0165 .0224 .0024 .0199 .0122 .0213 .0201 .0081 .0066 .0312 .0060
.0240 .0188 .0149 .0072"""
LAW_19 = """
.0092 .0114 .0073 .0174 .0190 .0246 .0117 .0084 .0063 .0087 .0033 .0060 .0201 .0134 .0102 .0068 .0046 .0049 .0081 .0089
.0099 .0091 .0146 .0074 .0226 .0121 .0029 .0118 .0094 .0338 .0204 .0337 .0088 .0049 .0294 .0056 .0075 .0147 .0100 .0103
.0128 .0153 .0174 .0108 .0177 .0030 .0101 .0171 .0023 .0116 .0771 .0597 .0256 .0120 .0881 .0139 .0126 .0160 .0201 .0065
.0158 .0194 .0211 .0051"""


@pytest.mark.parametrize(("numbers", "expected"), [(LAW_15, [3, 29, 30, 58]), (LAW_19, [54, 50, 51])])
def test_the_published_choice_is_that_of_the_published_scores(numbers, expected):
    """results/expert_configs/law.json: the token score with p = 0.2."""
    scores = torch.tensor([float(number) for number in numbers.split()])
    assert relevant_experts(scores, 0.2).tolist() == expected


def test_the_set_is_the_smallest_that_reaches_p():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(7, generator=generator).softmax(0)
        for p in (0.1, 0.35, 0.8):
            chosen = relevant_experts(scores, p).tolist()
            assert float(scores[chosen].sum()) >= p - 1e-6
            best = scores.sort(descending=True).values
            assert float(best[: len(chosen) - 1].sum()) < p


def test_all_with_a_score_where_the_sum_stays_below():
    scores = torch.tensor([0.1, 0.0, 0.2, 0.05])
    assert relevant_experts(scores, 1.0).tolist() == [2, 0, 3]
    assert relevant_experts(torch.full((4,), 0.25), 1.0).tolist() == [0, 1, 2, 3]


def test_scores_are_a_hand_count():
    """From the routers' own logits: top 2 of 4 of the softmax, gates normalised over the two, over all tokens."""
    network = tiny_mixtral(layers=2).eval()
    made = routing_scores(network, SEQUENCES)
    expected = {name: torch.zeros(2, 4, dtype=torch.float64) for name in made}
    tokens = sum(map(len, SEQUENCES))
    for sequence in SEQUENCES:
        with torch.no_grad():
            logits = network(torch.tensor([sequence]), output_router_logits=True).router_logits
        for name, layer in zip(expected, logits):
            for row in layer.view(-1, 4).double():
                probability = row.softmax(-1)
                first, second = probability.topk(2).indices.tolist()
                for expert in (first, second):
                    gate = probability[expert] / (probability[first] + probability[second])
                    expected[name][0, expert] += 1 / (2 * tokens)
                    expected[name][1, expert] += gate / tokens
    assert list(made) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            made[name].sum(1), torch.ones(2, dtype=torch.float64)
        )  # Mixtral normalises its gates


def test_gates_that_are_not_normalised_stay_below_one():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False}
    network = OlmoeForCausalLM(OlmoeConfig(vocab_size=128, pad_token_id=0, **sizes, **experts))
    (scores,) = routing_scores(network, SEQUENCES).values()
    assert float(scores[0].sum()) == pytest.approx(1)
    assert 2 / 6 - 1e-3 < float(scores[1].sum()) < 0.9


def test_a_task_that_goes_to_one_expert_chooses_it():
    network = tiny_mixtral(layers=2, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.mlp.gate.weight.zero_()[3] = 1.0
        network.model.embed_tokens.weight.abs_()  # the stream has a positive mean, which expert 3 looks for
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
    for scores in routing_scores(network, SEQUENCES).values():
        assert relevant_experts(scores[0], 0.5).tolist() == relevant_experts(scores[1], 0.5).tolist() == [3]


def test_the_network_is_left_as_it_was():
    network = tiny_mixtral()
    routing_scores(network, SEQUENCES)
    assert network.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_ranks_share_the_probe_and_add_their_sums():
    network = tiny_mixtral(layers=2)
    whole, sums = routing_scores(network, SEQUENCES), []

    def keep(total: torch.Tensor) -> torch.Tensor:
        sums.append(total)
        return total * 1  # what a rank of its own has: not yet all

    for rank in (0, 1):
        with pytest.raises(ValueError, match="cannot be read"):  # half of the tokens
            routing_scores(network, SEQUENCES, rank, 2, add=keep)
    for rank in (0, 1):
        made = routing_scores(network, SEQUENCES, rank, 2, add=lambda own: sums[0] + sums[1])
        for name, value in whole.items():
            torch.testing.assert_close(made[name], value)


def test_a_sample_is_whole_sequences_in_random_order():
    sequences = [[i] * (i + 1) for i in range(8)]
    made = drawn(sequences, 10, seed=1)
    assert all(one in sequences for one in made)
    assert sum(map(len, made[:-1])) < 10 <= sum(map(len, made))
    assert made == drawn(sequences, 10, seed=1) != drawn(sequences, 10, seed=2)
    assert sorted(drawn(sequences)) == sequences


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"dense|no routed experts|experts"):
        expert_layers(weights_by_role(tiny_llama()))
    with pytest.raises(ValueError, match="no sequence"):
        routing_scores(tiny_mixtral(), [[5], []])
    for p in (0, 1.1):
        with pytest.raises(ValueError, match="must lie in"):
            relevant_experts(torch.ones(2), p)
