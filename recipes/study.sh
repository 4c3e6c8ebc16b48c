#!/usr/bin/env bash
# Four methods on one data set, each measured before and after the same finetune; the last three share stage 1's epochs.
# Usage: bash recipes/study.sh DATA OUT SEED EPOCHS      for example: bash recipes/study.sh data/cifar100-lt-rho200 study 0 40
# Interrupted, the same line goes on; cpmix status OUT/* says where it stands.
set -euo pipefail
data=$1 out=$2 seed=$3 epochs=$4

measured() { # evaluate, finetune, evaluate
    cpmix evaluate --from "$1" --phase "$2"
    cpmix finetune --from "$1"
    cpmix evaluate --from "$1"
}

cpmix train-stage1 --data "$data" --recipe cifar100-lt/cpmix --epochs "$epochs" --seed "$seed" --out "$out/cpmix-$seed"
cpmix train-stage2 --from "$out/cpmix-$seed"
measured "$out/cpmix-$seed" stage2

cpmix train-stage2 --from "$out/cpmix-$seed" --recipe cifar100-lt/balanced-softmax --epochs "$epochs" --seed "$seed" \
    --out "$out/balanced-softmax-$seed"
measured "$out/balanced-softmax-$seed" stage2

cpmix train-stage2 --from "$out/cpmix-$seed" --set stage2.terms.cp.partner=random --out "$out/random-partner-$seed"
measured "$out/random-partner-$seed" stage2

cpmix train-stage1 --data "$data" --recipe cifar100-lt/cross-entropy --epochs "$epochs" --seed "$seed" \
    --out "$out/cross-entropy-$seed"
measured "$out/cross-entropy-$seed" stage1
