# Sourced by the scripts that fill the paper's tables.  They say which `script` and `table` it is, and what `always` goes to it; then
#   cell NAME FLAGS...    one run for $model: out/TABLE/MODEL/NAME.json.  A finished cell is skipped; a failed one stops no other.
#   finish                names the failed cells, exit status 1 if there are any
# Variables: OUT, MODEL_PREFIX, PYTHON.  `flags`: what the user adds to every run.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null && pwd)
results=${OUT:-$root/out}
[[ -x $root/.venv/bin/python ]] && PYTHON=${PYTHON:-$root/.venv/bin/python}  # that of make
PYTHON=${PYTHON:-python}
flags=("$@")
failed=""

cell() {
    local name=$1 json=$results/$table/${model##*/}/$1.json
    shift
    if [[ -e $json ]]; then
        echo "== $model $name: done before"
        return
    fi
    echo "== $model $name"
    "$PYTHON" "$root/$script" "$MODEL_PREFIX$model" --calib_data c4 --nsamples 128 --seqlen 2048 --seed 0 $always \
        "$@" ${flags[@]+"${flags[@]}"} --output_path "$json" && [[ -e $json ]] || failed+=" $model/$name"
}

finish() {
    if [[ -n $failed ]]; then
        echo "$table.sh: failed:$failed" >&2
        exit 1
    fi
}
