#!/usr/bin/env bash
# What figures 5 and 6 share: runs of ERM, Mixup and CP-Mix at each imbalance factor, CP-Mix finetuned as in the paper, and the figure.
# Usage: bash recipes/figures/matrices.sh NUMBER SOURCE "RHO..." OUT EPOCHS DATA_ROOT      see figure5.sh and figure6.sh
set -euo pipefail
number=$1 source=$2 rhos=$3 out=$4 epochs=$5 root=$6

shown=()
for rho in $rhos; do
    data=$out/data-rho$rho
    cpmix build-lt "$source" --rho "$rho" --data-root "$root" --out "$data"
    for method in cross-entropy mixup; do
        run=$out/$method-rho$rho
        cpmix train-stage1 --data "$data" --recipe "$source-lt/$method" --epochs "$epochs" --out "$run"
        cpmix evaluate --from "$run" --phase stage1
        shown+=("$run/stage1")
    done
    run=$out/cpmix-rho$rho
    cpmix train-stage1 --data "$data" --recipe "$source-lt/cpmix" --epochs "$epochs" --out "$run"
    cpmix train-stage2 --from "$run"
    cpmix finetune --from "$run"
    cpmix evaluate --from "$run"
    shown+=("$run/finetune")
done
cpmix figure "$number" "${shown[@]}" --out "$out/figure$number.pdf"
