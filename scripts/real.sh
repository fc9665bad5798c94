#!/usr/bin/env bash
# A real pretrained model at W4A8, W3A8 and W4A6: one JSON per cell, out/real/MODEL/CELL.json.  Finished cells are skipped; a failed one stops
# no other.  scripts/real_model.py makes the model.  About five hours on 2 cores; the table can be had from what is there.
#
#   bash scripts/real.sh --data_dir DIR          every cell; further flags go to each main.py
#   CELLS="plus awrq" BITS=w4a8 SEEDS="0 1 2" bash scripts/real.sh --data_dir DIR    some of them
#   python scripts/table.py out/real             the table
#
# Perplexity of the first 24 windows of WikiText-2's test split and of C4's validation documents, joined; calibrated on 64 windows of C4's
# training documents, joined.  Options are chosen on other text: --eval wikitext2-validation,c4-joined --eval_windows 100:124.
set -euo pipefail

script=main.py table=real
always='--calib_data c4-joined --nsamples 64 --seqlen 512 --eval wikitext2,c4-joined --eval_windows 24'
MODELS=${MODELS:-models/smollm2}
MODEL_PREFIX=${MODEL_PREFIX-}
BITS=${BITS:-w4a8 w3a8 w4a6}
SEEDS=${SEEDS:-0}
source "$(dirname "${BASH_SOURCE[0]}")/cells.sh"

options="
rtn          --method rtn
smoothquant  --method smoothquant
awrq         --method awrq
awrq-smooth  --method awrq --smooth
gptq         --method gptq --act_quant
plus         --method awrq --preset plus
plus-tuned   --method awrq --preset plus --tune_steps 64
serve        --method awrq --preset serve
best         --method awrq --preset best
best-untuned --method awrq --preset best --tune_steps 0
"
CELLS=${CELLS:-$(awk '{print $1}' <<< "$options")}

for model in $MODELS; do
    cell full --method full
    for seed in $SEEDS; do
        for bits in $BITS; do
            w=${bits#w} a=${bits#*a}
            while read -r name flags_of; do
                if [[ -n $name && " ${CELLS//$'\n'/ } " == *" $name "* ]]; then
                    cell "$name-$bits-$seed" --wbits "${w%a*}" --act_bits "$a" --seed "$seed" $flags_of
                fi
            done <<< "$options"
        done
    done
done

finish
