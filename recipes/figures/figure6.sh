#!/usr/bin/env bash
# Figure 6: confusion matrices of ERM, Mixup and CP-Mix on CIFAR10-LT at each imbalance factor; CP-Mix finetuned, as in the paper.
# Usage: bash recipes/figures/figure6.sh OUT EPOCHS DATA_ROOT      for example: bash recipes/figures/figure6.sh figure6 20 /data/cifar10
# Interrupted, the same line goes on.
set -euo pipefail
bash "$(dirname "$0")/matrices.sh" 6 cifar10 "200 100 50 10" "$1" "$2" "$3"
