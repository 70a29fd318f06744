"""Knowledge-vector attribution: completeness, captum, other paths; the selection by brute force; shards."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_peft.attribution.knowledge_vectors import attributions, down_weights, lowest_nodes, question_scores
from lightning_peft.roles import weights_by_role
from lightning_peft.scores import load_scores, save_scores
from tests.processes import call_in_child
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral

QUESTIONS = [[5, 9, 30, 41], [7, 8], [60, 61, 62, 63, 64, 65]]


def loud(network: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for probabilities that depend on the input."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return network.eval()


def probability(network: torch.nn.Module, ids: list[int], scaled: dict[int, float]) -> float:
    """F with layers' outputs scaled at all positions, of the token that the whole network predicts."""
    inputs = torch.tensor([ids])
    with torch.no_grad():
        token = int(network(inputs).logits[0, -1].argmax())
        handles = [
            layer.mlp.register_forward_hook(lambda _, __, out, s=scaled[i]: out * s)
            for i, layer in enumerate(network.model.layers)
            if i in scaled
        ]
        f = float(network(inputs).logits[0, -1].double().softmax(-1)[token])
        for handle in handles:
            handle.remove()
    return f


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_over_all_nodes_and_positions_it_adds_up_and_better_with_more_steps(layer):
    """The sum is F(o) - F(0); the trapezoid's error falls with the square of the number of steps."""
    network = loud(tiny_llama(layers=3))
    question = QUESTIONS[0]
    exact = probability(network, question, {}) - probability(network, question, {layer: 0.0})
    assert abs(exact) > 1e-3
    errors = []
    for steps in (9, 17, 33):
        made = attributions(network, [question], steps=steps, every_position=True)
        errors.append(abs(float(list(made.values())[layer].sum()) - exact))
    assert errors[2] < 0.02 * abs(exact)
    assert errors[2] < errors[1] / 3 < errors[0] / 9


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_equals_captum(make):
    """Times (m - 1) / m, captum's trapezoid, and with the authors' baseline, at every position."""
    captum = pytest.importorskip("captum.attr")
    network = loud(make(layers=2))
    ids = torch.tensor([QUESTIONS[0]])
    token = int(network(ids).logits[0, -1].argmax())

    def f(x: torch.Tensor) -> torch.Tensor:
        return network(x, use_cache=False).logits[:, -1].softmax(-1)[:, token]

    made = attributions(network, [QUESTIONS[0]], steps=7, baseline="token0", every_position=True)
    for down in down_weights(weights_by_role(network)):
        module = network.get_submodule(down.name.rpartition(".")[0])
        tool = captum.LayerIntegratedGradients(f, module)
        expected = tool.attribute(ids, baselines=torch.zeros_like(ids), n_steps=7, method="riemann_trapezoid")
        torch.testing.assert_close(made[down.name] * 6 / 7, expected.float(), rtol=1e-4, atol=1e-5)


def test_questions_of_other_lengths_are_read_at_their_own_last_token():
    network = loud(tiny_llama(layers=2))
    together = attributions(network, QUESTIONS)
    for number, question in enumerate(QUESTIONS):
        for name, alone in attributions(network, [question]).items():
            torch.testing.assert_close(together[name][number], alone[0], rtol=1e-4, atol=1e-7)
    at_last = attributions(network, QUESTIONS, every_position=True)
    for name, made in together.items():
        assert made.shape == (3, 32)
        for number, question in enumerate(QUESTIONS):
            torch.testing.assert_close(made[number], at_last[name][number, len(question) - 1])
            assert not at_last[name][number, len(question) :].any()


def test_the_network_is_left_as_it_was():
    network = tiny_llama(layers=2)
    before = copy.deepcopy(network.state_dict())
    attributions(network, QUESTIONS)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# -- selection --------------------------------------------------------------------------------------------------------


def test_the_selection_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(3, 20, generator=generator) for _ in range(2)]
    for layer, made in zip(scores, lowest_nodes(scores, quota=25)):
        counts = [0] * 20
        for row in layer.tolist():
            for node in sorted(range(20), key=lambda j: row[j])[:5]:
                counts[node] += 1
        order = sorted(range(20), key=lambda j: (-counts[j], float(layer[:, j].sum())))
        assert made.tolist() == sorted(order[:5])


def test_each_layer_gives_as_many():
    """floor(quota / 100 * hidden) of each, whatever the sizes of scores."""
    scores = [torch.randn(4, 64), 1e6 * torch.randn(4, 64)]
    for quota, k in ((10, 6), (30, 19), (100, 64), (1.6, 1)):
        assert [len(rows) for rows in lowest_nodes(scores, quota)] == [k, k]


def test_an_important_node_is_never_taken():
    """A neuron that the answer hangs on: the head reads it alone."""
    network = loud(tiny_llama(layers=1))
    with torch.no_grad():
        network.model.layers[0].mlp.down_proj.weight[5] += 5 * network.model.layers[0].mlp.down_proj.weight[5].sign()
        network.lm_head.weight[:, 5] *= 20
    scores = list(question_scores(network, QUESTIONS).values())
    assert int(scores[0].sum(0).argmax()) == 5
    assert all(5 not in rows for rows in lowest_nodes(scores, quota=50))


@pytest.mark.parametrize(("quota", "message"), [(0, "percentage in"), (101, "percentage in"), (1, "use 5 or more")])
def test_quotas_that_leave_nothing(quota, message):
    with pytest.raises(ValueError, match=message):
        lowest_nodes([torch.randn(2, 20)], quota)


# -- many questions ---------------------------------------------------------------------------------------------------


def test_shards_are_gone_on_from_and_shared_by_ranks(tmp_path, monkeypatch):
    from lightning_peft.attribution import knowledge_vectors

    network = loud(tiny_llama(layers=2))
    many = QUESTIONS * 3
    whole = question_scores(network, many, batch_size=2)
    for rank in (0, 1):
        question_scores(network, many, batch_size=2, folder=tmp_path, rank=rank, world_size=2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    next(tmp_path.rglob("000003.safetensors")).unlink()  # where a kill came
    seen = []
    real = knowledge_vectors.attributions
    monkeypatch.setattr(knowledge_vectors, "attributions", lambda *a, **k: seen.append(a) or real(*a, **k))
    again = question_scores(network, many, batch_size=2, folder=tmp_path)
    assert len(seen) == 1
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    # Another network's are not mixed in.
    question_scores(loud(tiny_llama(layers=2, hidden=64)), many, batch_size=2, folder=tmp_path)
    assert len(seen) == 6


def scored() -> dict[str, torch.Tensor]:
    return question_scores(loud(tiny_llama(layers=2)), QUESTIONS)


def test_another_process_scores_alike():
    torch.set_num_threads(1)
    _, other = call_in_child(scored)
    for name, value in scored().items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_files_know_their_network_and_method(tmp_path):
    network = tiny_llama(layers=2)
    path = save_scores(tmp_path / "s.safetensors", {"a": torch.ones(2)}, network, "knowledge-vectors", steps=7)
    scores, provenance = load_scores(path, network, "knowledge-vectors")
    assert scores["a"].tolist() == [1, 1]
    assert provenance["steps"] == 7
    with pytest.raises(ValueError, match="not of 'expert-routing'"):
        load_scores(path, network, "expert-routing")
    with pytest.raises(ValueError, match="was made with another network"):
        load_scores(path, tiny_llama(layers=3), "knowledge-vectors")
    with pytest.raises(FileNotFoundError, match="lightning-peft select"):
        load_scores(tmp_path / "none", network, "knowledge-vectors")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"steps=1"):
        attributions(tiny_llama(), QUESTIONS, steps=1)
    with pytest.raises(ValueError, match=r"no question, or one of them has no token"):
        attributions(tiny_llama(), [[5], []])
    with pytest.raises(ValueError, match="experts"):
        attributions(tiny_mixtral(), QUESTIONS)
    assert len(down_weights(weights_by_role(tiny_bert(layers=2)))) == 2
