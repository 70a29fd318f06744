"""Merging from disk to disk: equal to memory and to mergekit, lean, whole or not at all, and its refusals."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft.merging import METHODS, SafetensorsFolder, merge, model_stock
from tests.merging.folders import save_models, tuned
from tests.processes import call_in_child
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """A base with its tokenizer and three models, sharded but for one."""
    root = tmp_path_factory.mktemp("models")
    folders = save_models(root, 3)
    tiny_tokenizer().save_pretrained(folders[0])
    return folders


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read by safetensors itself."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("options", [{}, {"filter_wise": True}, {"pairwise": "angle", "clamp": True}])
@pytest.mark.parametrize("gigabytes", [5.0, 60e3 / 2**30])
def test_streaming_equals_in_memory(models, tmp_path, options, gigabytes):
    base, *thetas = models
    out = merge(base, thetas, str(tmp_path / "out"), shard_gigabytes=gigabytes, **options)
    expected = model_stock(tensors(base), [tensors(theta) for theta in thetas], **options)
    assert_equal(tensors(out), expected)
    assert_equal(model_stock(base, thetas, **options), expected)
    files = sorted(path.name for path in Path(out).glob("*.safetensors"))
    assert files == ["model.safetensors"] if gigabytes == 5.0 else len(files) >= 2
    assert all(path.stat().st_size <= 60e3 + 4000 for path in Path(out).glob("model-*.safetensors"))


def test_transformers_loads_the_result(models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = merge(models[0], models[1:], str(tmp_path / "out"), shard_gigabytes=60e3 / 2**30)
    network, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert_equal(dict(network.state_dict()), tensors(out))
    assert (
        AutoTokenizer.from_pretrained(out)("hello world")["input_ids"] == tiny_tokenizer()("hello world")["input_ids"]
    )
    assert not [path.name for path in Path(out).parent.iterdir() if path.name != "out"]  # nothing is left behind


def mergekit(base: str, thetas: list[str], out: Path, filter_wise: bool) -> dict[str, torch.Tensor]:
    """What mergekit's own model_stock makes of the folders."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = {
        "merge_method": "model_stock",
        "base_model": base,
        "models": [{"model": theta} for theta in thetas],
        "parameters": {"filter_wise": filter_wise},
        "dtype": "float32",
    }
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    return tensors(out)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_equals_mergekit(models, tmp_path, n, filter_wise):
    base, *thetas = models[: n + 1]
    theirs = mergekit(base, thetas, tmp_path / "theirs", filter_wise)
    ours = tensors(merge(base, thetas, str(tmp_path / "ours"), filter_wise=filter_wise, compat="mergekit"))
    start = tensors(base)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
        assert (theirs[name] - start[name]).abs().max() > 0.01  # it is no comparison of bases


def test_equals_mergekit_where_its_bound_acts(tmp_path):
    """Deltas of the norms have a length of 1e-4: mergekit shrinks their cosine, and so do we only when asked to."""
    base, *thetas = save_models(tmp_path, size=1e-5)
    theirs = mergekit(base, thetas, tmp_path / "theirs", False)
    ours = tensors(merge(base, thetas, str(tmp_path / "ours"), compat="mergekit"))
    exact = tensors(merge(base, thetas, str(tmp_path / "exact")))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-7, rtol=0)
        assert "norm" not in name or (exact[name] - theirs[name]).abs().max() > 5e-6


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_bfloat16_folders(tmp_path, dtype):
    base, *thetas = save_models(tmp_path, dtype=torch.bfloat16)
    wide = [{name: tensor.double() for name, tensor in tensors(folder).items()} for folder in (base, *thetas)]
    exact = model_stock(wide[0], wide[1:])
    out = merge(base, thetas, str(tmp_path / "out"), dtype=dtype)
    eps = torch.finfo(torch.bfloat16 if dtype is None else torch.float32).eps
    for name, tensor in tensors(out).items():
        assert tensor.dtype == (torch.bfloat16 if dtype is None else torch.float32)
        ulp = eps * 2.0 ** exact[name].abs().clamp(min=1e-30).log2().floor()
        # fp32's own error is that of theta0, which a delta may cancel
        assert ((tensor.double() - exact[name]).abs() <= (0.51 if dtype is None else 2) * ulp + 1e-8).all(), name
    stored = json.loads((Path(out) / "config.json").read_text())
    assert stored.get("dtype", stored.get("torch_dtype")) == (dtype or "bfloat16")


# -- memory ---------------------------------------------------------------------------------------------------------


def _many(folder: Path, n: int, seed: int) -> str:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    save_file({f"w{i:03d}": torch.randn(256, 256, generator=generator) for i in range(n)}, folder / "model.safetensors")
    return str(folder)


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    """Tensors that are alive at once, counted by weak references, and Python's own peak: the same for 4 and 64."""
    import weakref

    method = METHODS["model_stock"]
    alive: weakref.WeakSet = weakref.WeakSet()
    peaks: dict[int, int] = {}

    def counting(base, thetas, dtype=None):
        merged = method(base, thetas, dtype=dtype)
        for tensor in (base, *thetas, merged):
            alive.add(tensor)
        peaks[n] = max(peaks.get(n, 0), sum(t.untyped_storage().nbytes() for t in {id(t): t for t in alive}.values()))
        return merged

    python = {}
    for n in (4, 64):
        base, *thetas = [_many(tmp_path / f"{n}-{k}", n, k) for k in range(3)]
        METHODS["counting"] = counting
        tracemalloc.start()
        try:
            merge(base, thetas, str(tmp_path / f"out{n}"), method="counting")
            python[n] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            del METHODS["counting"]
    size = 256 * 256 * 4
    assert peaks[64] <= peaks[4] <= 8 * size  # four of this step, at most four of the last one
    assert python[64] < python[4] + 2 * size


def test_a_chunk_is_all_that_is_held_beside_the_result(monkeypatch):
    """The largest tensor made on the way is a chunk for each model, in fp64."""
    import sys

    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                largest.append(out.numel() * out.element_size())
            return out

    monkeypatch.setattr(sys.modules["lightning_peft.merging.model_stock"], "CHUNK", 1000)
    theta0, thetas = torch.randn(100, 500), [torch.randn(100, 500) for _ in range(2)]
    for filter_wise in (False, True):
        largest.clear()
        with Sizes():
            METHODS["model_stock"](theta0, thetas, filter_wise)
        sizes = sorted(largest)
        result = theta0.numel() * 4
        assert sizes[-1] == result
        # what is not the result itself, its empty start or a copy into it
        assert max(size for size in sizes if size < result) <= 2 * 1000 * 8


# -- killed ---------------------------------------------------------------------------------------------------------


def _killed(base: str, thetas: list[str], out: str, moment: str, nth: int) -> None:
    """Merges, and kills its own process at the nth call of something."""
    calls = 0

    def killing(function):
        @functools.wraps(function)
        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    if moment == "tensor":
        METHODS["killed"] = killing(METHODS["model_stock"])
        merge(base, thetas, out, method="killed", shard_gigabytes=60e3 / 2**30)
    else:
        module = {"fsync": os, "rename": Path}[moment]
        setattr(module, moment, killing(getattr(module, moment)))
        merge(base, thetas, out, shard_gigabytes=60e3 / 2**30)


@pytest.mark.parametrize("there", ["nothing", "an old result"])
@pytest.mark.parametrize(
    ("moment", "nth"),
    [("tensor", 1), ("tensor", 9), ("tensor", 21), ("fsync", 1), ("fsync", 4), ("rename", 1), ("rename", 2)],
)
def test_killed_in_mid_write(models, tmp_path, there, moment, nth):
    base, *thetas = models
    out = tmp_path / "out"
    old = None
    if there == "an old result":
        merge(base, thetas[:2], str(out))
        old = tensors(out)
    elif (moment, nth) == ("rename", 2):
        pytest.skip("a new folder takes its place by one rename")
    code, _ = call_in_child(_killed, base, thetas, str(out), moment, nth, timeout=120)
    assert code == -signal.SIGKILL
    if (moment, nth) == ("rename", 2):
        assert (
            not out.exists()
        )  # between the two renames, the only moment when neither is there; both are whole beside it
        assert len(list(tmp_path.glob(".out.unfinished-*"))) == 2
    elif old is None:
        assert not out.exists()
    else:
        assert_equal(tensors(out), old)
    with pytest.warns(UserWarning, match="a merge that was stopped"):  # and again: nothing stands in the way
        merge(base, thetas, str(out))
    assert_equal(tensors(out), model_stock(base, thetas))


def test_an_error_leaves_nothing_behind(models, tmp_path):
    base, *thetas = models
    METHODS["failing"] = lambda base, thetas, dtype=None: 1 / 0  # type: ignore[assignment, return-value]
    try:
        with pytest.raises(ZeroDivisionError):
            merge(base, thetas, str(tmp_path / "out"), method="failing")
    finally:
        del METHODS["failing"]
    assert list(tmp_path.iterdir()) == []


# -- what differs ---------------------------------------------------------------------------------------------------


def _edited(folder: str, out: Path, edit) -> str:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    content = tensors(folder)
    edit(content)
    save_file(content, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def test_mixed_tensor_sets_are_listed_in_one_error(models, tmp_path):
    base, one, two, _ = models

    def edit(content):
        for i in range(3):
            content[f"adapter.{i}"] = torch.randn(3, i + 1)
        del content["model.norm.weight"], content["model.layers.0.mlp.up_proj.weight"]
        content["model.layers.1.mlp.down_proj.weight"] = torch.randn(32, 60)

    broken = _edited(two, tmp_path / "broken", edit)
    with pytest.raises(ValueError, match="do not have the base's tensors") as caught:
        merge(base, [one, broken], str(tmp_path / "out"))
    told = str(caught.value)
    for part in (
        "adapter.0, adapter.1, adapter.2",
        "lacks",
        "model.norm.weight",
        "mlp.up_proj.weight",
        "(32, 60)",
        "(32, 64)",
    ):
        assert part in told, part
    assert "vocabulary" not in told
    assert broken in told
    assert one not in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"model 1 lacks .*model.norm.weight"):
        model_stock(tensors(base), [tensors(one), tensors(broken)])


def test_a_resized_vocabulary(models, tmp_path):
    base, one, two, _ = models

    def grow(content):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            content[name] = torch.cat([content[name], torch.zeros(8, 32)])

    grown = _edited(two, tmp_path / "grown", grow)
    with pytest.raises(
        ValueError, match=r"lm_head.weight has shape \(136, 32\).*\(128, 32\).*keep_base_vocabulary=True"
    ):
        merge(base, [one, grown], str(tmp_path / "out"))
    merged = tensors(merge(base, [one, grown], str(tmp_path / "out"), keep_base_vocabulary=True))
    plain = model_stock(base, [one, two])
    for name, tensor in merged.items():
        kept = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(tensor, tensors(base)[name] if kept else plain[name]), name


def test_a_tied_head_is_one_tensor(tmp_path):
    base, one, two = save_models(tmp_path, tie=True)
    assert "lm_head.weight" not in tensors(base)

    def store_twice(content):
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()

    merged = model_stock(base, [one, two])
    twice = _edited(two, tmp_path / "twice", store_twice)
    assert_equal(tensors(merge(base, [one, twice], str(tmp_path / "out"))), merged)
    both = _edited(base, tmp_path / "both", store_twice)  # the other way round
    again = tensors(merge(both, [one, twice], str(tmp_path / "out2")))
    assert torch.equal(again.pop("lm_head.weight"), merged["model.embed_tokens.weight"])
    assert_equal(again, merged)
    other = _edited(two, tmp_path / "other", lambda content: content.update({"lm_head.weight": torch.randn(128, 32)}))
    with pytest.raises(ValueError, match=r"has what the base has not: lm_head\.weight"):
        merge(base, [one, other], str(tmp_path / "out3"))


def test_integer_buffers_are_the_base_s(tmp_path):
    folders = []
    for k in range(3):
        (tmp_path / str(k)).mkdir()
        content = {
            "a.flag": torch.tensor([True]),
            "b.steps": torch.tensor(k),
            "c.half": torch.randn(3).half(),
            "d.weight": torch.randn(3),
            "e.ids": torch.arange(5) + k,
            "f.double": torch.randn(2).double(),
        }
        save_file(content, tmp_path / str(k) / "model.safetensors")
        folders.append(str(tmp_path / str(k)))
    merged = tensors(merge(folders[0], folders[1:], str(tmp_path / "out"), shard_gigabytes=1e-9))
    start = tensors(folders[0])
    for name in ("a.flag", "b.steps", "e.ids"):
        assert torch.equal(merged[name], start[name])
    assert {name: tensor.dtype for name, tensor in merged.items()} == {name: t.dtype for name, t in start.items()}
    whole = SafetensorsFolder(merge(folders[0], folders[1:], str(tmp_path / "one")))
    assert_equal(dict(whole), merged)  # odd sizes beside each other in one file
    asked = tensors(merge(folders[0], folders[1:], str(tmp_path / "two"), dtype="float16"))
    assert {str(t.dtype) for n, t in asked.items() if t.is_floating_point()} == {"torch.float16"}
    assert asked["b.steps"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"models": ["tuned1"]}, "at least two .* got 1: fine-tune"),
        ({"method": "soup"}, r"method='soup'.*model_stock"),
        (
            {"options": {"density": 0.5}},
            r"no options \['density'\]: it takes \['filter_wise', 'pairwise', 'clamp', 'compat'\]",
        ),
        ({"filter": True}, r"no options \['filter'\]"),
        ({"pairwise": "median"}, "pairwise='median'"),
        ({"dtype": "int8"}, r"dtype='int8'.*float32"),
        ({"shard_gigabytes": 0}, "shard_gigabytes=0"),
        ({"out": "tuned1"}, "is one of the models that are read"),
        ({"out": "."}, "no folder of a model alone"),
        ({"base": "nowhere"}, "neither model.safetensors nor .*save_pretrained"),
    ],
)
def test_refuses(models, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(Path(models[0]).parent)
    before = sorted(str(path) for path in Path().rglob("*"))
    given = {"base": "base", "models": ["tuned1", "tuned2"], "out": str(tmp_path / "out"), **arguments}
    with pytest.raises(ValueError, match=told):
        merge(**given)
    assert sorted(str(path) for path in Path().rglob("*")) == before
    assert not (tmp_path / "out").exists()


def test_refuses_quantised_and_broken_folders(models, tmp_path):
    base, one, two, _ = models
    quantised = shutil.copytree(two, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(ValueError, match="is quantised, and codes cannot be averaged"):
        merge(base, [one, str(quantised)], str(tmp_path / "out"))
    narrow = _edited(
        base, tmp_path / "narrow", lambda c: c.update({n: t.to(torch.float8_e4m3fn) for n, t in c.items()})
    )
    with pytest.raises(ValueError, match="codes of fewer than 16 bits"):
        merge(narrow, [one, two], str(tmp_path / "out"))
    torn = shutil.copytree(base, tmp_path / "torn")
    gone = sorted(torn.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"lacks {gone.name}, which its model.safetensors.index.json names"):
        merge(str(torn), [one, two], str(tmp_path / "out"))


def test_from_the_command_line(models, tmp_path, capsys):
    from lightning_peft.cli import main

    base, *thetas = models
    out = str(tmp_path / "out")
    main(
        [
            "merge",
            "--method",
            "model_stock",
            "--base",
            base,
            "--models",
            *thetas,
            "--out",
            out,
            "--options.filter_wise",
            "true",
        ]
    )
    assert out in capsys.readouterr().out
    assert_equal(tensors(out), model_stock(base, thetas, filter_wise=True))


def test_tuned_models_are_about_sixty_degrees_apart():
    """What the other tests lean on: a merge of these is neither the base nor the average."""
    from lightning_peft.merging.model_stock import inner_products, interpolation_ratio

    base, one, two = (
        dict(tuned(tiny_llama(), k).state_dict()) if k else dict(tiny_llama().state_dict()) for k in range(3)
    )
    for name in base:
        assert 0.2 < interpolation_ratio(inner_products(base[name], [one[name], two[name]])).item() < 0.95, name
