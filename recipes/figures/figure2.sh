#!/usr/bin/env bash
# Figure 2: the toy example. ERM, Mixup, mixup between the similar pairs, and CP-Mix at seven imbalance factors, three seeds each.
# Usage: bash recipes/figures/figure2.sh [OUT]      (default: figure2; about a second a phase, and what Python takes to start)
# Interrupted, the same line goes on.
set -euo pipefail
out=${1:-figure2}

for seed in 0 1 2; do
    for rho in 20 1 2 5 10 50 100; do # the paper's own first
        data=$out/data-rho$rho
        cpmix build-lt toy --rho "$rho" --out "$data"
        for method in cross-entropy mixup fixed-pairs cpmix; do
            run=$out/$method-rho$rho-seed$seed
            cpmix train-stage1 --data "$data" --recipe "toy/$method" --seed "$seed" --out "$run"
            if [ "$method" = cpmix ]; then
                cpmix train-stage2 --from "$run"
            fi
            cpmix evaluate --from "$run"
        done
    done
done
cpmix figure 2 "$out"/*-seed? --out "$out/figure2.pdf"
