#!/usr/bin/env bash
# The paper's speedup figures from this machine's GPU: layers.json, blocks.json, speedup_tokens.png, speedup_models.png, speedup.md.
#   bash scripts/speedup.sh                        measure (an hour or two), then draw; into results/speedup/NAME_OF_THE_GPU
#   bash scripts/speedup.sh FILE.json [FILE.json]  only draw, from what was measured before: on any machine, into out/speedup
#   MODELS=llama-30b,llama-13b,opt-30b bash scripts/speedup.sh    the paper's models only; LLaMA-2-13B has the shapes of LLaMA-13B
# Variables: PYTHON, MODELS, OUT (the folder).  Run `python -m bench.tune` before: it measures which kernel is fastest where.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

if (($#)); then
  exec "$PYTHON" scripts/plot.py "$@" --out "${OUT:-out/speedup}"
fi

name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') ||
  { echo "speedup.sh: $PYTHON has no PyTorch; set PYTHON" >&2; exit 2; }
[ -n "$name" ] || { echo "speedup.sh: PyTorch finds no GPU here; give JSON files of one to draw from them" >&2; exit 2; }
folder=${OUT:-results/speedup/${name// /_}}
mkdir -p "$folder"
models=(${MODELS:+--models "$MODELS"})
"$PYTHON" -m bench.linears ${models[@]+"${models[@]}"} --output_path "$folder/layers.json"
"$PYTHON" -m bench.linears --block ${models[@]+"${models[@]}"} --output_path "$folder/blocks.json"
"$PYTHON" scripts/plot.py "$folder/layers.json" "$folder/blocks.json" --out "$folder"
