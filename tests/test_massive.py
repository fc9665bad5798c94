"""scripts/massive.py: what it shows is what the whole model's linears read."""

import pytest
import torch
from conftest import CPU, decoder_blocks, save_model, tiny_model, token_ids

from modelutils import decoder_of
from scripts import massive


@pytest.mark.parametrize(("family", "variant", "last"), [("llama", "plain", "mlp.down_proj"), ("opt", "pre-norm", "fc2")])
def test_largest_inputs_are_those_of_the_whole_model(family, variant, last):
    model, ids, read = tiny_model(family, variant), token_ids(1, 24), []
    for block in decoder_blocks(model):
        block.get_submodule(last).register_forward_pre_hook(lambda linear, args: read.append(args[0].view(24, -1).abs().max(1)))
    values, channels = massive.largest_inputs(decoder_of(model), ids, CPU)
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(values, torch.stack([values for values, _ in read]), rtol=1e-4, atol=1e-5)
    assert channels.equal(torch.stack([channels for _, channels in read]))


def test_the_table_names_the_token_and_a_picture_is_drawn(corpora, tmp_path, run_script):
    folder = save_model(tmp_path / "model", tiny_model("llama", "plain"))
    status, out, _ = run_script(massive, folder, "--data_dir", corpora, "--seqlen", 32, "--out", tmp_path / "a.png")
    assert status == 0 and out.splitlines()[-1] == str(tmp_path / "a.png")
    assert len([line for line in out.splitlines() if line.startswith("| 0") or line.startswith("| 1")]) == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = run_script(massive, folder, "--data_dir", tmp_path, "--out", tmp_path / "b.png")
    assert status == 2 and "wikitext2" in err[-1] and not (tmp_path / "b.png").exists()
