"""Every row of the table of families is a model of transformers: no fold, no rotation and no walk changes a logit; a wrong row is found."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CONTEXT, CPU, TINY, WORDS, FinishedBlocks, decoder_blocks, quantize, token_ids
from safetensors.torch import load_file, save_file
from test_checkpoint import saved
from transformers import AutoConfig, AutoModelForCausalLM

from bench import family as check
from families import FAMILIES, GPT_NEOX, LLAMA, OLMO2, PHI3, Group, never, value_rows
from formats.whole import load
from modelutils import check_family, decoder_of, open_decoder
from quant import Batch, DeferredNorm, GatedMLP, replace_linears, rtn, use_integers
from recipe import PRESETS, Recipe, UsageError
from run.calibrate import observe
from run.quantize import beside, quantize_blocks
from runtime import Place

SIZES = {  # of a family that conftest has no row for
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "vocab_size": len(WORDS),
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {  # beside the one that a configuration has by itself
    "granite": [{"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0}],
    "smollm3": [{"no_rope_layers": [1, 0]}, {"use_sliding_window": True, "attention_bias": True, **TWO_KINDS}],
    "stablelm": [{"use_qkv_bias": True, "qk_layernorm": True}],
    "phi3": [{"sliding_window": 8}],
    "gemma": [{"num_key_value_heads": 1, "head_dim": 16}],
    "gemma2": [TWO_KINDS],
    "gemma3_text": [TWO_KINDS],
    "gpt_neox": [{"use_parallel_residual": False, "rotary_pct": 0.25}],
    "qwen2": [{"use_sliding_window": True, **TWO_KINDS}],
}
CASES = [(family, variant) for family in FAMILIES for variant in ({}, *VARIANTS.get(family, ()))]


def tiny_config(family, variant=None):
    settings = TINY[family]["settings"] if family in TINY else SIZES
    return AutoConfig.for_model(family, **settings | (variant or {}))


def wrong(found):
    return [what for what, value in found if isinstance(value, float) and not value < check.TOLERANCE]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), CASES, ids=lambda x: x if isinstance(x, str) else ",".join(x) or "plain")
def test_a_row_changes_nothing(family, variant):
    model = check.random_model(tiny_config(family, variant))
    found = dict(check.checks(model))
    assert not wrong(found.items()), found
    assert len(found) == len(FAMILIES[family].groups) + 4
    refused = FAMILIES[family].residual.obstacle(model.config)
    assert isinstance(found["rotated"], str) == bool(refused) and (refused or "") in str(found["rotated"])
    assert check.check_names(decoder_of(model)) == [], "all linears of a block are quantized"


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TINY])
def test_a_quantized_model_is_the_same_in_a_walk_and_as_a_whole(family):
    """With all that `best` does to it, but tuning; the other families have tests of their own, by hand."""
    model, ids = check.random_model(tiny_config(family, next(iter(VARIANTS.get(family, [{}]))))).float(), token_ids(4, 24)
    best = PRESETS["best"] | {"tune_steps": 0}
    if FAMILIES[family].residual.obstacle(model.config):
        best |= {"rotate": False, "target": "stream"}
    quantized, store, layers = quantize(model, ids, Recipe(method="awrq", wbits=4, act_bits=8, **best))
    decoder = store.decoder()
    with torch.no_grad():
        sequences = decoder.embed(ids.split(2), Place(CPU, "device"))
        for i, block in decoder.visits(CPU, "test"):
            sequences.propagate(block, f"block {i}")
        walked, whole, before = torch.cat(list(decoder.logits(sequences))), quantized(ids).logits, model(ids).logits
    torch.testing.assert_close(walked, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    assert len(layers) == 2 * len(decoder.linears) and not torch.equal(whole, before)
    assert float((whole - before).norm() / before.norm()) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_gates_are_those_of_the_family(family):
    """In front of integers, transformers' own modules and what the quantizer computes in their place: but for ties the same logits."""
    model, ids = check.random_model(tiny_config(family)).float(), token_ids(4, 24)
    _, store, _ = quantize(model, ids, Recipe(method="rtn", wbits=4, act_bits=8, act_pertoken=True))
    store.kernel, row = "torch", store.original.family
    deferred = store.decoder().materialize(CPU)
    found = [sum(isinstance(m, kind) for m in decoder_blocks(deferred)[0].modules()) for kind in (DeferredNorm, GatedMLP)]
    assert found == [len(row.rms_norms), 1 if row.mlp else 0]
    assert found == [2, 1] or family not in ("llama", "mistral", "qwen2", "qwen3")
    store.original.family = replace(row, rms_norms=(), mlp="")
    plain = store.decoder().materialize(CPU)
    assert not any(isinstance(m, DeferredNorm | GatedMLP) for m in plain.modules())
    with torch.no_grad():
        logits, wanted = deferred(ids).logits, plain(ids).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 0.01


def test_linears_with_an_in_scale_read_what_their_producer_makes():
    """As what is divided by it is what the norm, or the gate, has made."""
    decoder = decoder_of(check.random_model(tiny_config("llama")).float())
    for scaled, norms, mlps in (("self_attn.q_proj", 1, 1), ("mlp.down_proj", 2, 0)):
        block = decoder.block(0)
        linears = replace_linears(block, decoder.linears, Batch())
        codes = {name: rtn(linear.weight, None, Recipe(method="rtn", wbits=4), name) for name, linear in linears.items()}
        linears[scaled].in_scale = torch.ones(linears[scaled].weight.shape[1])
        for linear in linears.values():
            linear.freeze((8, True, False))
        use_integers(block, LLAMA, decoder.config, codes, "torch")
        assert [sum(isinstance(m, kind) for m in block.modules()) for kind in (DeferredNorm, GatedMLP)] == [norms, mlps]


@pytest.mark.slow
def test_hooks_see_what_the_page_says():
    """docs/kernels.md; of a block in integers against one whose linears read what norms and gates have made."""
    _, store, _ = quantize(
        check.random_model(tiny_config("llama")).float(), token_ids(1, 8), Recipe(method="rtn", wbits=4, act_bits=8, act_pertoken=True)
    )

    def seen(kernel):
        store.kernel, found = kernel, {}
        model = store.decoder().materialize(CPU)
        for name, module in decoder_blocks(model)[0].named_modules():
            module.register_forward_hook(lambda _, args, y, name=name: found.update({name: (*args, y)}))
        model(token_ids(1, 8))
        return found, {name for name, _ in decoder_blocks(model)[0].named_modules()}

    (found, names), (plain, _) = seen("torch"), seen(None)
    stream, made = found["input_layernorm"]
    assert made is stream and stream.equal(plain["input_layernorm"][0])
    for name in LLAMA.groups[0].linears:
        assert found[name][0] is stream
        torch.testing.assert_close(found[name][1], plain[name][1], rtol=1e-3, atol=1e-3)
    whole = found["self_attn.q_proj.together.whole"][1]
    assert whole.equal(torch.cat([found[name][1] for name in LLAMA.groups[0].linears], -1))
    stream, gates = found["mlp.gate_proj.together.whole"]
    assert all(found[name][0] is stream for name in ("mlp", "post_attention_layernorm")) and found["mlp.down_proj"][0] is gates
    assert not {"mlp.gate_proj", "mlp.up_proj"} & found.keys() and {"mlp.gate_proj", "mlp.up_proj"} < names and "mlp.act_fn" not in names
    wanted = torch.cat([plain[name][1] for name in LLAMA.groups[2].linears], -1)
    for made, same in ((gates, wanted), *((found[name][1], plain[name][1]) for name in ("mlp", "mlp.down_proj"))):
        assert float((made - same).norm() / same.norm()) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "given"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_a_deferred_norm_takes_another_type_as_transformers_does(dtype, given):
    """Its weight and what it reads then make the wider of both types, as embeddings do that are given to a narrower model."""
    model = check.random_model(tiny_config("llama")).float()
    _, store, _ = quantize(model, token_ids(1, 8), Recipe(method="rtn", wbits=4, act_bits=8, act_pertoken=True))
    store.kernel, row = "torch", store.original.family
    block = store.decoder().block(0)
    store.original.family = replace(row, rms_norms=(), mlp="")
    plain = store.decoder().block(0)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(getattr(torch, given))
    for deferred in (block, plain):
        for name in row.rms_norms:
            deferred.get_submodule(name).to(getattr(torch, dtype))
    with torch.no_grad():
        for norm, linear in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.up_proj")):
            y, wanted = (b.get_submodule(linear)(b.get_submodule(norm)(x)) for b in (block, plain))
            assert y.dtype == wanted.dtype == torch.float32 and float((y - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_deferred_norm_has_its_own_name_alone(family):
    """In the model and in a copy of it, which computes by its own norms."""
    model, ids = check.random_model(tiny_config(family)).float(), token_ids(1, 8)
    _, store, _ = quantize(model, ids, Recipe(method="rtn", wbits=4, act_bits=8))
    store.kernel = "torch"
    deferred = store.decoder().materialize(CPU)
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    assert [name for name in deferred.state_dict() if "norm" in name] == norms
    assert [name for name, _ in deferred.named_parameters() if "norm" in name] == norms
    copied, logits = copy.deepcopy(deferred), deferred(ids).logits
    decoder_blocks(deferred)[0].input_layernorm.weight.data.mul_(2)
    assert copied(ids).logits.equal(logits) and not deferred(ids).logits.equal(logits)


def test_a_gate_of_another_function_is_not_deferred():
    config = tiny_config("llama", {"hidden_act": "gelu"})
    _, store, _ = quantize(check.random_model(config).float(), token_ids(1, 8), Recipe(method="rtn", wbits=4, act_bits=8))
    store.kernel = "torch"
    assert not any(isinstance(m, GatedMLP) for m in store.decoder().materialize(CPU).modules())


def grouped(row, k, **changes):
    groups = list(row.groups)
    groups[k] = replace(groups[k], **changes)
    return replace(row, groups=tuple(groups))


def residual(row, **changes):
    return replace(row, residual=replace(row.residual, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "row", "named"),
    [
        ("llama", grouped(LLAMA, 1, rows=lambda config: None), "self_attn.o_proj smoothed"),
        ("llama", grouped(LLAMA, 3, producer="mlp.gate_proj"), "mlp.down_proj smoothed"),
        ("llama", grouped(LLAMA, 0, linears=("self_attn.q_proj", "self_attn.k_proj")), "input_layernorm takes the scale"),
        ("llama", residual(LLAMA, writers=("self_attn.o_proj",)), "rotated"),
        ("llama", residual(LLAMA, final_norm="model.embed_tokens"), "rotated"),
        ("gemma", LLAMA, "input_layernorm takes the scale"),
        ("gemma", replace(FAMILIES["gemma"], norm_offset=0.5), "all smoothed"),
        ("phi3", grouped(PHI3, 1, rows=value_rows), "self_attn.o_proj smoothed"),
        ("phi3", grouped(PHI3, 3, rows=lambda config: torch.arange(config.intermediate_size)), "mlp.down_proj smoothed"),
        ("gpt_neox", grouped(GPT_NEOX, 1, rows=lambda config: torch.arange(64, 96)), "attention.dense smoothed"),
        ("gpt_neox", grouped(GPT_NEOX, 3, exact=lambda config: True), "mlp.dense_4h_to_h smoothed"),
        ("gpt_neox", residual(GPT_NEOX, centered=False), "rotated"),
        ("olmo2", residual(OLMO2, norms=(), obstacle=lambda config: None), "rotated"),
        ("gemma", LLAMA, "norms and gates in the quantizer"),
        ("phi3", replace(PHI3, mlp="mlp"), "norms and gates in the quantizer"),
        ("stablelm", replace(FAMILIES["stablelm"], rms_norms=("input_layernorm",)), "norms and gates in the quantizer"),
        ("llama", replace(LLAMA, mlp="feed_forward"), "mlp name feed_forward, which the model does not have"),
        ("llama", grouped(LLAMA, 0, producer="input_norm"), "groups name input_norm, which the model does not have"),
        ("llama", grouped(LLAMA, 1, linears=("self_attn.out_proj",)), "groups name self_attn.out_proj"),
        ("llama", residual(LLAMA, head="score"), "residual name score"),
        ("llama", replace(LLAMA, blocks="model.layer"), "blocks are model.layer, which is no list of blocks; the model has model.layers"),
        ("llama", replace(LLAMA, blocks="model.norm"), "blocks are model.norm"),
        ("llama", replace(LLAMA, groups=LLAMA.groups[::-1]), "not in the order of execution"),
        ("llama", replace(LLAMA, groups=(Group("input_layernorm", ("self_attn.q_proj", "self_attn.o_proj")),)), "reads another input"),
    ],
)
def test_a_wrong_row_is_found_and_said_in_a_line(monkeypatch, run_script, tmp_path, family, row, named):
    monkeypatch.setitem(FAMILIES, family, row)
    tiny_config(family, {"num_key_value_heads": 2}).save_pretrained(tmp_path)
    status, _, err = run_script(check, tmp_path)
    assert status == 2 and len(err) == 1 and named in err[0], err


def test_the_command(run_script, tmp_path):
    tiny_config("gemma2", TWO_KINDS).save_pretrained(tmp_path)
    status, out, err = run_script(check, tmp_path, "--blocks", 1)
    assert status == 0 and not err, err
    assert "2 blocks of random weights" in out and "stay unquantized: none" in out, "each kind of attention is there"


def test_a_real_configuration_is_made_small_with_a_block_of_each_kind(run_script, tmp_path):
    kinds = {"no_rope_layers": [1, 1, 1, 0, 1, 1], "num_hidden_layers": 6, "vocab_size": 128_000, "intermediate_size": 11_008}
    config = check.small(tiny_config("smollm3", kinds | {"sliding_window": 4096, "pad_token_id": 127_999}), 2)
    assert config.num_hidden_layers == 2 and config.no_rope_layers == [1, 0] and config.sliding_window == 8 < check.TOKENS
    assert (config.vocab_size, config.intermediate_size, config.pad_token_id) == (512, 256, 0)
    assert check.small(tiny_config("llama"), 9).num_hidden_layers == 2
    tiny_config("llama", {"hidden_act": "wow"}).save_pretrained(tmp_path)
    status, _, err = run_script(check, tmp_path)
    assert status == 2 and len(err) == 1 and "no model can be made" in err[0], err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt_neox", "olmo2"])
def test_a_saved_model_of_a_new_family_is_loaded(family, tmp_path):
    model, ids = check.random_model(tiny_config(family, next(iter(VARIANTS.get(family, [{}]))))).float(), token_ids(3, 24)
    store = saved(tmp_path / "saved", model, {"smooth": True})
    loaded, quantized = load(tmp_path / "saved", arithmetic="dequantized"), store.decoder().materialize(CPU)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, quantized(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_quantized_is_said():
    with pytest.raises(UsageError, match="stablelm.*share a norm"):
        check_family(tiny_config("stablelm", {"use_parallel_residual": True}), "a-model", None)


def test_names_of_old_checkpoints(tmp_path):
    """Pythia's say embed_out."""
    model = AutoModelForCausalLM.from_config(tiny_config("gpt_neox"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
    assert "embed_out.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = open_decoder(tmp_path, config=model.config).materialize(CPU)
    with torch.no_grad():
        assert torch.equal(whole(token_ids(1, 8)).logits, model(token_ids(1, 8)).logits)


def test_a_group_without_a_producer_is_never_folded():
    for family, row in FAMILIES.items():
        for group in row.groups:
            assert group.producer or group.exact is never, family


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), CASES, ids=lambda x: x if isinstance(x, str) else ",".join(x) or "plain")
@torch.no_grad()
def test_what_a_layer_is_to_give_back_is_what_the_stream_has_lost(family, variant):
    """With what the last layer of a block should give, in place of what it gives, the block would put out what it does in the original."""
    decoder, ids = decoder_of(AutoModelForCausalLM.from_config(tiny_config(family, variant)).eval()), token_ids(4, 16)
    config, groups, residual = decoder.config, decoder.family.groups, decoder.family.residual
    recipe = Recipe(method="awrq", wbits=4, act_bits=8, target="residual", true_sequential=True)
    if reason := residual.obstacle(config):
        with pytest.raises(UsageError, match=f"--target residual: {reason}.*--target stream"):
            next(quantize_blocks(decoder, ids, recipe, FinishedBlocks(decoder, recipe)))
        return
    scale, side_by_side = getattr(config, "residual_multiplier", 1), getattr(config, "use_parallel_residual", False)
    sequences = decoder.embed(ids.split(2), Place(CPU, "device"))
    (stream,) = beside(sequences, decoder, recipe)
    assert list(stream.writers) == list(residual.writers[:1] if side_by_side else residual.writers)
    before = list(sequences.x)
    sequences.x = [x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(k)) for k, x in enumerate(before)]
    _, block = next(decoder.visits(CPU, ""))
    linears = replace_linears(block, decoder.linears, Batch())
    firsts, seen = {g.linears[0]: linears[g.linears[0]] for g in groups}, {}
    for name in firsts:
        seen[name] = SimpleNamespace(add=lambda *args, name=name: given.setdefault(name, []).append(args))
    given = {}
    with stream.inside(block, firsts):
        observe(block, sequences, "block 0", {linear: (seen[name],) for name, linear in firsts.items()}, stream)
    for k in range(len(sequences)):
        assert all(len(of[k]) == (3 if name in stream.writers else 2) for name, of in given.items())
        _, _, lost = given[residual.writers[0]][k]
        torch.testing.assert_close(lost * scale, before[k] - sequences[k], rtol=1e-4, atol=1e-5)
        if not side_by_side:
            x, target, lost = given[residual.writers[1]][k]
            missing = scale * (lost + (target - x) @ linears[residual.writers[1]].weight.T)
            torch.testing.assert_close(missing, stream[k] - sequences.run(block, k, "block 0"), rtol=1e-3, atol=1e-4)
