#!/usr/bin/env bash
# Figure 5: confusion matrices of ERM, Mixup and CP-Mix on CIFAR100-LT at each imbalance factor; CP-Mix finetuned, as in the paper.
# Usage: bash recipes/figures/figure5.sh OUT EPOCHS DATA_ROOT      for example: bash recipes/figures/figure5.sh figure5 20 /data/cifar100
# Interrupted, the same line goes on.
set -euo pipefail
bash "$(dirname "$0")/matrices.sh" 5 cifar100 "100 50 10" "$1" "$2" "$3"
