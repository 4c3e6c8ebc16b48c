#!/usr/bin/env bash
# Figure 3: grouped confusion matrices of ERM and Mixup on CIFAR100-LT-200; confusion values of ERM there and on balanced CIFAR100.
# Usage: bash recipes/figures/figure3.sh OUT EPOCHS DATA_ROOT [BALANCED_EPOCHS]
# For example: bash recipes/figures/figure3.sh figures 20 /data/cifar100 8 (balanced CIFAR100 has five times the images)
# Interrupted, the same line goes on; figure 4 takes its runs of ERM and Mixup from here if OUT is the same.
set -euo pipefail
out=$1 epochs=$2 root=$3 balanced_epochs=${4:-$2}

cpmix build-lt cifar100 --rho 200 --data-root "$root" --out "$out/data-rho200"
for method in cross-entropy mixup; do
    cpmix train-stage1 --data "$out/data-rho200" --recipe "cifar100-lt/$method" --epochs "$epochs" --out "$out/$method"
    cpmix evaluate --from "$out/$method" --phase stage1
done
cpmix build-lt cifar100 --rho 1 --data-root "$root" --out "$out/data-rho1"
cpmix train-stage1 --data "$out/data-rho1" --recipe cifar100-lt/cross-entropy --epochs "$balanced_epochs" --out "$out/balanced"
cpmix evaluate --from "$out/balanced" --phase stage1
cpmix figure 3 "$out"/{cross-entropy,mixup,balanced}/stage1 --out "$out/figure3.pdf"
