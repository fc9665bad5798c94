# Sourced by the scripts that fill the paper's tables.  They say which `script` and `table` it is, and what `always` goes to it; then
#   cell NAME FLAGS...    one run for $model: out/TABLE/MODEL/NAME.json.  A finished cell is skipped; a failed one stops no other, but if
#                         the first of a model ends with status 2, model, text or a flag cannot be had as asked, and the script stops.
#   finish                prints the table; names the failed cells, exit status 1 if there are any
# Variables: OUT, MODEL_PREFIX, PYTHON.  `flags`: what the user adds to every run.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null && pwd)
results=${OUT:-$root/out}
[[ -x $root/.venv/bin/python ]] && PYTHON=${PYTHON:-$root/.venv/bin/python}  # that of make
PYTHON=${PYTHON:-python}
flags=("$@")
failed="" started="" table_flags=${table_flags-}

# Whether a result is there, and all that was asked for is in it.
finished() {
    [[ -e $1 ]] && ! grep -q '"complete": false' "$1"
}

cell() {
    local name=$1 json=$results/$table/${model##*/}/$1.json
    shift
    if finished "$json"; then
        echo "== $model $name: done before"
        return
    fi
    echo "== $model $name"
    local status=0
    "$PYTHON" "$root/$script" "$MODEL_PREFIX$model" --calib_data c4 --nsamples 128 --seqlen 2048 --seed 0 $always \
        "$@" ${flags[@]+"${flags[@]}"} --output_path "$json" || status=$?
    if [[ $status == 2 && $started != "$model" ]]; then
        echo "$table.sh: stopped: the first run of $model cannot be had as asked" >&2
        exit 2
    fi
    started=$model
    finished "$json" || failed+=" $model/$name"
}

finish() {
    "$PYTHON" "$root/scripts/table.py" $table_flags "$results/$table" || failed+=" the table"
    if [[ -n $failed ]]; then
        echo "$table.sh: failed:$failed" >&2
        exit 1
    fi
}
