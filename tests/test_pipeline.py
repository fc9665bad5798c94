"""What a run checks before any long work, and what it warns of."""

import warnings

import pytest

from recipe import UsageError
from run.pipeline import check_writable, warn_of_losses
from run.quantize import Layer


def test_layers_that_lose_their_output_are_named():
    fine, bad, worst = Layer(0, "mlp.up_proj", 0.4), Layer(3, "mlp.up_proj", 0.6), Layer(11, "mlp.down_proj", 0.97)
    with pytest.warns(UserWarning, match=r"2 of 3 layers.*block 11 mlp\.down_proj the most \(error 0\.97\)"):
        warn_of_losses([bad, worst, fine])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_losses([fine])


def test_where_one_can_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("the old one")
    for path in (None, "run.json", str(tmp_path / "run.json"), "new/folder/run.json", "there.json"):
        check_writable(path)
    assert (tmp_path / "there.json").read_text() == "the old one"
    assert not list(tmp_path.glob("**/run.json")) and not list(tmp_path.glob("**/*.partial"))


def test_where_one_cannot_write(tmp_path):
    """A file stands for a folder without permission, which would not stop root."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "run.json", tmp_path / "file" / "deep" / "run.json"):
        with pytest.raises(UsageError) as caught:
            check_writable(str(path))
        message = str(caught.value)
        assert "--output_path" in message and str(path) in message and "\n" not in message and "give" in message
