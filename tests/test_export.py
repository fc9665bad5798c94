"""Exports in transformers alone."""

import json

import pytest
import reference
import torch
from conftest import CPU, WORDS, tiny_model, token_ids, toy_tokenizer
from safetensors.torch import load_file
from test_checkpoint import TYPES, recipe, saved, settings_id
from transformers import AutoModelForCausalLM

import quant
from formats import compressed
from formats.checkpoint import open_checkpoint
from formats.export import check_export, export
from formats.whole import load
from recipe import UsageError
from scripts import compare_export

pytestmark = pytest.mark.slow

IDS = token_ids(4, 16)
EXPORTED = [
    *zip(TYPES[:3], ({}, {"groupsize": 16}, {"sym": True}), strict=True),
    (TYPES[2], {}),
    (TYPES[0], {"smooth": True}),
    (TYPES[2], {"smooth": True, "act_pertoken": True}),
    (TYPES[3], {"act_pertoken": True, "groupsize": 16, "sym": True}),
    (TYPES[3], {"act_pertoken": True, "act_sym": True, "rotate": True, "smooth": True}),
    (TYPES[0], {"act_sym": True, "rotate": True}),
    (TYPES[4], {"wbits": 8}),
    (TYPES[2], {"sym": True, "act_bits": 6}),
    (TYPES[0], {"wbits": 2, "groupsize": 16}),
    (TYPES[2], {"method": "gptq", "act_bits": 16, "groupsize": 32}),
]


@pytest.mark.parametrize(("kind", "settings"), EXPORTED, ids=settings_id)
def test_transformers_alone_loads_an_export(kind, settings, tmp_path, monkeypatch):
    store = saved(tmp_path / "saved", tiny_model(*kind), settings)
    model = store.decoder().materialize(CPU)
    export(store, tmp_path / "at once", "compressed-tensors", toy_tokenizer())
    export(open_checkpoint(tmp_path / "saved").source, tmp_path / "exported", "compressed-tensors", toy_tokenizer())
    weights = [load_file(tmp_path / name / "model-00001-of-00003.safetensors") for name in ("at once", "exported")]
    assert weights[0].keys() == weights[1].keys() and all(t.equal(weights[1][name]) for name, t in weights[0].items())
    exported, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32),
        load(tmp_path / "saved", arithmetic="integers"),
    )
    for ids in (IDS[:1], IDS[1:2, :5]):
        with torch.no_grad():
            logits, fake, ours = (m(ids).logits for m in (exported, model, loaded))
        for expected in (fake, ours):
            assert (logits - expected).abs().max() < (0.05 if settings.get("act_sym") else 1e-3) * expected.abs().max()
    if settings.get("act_sym"):
        return  # the largest of a symmetric grid lies between two points of it: the last bit decides
    # Rounding that moves an activation to the next code is all that is left: in float64 it moves none.
    monkeypatch.setattr(quant, "fake_quant_act", reference.fake_quant_act)
    with torch.no_grad():
        logits, fake = (m.double()(IDS[:1]).logits for m in (exported, model))
    torch.testing.assert_close(logits, fake, rtol=0, atol=1e-10 * fake.abs().max().item())


def unpacked(words, bits, n):
    """The first n numbers of a row of int32 words, bit by bit, the lowest first."""
    stream = "".join(format(word % 2**32, "032b")[::-1] for word in words)
    return [int(stream[i * bits : (i + 1) * bits][::-1], 2) for i in range(n)]


@pytest.mark.parametrize(("bits", "sym", "groupsize"), [(bits, bits in (3, 8), -1 if bits % 2 else 16) for bits in range(2, 9)])
def test_packing_is_dense(bits, sym, groupsize, tmp_path):
    """The words of a row have no gap, and go on where a code crosses from one to the next; zero points lie along the rows."""
    store = saved(tmp_path / "saved", tiny_model("opt", "pre-norm"), {"method": "rtn", "wbits": bits, "sym": sym, "groupsize": groupsize})
    for q, grid in store.codes(0).values():
        tensors = compressed.packed_linear(q, grid, store.recipe)
        (R, C), G = q.shape, grid.zero.shape[1]
        assert tensors["weight_packed"].shape == (R, -(-C * bits // 32)) and tensors["weight_packed"].dtype == torch.int32
        assert [unpacked(row, bits, C) for row in tensors["weight_packed"].tolist()] == q.tolist()
        if sym:
            assert "weight_zero_point" not in tensors and (grid.zero == 2 ** (bits - 1)).all()
        else:
            assert tensors["weight_zero_point"].shape == (-(-R * bits // 32), G)
            assert [unpacked(column, bits, R) for column in tensors["weight_zero_point"].T.tolist()] == grid.zero.T.tolist()


SERVE = {"act_pertoken": True, "act_sym": True}


@pytest.mark.parametrize(
    ("kind", "settings", "vllm", "transformers"),
    [
        (TYPES[2], SERVE, "vllm serve DIR --linear-backend humming (warning: without", "0.17.1)"),
        (TYPES[0], SERVE, "vllm serve DIR --linear-backend humming (warning: without", "import awrq_hf"),
        (TYPES[2], SERVE | {"wbits": 3, "sym": True}, "silently runs W3A16", "0.18 or newer"),
        (TYPES[2], SERVE | {"wbits": 3}, "fill no whole words: --sym", "import awrq_hf"),
        (TYPES[2], SERVE | {"wbits": 8}, "8-bit weights are symmetric there: --sym", "0.17.1)"),
        (TYPES[2], SERVE | {"act_bits": 6}, "6 bits: --act_bits 8", "0.17.1)"),
        (TYPES[2], SERVE | {"groupsize": 16}, "--groupsize -1", "0.17.1)"),
        (TYPES[2], {"act_pertoken": True}, "--act_sym", "0.17.1)"),
        (TYPES[2], {"act_sym": True, "sym": True}, "--act_pertoken", "0.17.1 or newer"),
        (TYPES[2], {"method": "gptq", "act_bits": 16}, "vllm serve DIR", "0.17.1)"),
    ],
    ids=str,
)
def test_who_reads_an_export(kind, settings, vllm, transformers):
    lines = [str(reader) for reader in compressed.readers(recipe(**settings), tiny_model(*kind).config, "DIR")]
    assert vllm in lines[0] and transformers in lines[1] and len(lines) == 2, lines


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bits", [8, 6])
def test_activations_are_rounded_as_the_format_does(bits, per_token):
    """Symmetric ones by the very numbers, on inputs in one type."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = token_ids(2, 640).view(2, 20, 32).float().sin() * 3 + 0.5
    args = QuantizationArgs(num_bits=bits, symmetric=True, dynamic=True, strategy="token" if per_token else "tensor")
    for part in x.split(1):  # their tensor is ours of one sequence
        scale, zero = compute_dynamic_scales_and_zp(part, args, torch.nn.Module())
        assert fake_quantize(part, scale, zero, args).equal(quant.fake_quant_act(part, bits, per_token, True))


@pytest.mark.parametrize(
    ("kind", "settings", "parts"),
    [
        (TYPES[0], {"groupsize": 24}, ["--groupsize 24", "fc1"]),
        (TYPES[0], {"act_pertoken": True}, ["fc1, fc2", "--act_sym", "--act_pertoken"]),
        (TYPES[1], {"smooth": True}, ["q_proj", "fc1", "--no-smooth"]),
        (TYPES[0], {"method": "act_only", "wbits": 16}, ["act_only"]),
    ],
    ids=str,
)
def test_what_the_format_cannot_say(kind, settings, parts):
    with pytest.raises(UsageError) as e:
        check_export("compressed-tensors", recipe(**settings), tiny_model(*kind).config)
    assert all(part in str(e.value) for part in parts), e.value


def test_comparing_an_export(run_script, tmp_path):
    """The script finds no difference in an export, and every difference in one of another model."""
    folders = {seed: (tmp_path / f"saved {seed}", tmp_path / f"exported {seed}") for seed in (0, 1)}
    for seed, (folder, exported) in folders.items():
        store = saved(folder, tiny_model("llama", "grouped", seed))
        export(store, exported, "compressed-tensors", toy_tokenizer())
    rows = [{"text": " ".join(WORDS[10 + k : 20 + k]), "choices": [WORDS[4 + k], " ".join(WORDS[40 + k : 43 + k])]} for k in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}}}
    task |= {"validation_split": "validation", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task |= {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    arguments = ("--tasks", tmp_path / "toy.yaml", "--runs", 1)
    status, out, _ = run_script(compare_export, *folders[0], *arguments)
    assert status == 0 and "no answer differs" in out and "10 log-likelihoods differ by 0.0e+00" in out
    status, out, _ = run_script(compare_export, folders[0][0], folders[1][1], *arguments, "--no-float64")
    assert status == 1 and "NO NEAR TIE" in out and "float64" not in out
