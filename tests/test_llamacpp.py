"""Exports to GGUF, read by the package gguf: our weights, in the original's file."""

import gguf
import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_model, toy_tokenizer
from test_checkpoint import TYPES, recipe, saved, settings_id

from formats.export import check_export, export
from formats.llamacpp import FILE, sizes
from quant import from_int
from recipe import UsageError

PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
PARTS |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm"}
PARTS |= {"post_attention_layernorm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def gguf_name(name):
    """A tensor's name in llama.cpp."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    *_, number, _, part, kind = name.split(".") if name.count(".") == 5 else (*name.split(".")[:3], "", *name.split(".")[3:])
    return f"blk.{number}.{PARTS[part]}.{kind}"


def permuted(tensor, name, config):
    """The rows of LLaMA's queries and keys as llama.cpp's converter puts them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return tensor
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def write_original(path, model, tokens=WORDS, **metadata):
    """A GGUF file of a tiny model, in float32."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    settings = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4}
    for key, value in settings.items():
        value = metadata.get(key, value)
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"{kind}.{key}", value)
    writer.add_float32(f"{kind}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_array("tokenizer.ggml.tokens", list(tokens))
    writer.add_string("tokenizer.chat_template", "{{ it }}")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or metadata.get("head", not config.tie_word_embeddings):
            writer.add_tensor(gguf_name(name), permuted(tensor, name, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EXPORTED = [
    (TYPES[2], {"wbits": 4}),  # biases on all linears
    (TYPES[2], {"wbits": 3, "smooth": True}),
    (TYPES[3], {"wbits": 4, "rotate": True, "act_pertoken": True}),  # tied before
    (TYPES[3], {"wbits": 2, "sym": True}),
    (TYPES[4], {"wbits": 4, "sym": True, "groupsize": 32}),
]


@pytest.mark.parametrize(("kind", "settings"), EXPORTED, ids=settings_id)
def test_gguf_has_our_weights(kind, settings, tmp_path):
    model = tiny_model(*kind)
    like = write_original(tmp_path / "like.gguf", model)
    store = saved(tmp_path / "saved", model, settings)
    lines = export(store, tmp_path / "out", "gguf", toy_tokenizer(), like)
    assert "are unquantized" in lines[0] and f"-m {tmp_path / 'out' / FILE}" in lines[1]
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    there = {t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    config, rotated = model.config, settings.get("rotate", False)
    for i in range(2):
        for name, (q, grid) in store.codes(i).items():
            name = f"model.layers.{i}.{name}.weight"
            expected = permuted(from_int(q, grid), name, config)
            step = (grid.scale * (grid.zero + 15)).amax().item() * 2**-11  # float16's rounding of scale and minimum
            torch.testing.assert_close(there[gguf_name(name)], expected, rtol=0, atol=step)
            assert kinds[gguf_name(name)] == ("Q4_0" if settings.get("sym") else "Q4_1")
        for name, tensor in store.read(i).items():
            if name.endswith(("norm.weight", ".bias")):
                name = f"model.layers.{i}.{name}"
                assert there[gguf_name(name)].equal(permuted(tensor.float(), name, config))
    rest = store.rest([*OUTSIDE]) if rotated else dict(model.state_dict())
    for name in OUTSIDE if rotated or not config.tie_word_embeddings else [*OUTSIDE][:2]:
        torch.testing.assert_close(there[gguf_name(name)], rest[name], rtol=2**-11 if rotated else 0, atol=1e-7)
    assert rotated or kinds["token_embd.weight"] == "F32", "what did not change is the original's"
    assert reader.get_field("tokenizer.ggml.tokens").contents() == WORDS
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ it }}"
    assert sum(sizes(tmp_path / "out", config).values()) == sum(t.n_bytes for t in reader.tensors)


def test_a_head_that_the_original_file_lacks_is_written(tmp_path):
    """llama.cpp would take the embedding for it."""
    model = tiny_model(*TYPES[2])
    assert not model.lm_head.weight.equal(model.model.embed_tokens.weight)
    like = write_original(tmp_path / "like.gguf", model, head=False)
    export(saved(tmp_path / "saved", model), tmp_path / "out", "gguf", toy_tokenizer(), like)
    there = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert there["output.weight"].equal(model.lm_head.weight.half()) and there["token_embd.weight"].equal(model.model.embed_tokens.weight)


def test_tokens_that_the_converter_writes_otherwise(tmp_path):
    """Added tokens have spaces for marks, and numbers without a token get one; a setting may be given for each block."""

    class Tokenizer:
        tokens = ["<s>", "\u2581\u2581", None, "</s>"]
        convert_ids_to_tokens = tokens.__getitem__

        def __len__(self):
            return len(self.tokens)

    model = tiny_model(*TYPES[2])
    blocks = {"attention.head_count": [4, 4]}
    like = write_original(tmp_path / "a.gguf", model, ["<s>", "  ", "[PAD2]", "</s>", *WORDS[4:]], **blocks)
    check_export("gguf", recipe(), model.config, like, Tokenizer())
    like = write_original(tmp_path / "b.gguf", model, **{"attention.head_count": [4, 2]})
    with pytest.raises(UsageError, match="attention.head_count is .4, 2. there, 4 here"):
        check_export("gguf", recipe(), model.config, like, Tokenizer())


def test_what_gguf_cannot_say(tmp_path):
    llama, config = tiny_model(*TYPES[2]), tiny_model(*TYPES[2]).config
    like = write_original(tmp_path / "like.gguf", llama)
    (tmp_path / "text.gguf").write_text("no GGUF")
    narrow = tiny_model(*TYPES[2], intermediate_size=48)

    def refused(parts, settings=(), config=config, like=like, tokenizer=None):
        with pytest.raises(UsageError) as e:
            check_export("gguf", recipe(**dict(settings)), config, like, tokenizer)
        assert "\n" not in str(e.value) and all(part in str(e.value) for part in parts), e.value

    check_export("gguf", recipe(), config, like, toy_tokenizer())
    refused(["--wbits 5", "4 bits"], {"wbits": 5})
    refused(["--groupsize 24", "32"], {"groupsize": 24})
    refused(["down_proj has 48 columns"], config=narrow.config)
    refused(["no opt models"], config=tiny_model().config)
    refused(["text.gguf", "no GGUF file"], like=tmp_path / "text.gguf")
    refused(["nowhere", "cannot be read (No such file"], like=tmp_path / "nowhere")
    (tmp_path / "half.gguf").write_bytes(like.read_bytes()[:400])
    refused(["half.gguf", "is damaged", "from a copy"], like=tmp_path / "half.gguf")
    refused(["its architecture is llama", "qwen3"], config=tiny_model(*TYPES[4]).config)
    refused(["embedding_length is 64 there, 32 here"], like=write_original(tmp_path / "a.gguf", llama, embedding_length=64))
    refused(
        ["token_embd.weight is (96, 32) there", "(100, 32) here"],
        like=write_original(tmp_path / "b.gguf", tiny_model(*TYPES[2], vocab_size=96)),
    )
    refused(
        ["which this one has not"],
        like=write_original(tmp_path / "c.gguf", tiny_model(*TYPES[2])),
        config=tiny_model("llama", "plain", num_key_value_heads=2).config,
    )
    other = ["<s>", "<pad>", "x", *WORDS[3:]]
    refused(["token 2 is 'x' there, '</s>' here"], like=write_original(tmp_path / "d.gguf", llama, other), tokenizer=toy_tokenizer())
