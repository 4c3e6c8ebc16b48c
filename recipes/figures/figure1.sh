#!/usr/bin/env bash
# Figure 1: class distribution and confusion matrix of ERM at imbalance factor 200, ten classes.
# Usage: bash recipes/figures/figure1.sh OUT EPOCHS [SOURCE [DATA_ROOT]]
# For example: bash recipes/figures/figure1.sh figure1 10                                  Fashion-MNIST-LT-200
#              bash recipes/figures/figure1.sh figure1 300 cifar10 FOLDER                  CIFAR10-LT-200, as in the paper
# Interrupted, the same line goes on.
set -euo pipefail
out=$1 epochs=$2 source=${3:-fashion-mnist}

cpmix build-lt "$source" --rho 200 --out "$out/data" ${4:+--data-root "$4"}
cpmix train-stage1 --data "$out/data" --recipe "$source-lt/cross-entropy" --epochs "$epochs" --out "$out/cross-entropy"
cpmix evaluate --from "$out/cross-entropy" --phase stage1
cpmix figure 1 "$out/cross-entropy/stage1" --out "$out/figure1.pdf"
