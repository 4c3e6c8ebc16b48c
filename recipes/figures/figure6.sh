#!/usr/bin/env bash
# Figure 6: confusion matrices of ERM, Mixup and CP-Mix on CIFAR10-LT at each imbalance factor; CP-Mix finetuned, as in the paper.
# Usage: bash recipes/figures/figure6.sh OUT EPOCHS DATA_ROOT      for example: bash recipes/figures/figure6.sh figure6 20 /data/cifar10
# Interrupted, the same line goes on.
set -euo pipefail
out=$1 epochs=$2 root=$3

shown=()
for rho in 200 100 50 10; do
    data=$out/data-rho$rho
    cpmix build-lt cifar10 --rho "$rho" --data-root "$root" --out "$data"
    for method in cross-entropy mixup; do
        run=$out/$method-rho$rho
        cpmix train-stage1 --data "$data" --recipe "cifar10-lt/$method" --epochs "$epochs" --out "$run"
        cpmix evaluate --from "$run" --phase stage1
        shown+=("$run/stage1")
    done
    run=$out/cpmix-rho$rho
    cpmix train-stage1 --data "$data" --recipe cifar10-lt/cpmix --epochs "$epochs" --out "$run"
    cpmix train-stage2 --from "$run"
    cpmix finetune --from "$run"
    cpmix evaluate --from "$run"
    shown+=("$run/finetune")
done
cpmix figure 6 "${shown[@]}" --out "$out/figure6.pdf"
