#!/usr/bin/env bash
# The whole check of the CUDA kernels on a machine with an NVIDIA GPU (compute capability 8.0 or newer).  Needs only torch, numpy and nvcc.
#   bash scripts/gpu_check.sh            build, check bit for bit, compute-sanitizer where it works, a packed checkpoint and the solver where
#                                        pytest and transformers are installed, times of LLaMA-13B's layers
#   bash scripts/gpu_check.sh --quick    the same in at most 8 minutes: times, at five numbers of tokens, and those of every kernel, before the
#                                        sanitizer; no step for longer than its limit
#   bash scripts/gpu_check.sh --tune     first measure which kernel is fastest where: kernels/tuning.json (an hour or two)
# Variables: PYTHON, OUT (a folder, by default results/gpu_check: NAME_OF_THE_GPU.json, what was compared; _wgmma.json, the same of the kernel
# that only compute capability 9.0 has; _steps.json, how each step went, written after every step; _bench.json, the times; _kernels.json, those of
# every kernel).  Goes on after a step that fails; exit status 1 if one did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} mode=${1-}
case "$mode" in
  "" | --quick | --tune) ;;
  *) echo "gpu_check.sh: $1: the only options are --quick and --tune" >&2; exit 2 ;;
esac

gpu=$("$PYTHON" - <<'CODE'
import torch

if torch.cuda.is_available():
    print("{}{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name())
CODE
) || { echo "gpu_check.sh: $PYTHON has no PyTorch; set PYTHON" >&2; exit 2; }
[ -n "$gpu" ] || { echo "gpu_check.sh: PyTorch finds no GPU here" >&2; exit 2; }
arch=${gpu%% *} gpu=${gpu#* }
folder=${OUT:-results/gpu_check}
files=$folder/${gpu// /_}
SECONDS=0
STEPS=${files}_steps.json
mkdir -p "$folder" && true > "$STEPS" || { echo "gpu_check.sh: $STEPS cannot be written; set OUT" >&2; exit 2; }

table="" steps="" failed=0 ALL=${ALL:-480}  # seconds of --quick
note() {  # note STEP SECONDS RESULT: for the table, and into the JSON
  table+=$(printf '%-10s %6s s  %s' "$@")$'\n'
  steps+=${steps:+,}$(printf '\n {"step": "%s", "seconds": %s, "result": "%s"}' "$@")
  printf '{"gpu": "%s", "arch": "%s", "steps": [%s\n]}\n' "$gpu" "$arch" "$steps" > "$STEPS"
}
step() {  # step NAME LIMIT COMMAND...: runs it, with --quick for no more seconds than its limit and ALL leave, and notes how it went
  local name=$1 limit=$2 result=ok start=$SECONDS
  shift 2
  echo "== $name: $*"
  if [ "$mode" = --quick ]; then
    ((SECONDS < ALL)) || { skip "$name" "$ALL s are over"; return 1; }
    limit=$((limit < ALL - SECONDS ? limit : ALL - SECONDS))
    set -- timeout "$limit" "$@"
  fi
  "$@" || { result="FAILED ($?)"; failed=1; }
  [ "$result" = "FAILED (124)" ] && result="FAILED (not done in $limit s)"
  note "$name" $((SECONDS - start)) "$result"
  [ "$result" = ok ]
}
skip() { note "$1" 0 "skipped: $2"; }

command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm,clocks.mem --format=csv
bench() { step bench 75 "$PYTHON" -m bench.linears --models llama-13b --tokens "$1" --output_path "${files}_bench.json"; }

step build 60 "$PYTHON" -m kernels.build --arch "$arch"
left_out=()
if [ "$arch" = 90 ]; then
  step wgmma 30 timeout 120 "$PYTHON" -m bench.check --wgmma --output_path "${files}_wgmma.json" || left_out=(--leave_out wgmma256x128)
fi
[ "$mode" = --tune ] && step tune - "$PYTHON" -m bench.tune "${left_out[@]}"
step check 60 "$PYTHON" -m bench.check --output_path "$files.json"
if [ "$mode" = --quick ]; then  # most wanted first: 65 s may not be enough for all
  bench 1,16,64,512,2048
  step kernels 75 "$PYTHON" -m bench.sweep --models llama-13b --tokens 512,2048,64,16,1,256,128,1024,4096,32 --seconds 65 "${left_out[@]}" \
    --output_path "${files}_kernels.json"
fi

sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer)
watch=(--report-api-errors no --error-exitcode 9)  # libraries ask the driver for what it may not have: no error of a kernel
for tool in memcheck:30 racecheck:50; do
  limit=${tool#*:} tool=${tool%:*}
  if [ -z "$sanitizer" ]; then
    skip $tool "no compute-sanitizer"
  elif ! probe=$(timeout 20 "$sanitizer" "${watch[@]}" --tool $tool "$PYTHON" -c "import torch; torch.ones(1).cuda()" 2>&1); then
    echo "$probe"
    skip $tool "compute-sanitizer does not work here"
  else  # without PyTorch's cache every tensor has its own bounds
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    [ "$tool:$arch" = memcheck:90 ] && step memcheck_wgmma 20 "$sanitizer" "${watch[@]}" --tool $tool "$PYTHON" -m bench.check --small --wgmma
    step $tool "$limit" "$sanitizer" "${watch[@]}" --tool $tool "$PYTHON" -m bench.check --small
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  fi
done

for name in checkpoint:cuda solver:span; do
  file=tests/test_${name#*:}.py
  if found=$(timeout 20 "$PYTHON" -m pytest --collect-only -q "$file" 2>&1); then
    step "${name%:*}" 50 "$PYTHON" -m pytest -q "$file" -k on_a_gpu
  else
    echo "$found"
    [[ $found =~ No\ module\ named\ \'?([A-Za-z0-9_.]+) ]] && missing=": ${BASH_REMATCH[1]}" || missing=""
    skip "${name%:*}" "needs what requirements.txt lists$missing"
  fi
done
[ "$mode" = --quick ] || bench 1,16,17,64,256,1024

printf '\n%s (sm_%s), %s\n%s' "$gpu" "$arch" "$STEPS" "$table"
exit $failed
