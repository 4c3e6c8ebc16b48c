#!/usr/bin/env bash
# Figure 4: grouped confusion matrix of CP-Mix on CIFAR100-LT-200, and accuracies of classes of ERM, Mixup, Balanced Softmax, CP-Mix
# there and, where CIFAR10's files are given too, on CIFAR10-LT-200.
# Usage: bash recipes/figures/figure4.sh OUT EPOCHS CIFAR100_ROOT [CIFAR10_ROOT]
# For example: bash recipes/figures/figure4.sh figures 20 /data/cifar100
# Balanced Softmax shares stage 1 with CP-Mix; CP-Mix alone is finetuned, as in the paper. Interrupted, the same line goes on.
set -euo pipefail
out=$1 epochs=$2

runs_on() { # SOURCE ROOT DATA PREFIX
    cpmix build-lt "$1" --rho 200 --data-root "$2" --out "$3"
    for method in cross-entropy mixup; do
        cpmix train-stage1 --data "$3" --recipe "$1-lt/$method" --epochs "$epochs" --out "$4$method"
        cpmix evaluate --from "$4$method" --phase stage1
    done
    cpmix train-stage1 --data "$3" --recipe "$1-lt/cpmix" --epochs "$epochs" --out "${4}cpmix"
    cpmix train-stage2 --from "${4}cpmix"
    cpmix train-stage2 --from "${4}cpmix" --recipe "$1-lt/balanced-softmax" --epochs "$epochs" --out "${4}balanced-softmax"
    cpmix evaluate --from "${4}balanced-softmax" --phase stage2
    cpmix finetune --from "${4}cpmix"
    cpmix evaluate --from "${4}cpmix"
    shown+=("$4"{cross-entropy,mixup}/stage1 "${4}balanced-softmax/stage2" "${4}cpmix/finetune")
}

shown=()
runs_on cifar100 "$3" "$out/data-rho200" "$out/"
if [ $# -gt 3 ]; then
    runs_on cifar10 "$4" "$out/cifar10-rho200" "$out/cifar10-"
fi
cpmix figure 4 "${shown[@]}" --out "$out/figure4.pdf"
