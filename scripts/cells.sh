# Sourced by the scripts that fill the paper's tables.  They say which `script` and `table` it is, and what `always` goes to it; then
#   cell NAME FLAGS...    one run for $model: out/TABLE/MODEL/NAME.json.  A finished cell is skipped; a failed one stops no other.  But
#                         if a model has no result yet and ends with status 2, it cannot be had as asked: its other cells are left out, and
#                         the script stops if no model has one.
#   finish                prints the table; names the failed cells, exit status 1 if there are any
# Variables: OUT, MODEL_PREFIX, PYTHON, NPROC: processes of each run (default 1).  `flags`: what the user adds to every run.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null && pwd)
results=${OUT:-$root/out}
[[ -x $root/.venv/bin/python ]] && PYTHON=${PYTHON:-$root/.venv/bin/python}  # that of make
PYTHON=${PYTHON:-python}
start=("$PYTHON")
[[ ${NPROC:-1} == 1 ]] || start+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
flags=("$@")
failed="" lost="" table_flags=${table_flags-}

# Whether a result is there, and all that was asked for is in it.
finished() {
    [[ -e $1 ]] && ! grep -q '"complete": false' "$1"
}

# Whether there is a result of a model, or of any.
results_of() {
    compgen -G "$results/$table/$1/*.json" > /dev/null
}

cell() {
    [[ " $lost " != *" $model "* ]] || return 0
    local name=$1 json=$results/$table/${model##*/}/$1.json
    shift
    if finished "$json"; then
        echo "== $model $name: done before"
        return
    fi
    echo "== $model $name"
    local status=0
    "${start[@]}" "$root/$script" "$MODEL_PREFIX$model" --calib_data c4 --nsamples 128 --seqlen 2048 --seed 0 $always \
        "$@" ${flags[@]+"${flags[@]}"} --output_path "$json" || status=$?
    [[ ${#start[@]} == 1 || $status != 1 ]] || status=2  # torchrun ends with 1, whatever a process ended with
    if [[ $status == 2 ]] && ! results_of "${model##*/}"; then
        echo "$table.sh: $model cannot be had as asked" >&2
        results_of '*' || exit 2
        lost+=" $model" failed+=" $model"
        return
    fi
    finished "$json" || failed+=" $model/$name"
}

finish() {
    "$PYTHON" "$root/scripts/table.py" $table_flags "$results/$table" || failed+=" the table"
    if [[ -n $failed ]]; then
        echo "$table.sh: failed:$failed" >&2
        exit 1
    fi
}
