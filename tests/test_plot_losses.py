"""scripts/plot_losses.py on made-up results."""

import shutil

import pytest

from scripts import plot_losses

pytestmark = pytest.mark.slow


def test_losses_are_drawn_over_the_unquantized_model(results, tmp_path, run_script):
    results("m/full.json", "/a/m", {"own": 10.0}, method="full")
    folder = tmp_path / "opt"
    status, _, err = run_script(plot_losses, folder)
    assert status == 2 and "no run there but" in err[-1]
    awrq = {"method": "awrq", "wbits": 4, "act_bits": 8}
    results("m/tuned.json", "/a/m", {"own": 11.0}, tune_steps=8, **awrq)
    results("m/plain.json", "/a/m", {"own": 20.0, "other": 3.0}, **awrq)
    results("m/three.json", "/a/m", {"own": 30.0}, **awrq | {"wbits": 3})
    status, out, _ = run_script(plot_losses, folder, "--out", tmp_path / "a.png")
    assert status == 0 and [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:5]] == [
        ["unquantized", "10.00", "10.00"],
        ["awrq", "20.00", "30.00"],
        ["awrq, tune_steps 8", "11.00", "not run"],
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    results("n/full.json", "/a/n", {"own": 10.0}, method="full")
    status, _, err = run_script(plot_losses, folder)
    assert status == 2 and "one model" in err[-1]
    shutil.rmtree(folder / "n")
    (folder / "m" / "full.json").unlink()
    status, _, err = run_script(plot_losses, folder)
    assert status == 2 and "--method full" in err[-1]
