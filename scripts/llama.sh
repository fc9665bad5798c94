#!/usr/bin/env bash
# The paper's zero-shot table for LLaMA: one line and one JSON per cell, out/llama/MODEL/CELL.json.  Finished cells are skipped; a failed one
# stops no other, but if the model cannot be had the script stops.
#
#   bash scripts/llama.sh                                    every model, smallest first; further flags go to each main.py
#   MODELS="huggyllama/llama-7b" bash scripts/llama.sh --batch_size auto --data_dir DIR --skip_missing    some models, local tasks and corpora
#   MODEL_PREFIX=demo/ MODELS=llama OUT=out/try bash scripts/llama.sh --data_dir demo/data --calib_data world --seqlen 256 \
#       --tasks demo/tasks/world_deed.yaml,demo/tasks/world_why.yaml
#   python scripts/table.py out/llama                        the table, printed at the end too; use another OUT for other flags
set -euo pipefail

# StoryCloze is licensed: it is in the table if --data_dir has it.
data=$(while [[ $# -gt 0 ]]; do case $1 in --data_dir) echo "${2-}" ;; --data_dir=*) echo "${1#*=}" ;; esac; shift; done)
tasks=piqa,arc_easy,arc_challenge,boolq,copa
if [[ -n $data && -n $(find "$data/storycloze_2018" -name 'validation.jsonl*' 2> /dev/null) ]]; then
    tasks+=,storycloze
elif [[ " $* " != *" --tasks"[\ =]* ]]; then
    echo "llama.sh: storycloze is left out: no storycloze_2018/validation.jsonl in --data_dir; docs/tasks.md says how to get it" >&2
fi

script=main.py table=llama always="--tasks $tasks --table_results"
# folders or hub names under MODEL_PREFIX; LLaMA 1 has no home on the hub but copies, LLaMA 2 is gated: `hf auth login`
MODELS=${MODELS:-huggyllama/llama-7b meta-llama/Llama-2-7b-hf huggyllama/llama-13b meta-llama/Llama-2-13b-hf huggyllama/llama-30b huggyllama/llama-65b meta-llama/Llama-2-70b-hf}
MODEL_PREFIX=${MODEL_PREFIX-}
source "$(dirname "${BASH_SOURCE[0]}")/cells.sh"

smooth="--smooth --alpha 0.50 --min 0.01"
for model in $MODELS; do
    cell full --method full
    for bits in "4 8" "4 6" "3 8"; do
        w=${bits% *} a=${bits#* }
        quantized="--wbits $w --act_bits $a"
        cell rtn-w${w}a$a --method rtn $quantized
        cell smoothquant-w${w}a$a --method smoothquant $quantized --alpha 0.50 --min 0.01
        cell gptq-w${w}a$a --method gptq $quantized --act_quant
        cell gptq-w${w}a$a-smooth --method gptq $quantized --act_quant $smooth
        cell awrq-w${w}a$a --method awrq $quantized
        cell awrq-w${w}a$a-smooth --method awrq $quantized $smooth
    done
    cell rtn-w4a16 --method rtn --wbits 4 --act_bits 16
    cell rtn-w3a16 --method rtn --wbits 3 --act_bits 16
    cell gptq-w4a16 --method gptq --wbits 4 # the published gptq: weights only
    cell gptq-w4a16-smooth --method gptq --wbits 4 $smooth
    cell gptq-w3a16 --method gptq --wbits 3
    cell gptq-w3a16-smooth --method gptq --wbits 3 $smooth
done

finish
