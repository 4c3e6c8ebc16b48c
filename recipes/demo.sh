#!/usr/bin/env bash
# The whole pipeline on scikit-learn's handwritten digits, made long-tailed, first command by command, then all in one.
# Usage: bash recipes/demo.sh [FOLDER]      (cpmix on the PATH; the folder is made, default: demo)
set -euo pipefail
demo=${1:-demo}

run() {
    printf '\n$ cpmix %s\n' "$*"
    cpmix "$@"
}

run build-lt digits --rho 20 --out "$demo/data"
run train-stage1 --data "$demo/data" --out "$demo/run"
run train-stage2 --from "$demo/run"
run finetune --from "$demo/run"
run evaluate --from "$demo/run" --phase stage1
run evaluate --from "$demo/run" --phase stage2
run evaluate --from "$demo/run"
run confusion-report --from "$demo/run"

# The same in one command, and the same bytes; --val-per-class holds out the images that decide which phase to use.
run run digits --rho 20 --data "$demo/data" --out "$demo/run"
