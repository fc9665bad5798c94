#!/usr/bin/env bash
# The paper's OPT table: one line and one JSON per cell, out/opt/MODEL/CELL.json.  Finished cells are skipped; a failed one stops no
# other, but if the model cannot be had the script stops.
#
#   bash scripts/opt.sh                                      every model, smallest first; further flags go to each opt.py
#   MODELS="125m 1.3b" bash scripts/opt.sh --data_dir DIR    some models, local corpora
#   MODEL_PREFIX=demo/ MODELS=opt OUT=out/try bash scripts/opt.sh --data_dir demo/data --calib_data world --eval world --seqlen 256
#   python scripts/table.py out/opt                          the table, printed at the end too; use another OUT for other flags
set -euo pipefail

script=opt.py table=opt always=''
MODELS=${MODELS:-125m 1.3b 2.7b 6.7b 13b 30b 66b 350m} # 350m is not in the paper
MODEL_PREFIX=${MODEL_PREFIX-facebook/opt-}
source "$(dirname "${BASH_SOURCE[0]}")/cells.sh"

smooth="--smooth --alpha 0.50 --min 0.10"
for model in $MODELS; do
    cell full --method full
    cell rtn-w4a8 --method rtn --wbits 4 --act_bits 8
    cell smoothquant-w4a8 --method smoothquant --wbits 4 --act_bits 8 --alpha 0.50 --min 0.10
    cell rtn-w4a16 --method rtn --wbits 4 --act_bits 16
    cell rtn-w3a16 --method rtn --wbits 3 --act_bits 16
    cell gptq-w4a16 --method gptq --wbits 4
    cell gptq-w4a16-smooth --method gptq --wbits 4 $smooth
    cell gptq-w3a16 --method gptq --wbits 3
    cell gptq-w3a16-smooth --method gptq --wbits 3 $smooth
    cell awrq-w4a8 --method awrq --wbits 4 --act_bits 8
    cell awrq-w4a8-smooth --method awrq --wbits 4 --act_bits 8 $smooth
    cell awrq-w4a6 --method awrq --wbits 4 --act_bits 6
    cell awrq-w4a6-smooth --method awrq --wbits 4 --act_bits 6 $smooth
    cell awrq-w3a8 --method awrq --wbits 3 --act_bits 8
    cell awrq-w3a8-smooth --method awrq --wbits 3 --act_bits 8 $smooth
    cell act_only-w16a8 --method act_only --act_bits 8
    cell act_only-w16a8-smooth --method act_only --act_bits 8 $smooth
done

finish
