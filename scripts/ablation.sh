#!/usr/bin/env bash
# The paper, --preset plus, and plus less one option at a time: one JSON per cell, out/ablation/MODEL/WwAa-OPTIONS-SEED.json.  Finished cells are skipped.
#
#   bash scripts/ablation.sh                                     everything: hours on a CPU; further flags go to each run
#   SEEDS=0 BITS=w3a8 CELLS="paper plus" bash scripts/ablation.sh    a part of it
#   python scripts/table.py --ablation out/ablation              the table, printed at the end too, and what the options cost
#
# Each run is evaluated on two texts.  `choose` is what --preset plus was chosen by, `report` is what its numbers are reported on; calibration
# windows, 64 of them, come from a third.  MODELS: the demo's, by default, and folders of others, which need TEXT, a file of stories, one a line.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/cells.sh"
table=ablation table_flags=--ablation always='--nsamples 64 --calib_data choose --eval choose,report --method awrq'
SEEDS=${SEEDS:-0 1 2}
BITS=${BITS:-w4a8 w3a8 w4a6}
[[ -n ${MODELS-} ]] || MODEL_PREFIX=$root/ MODELS="demo/opt demo/llama"
MODEL_PREFIX=${MODEL_PREFIX-}

options="
paper
smooth           --smooth
rotate           --rotate
rotate-pertoken  --rotate --act_pertoken
plus             --preset plus
serve            --preset serve
no-rotate        --preset plus --no-rotate
no-pertoken      --preset plus --no-act_pertoken
no-smooth        --preset plus --no-smooth
one-alpha        --preset plus --no-smooth_search
weight-grid      --preset plus --grid weight
clip-none        --preset plus --clip none
clip-mse         --preset plus --clip mse
damp-0.01        --preset plus --percdamp 0.01
damp-0.1         --preset plus --percdamp 0.1
no-actorder      --preset plus --no-actorder
no-sequential    --preset plus --no-true-sequential
guided           --preset plus --guided
beam             --preset plus --beam 8
layer            --preset plus --target layer
stream-only      --preset plus --target_mix 1
residual         --preset plus --target residual
no-bias          --preset plus --no-bias_correction
tuned            --preset plus --tune_steps 32
best             --preset best
"
CELLS=${CELLS:-$(awk '{print $1}' <<< "$options")}

# texts FOLDER FILE LAST: the file's lines up to LAST for calibration, then half of the rest to choose by and half to report
texts() {
    local lines
    lines=$(wc -l < "$2")
    mkdir -p "$1/choose" "$1/report"
    awk -v n="$3" 'NR <= n' "$2" > "$1/choose/train.txt"
    awk -v a="$3" -v b=$((($3 + lines) / 2)) 'NR > a && NR <= b' "$2" > "$1/choose/test.txt"
    awk -v b=$((($3 + lines) / 2)) 'NR > b' "$2" > "$1/report/test.txt"
}

data=$results/ablation-text
mkdir -p "$data"
if [[ -n ${TEXT-} ]]; then
    texts "$data/stories" "$TEXT" $(($(wc -l < "$TEXT") * 84 / 100)) # leaves twice 64 windows of 512 tokens of TinyStories
fi
cat "$root/demo/data/world/train.txt" "$root/demo/data/world/test.txt" > "$data/world.txt"
texts "$data/world" "$data/world.txt" "$(wc -l < "$root/demo/data/world/train.txt")"

# Sets what a run on $model needs: the script, its text, the tasks it can be asked.
about_model() {
    case $MODEL_PREFIX$model in
        "$root/demo/opt") script=opt.py text=world seqlen=256 tasks=() ;;
        "$root/demo/llama") script=main.py text=world seqlen=256 tasks=(--tasks "$worlds" --limit 100 --batch_size 16 --table_results) ;;
        *)
            if [[ -z ${TEXT-} ]]; then
                echo "ablation.sh: $model needs a text: give TEXT=FILE" >&2
                exit 2
            fi
            script=main.py text=stories seqlen=512 tasks=()
            ;;
    esac
    given=(--data_dir "$data/$text" --seqlen "$seqlen" ${tasks[@]+"${tasks[@]}"})
}
worlds=$root/demo/tasks/world_deed.yaml,$root/demo/tasks/world_why.yaml

for model in $MODELS; do
    about_model # all of them, before any run
done
for model in $MODELS; do
    about_model
    cell full "${given[@]}" --method full
done
for seed in $SEEDS; do
    for bits in $BITS; do
        w=${bits#w} a=${bits#*a}
        for model in $MODELS; do
            about_model
            while read -r name flags_of; do
                if [[ " ${CELLS//$'\n'/ } " == *" $name "* && -n $name ]]; then
                    cell "$bits-$name-$seed" "${given[@]}" --wbits "${w%a*}" --act_bits "$a" --seed "$seed" $flags_of
                fi
            done <<< "$options"
        done
    done
done

finish
