#!/usr/bin/env bash
# Every single-model method on one CIFAR-100-LT, at one budget and one seed, each measured before and after the same finetune.
# Two-stage methods share CP-Mix's stage 1; the others train with their own published schedule, rescaled to EPOCHS.
# Usage: bash recipes/methods.sh DATA OUT SEED EPOCHS      for example: bash recipes/methods.sh data/cifar100-lt-rho200 methods 0 20
# Interrupted, the same line goes on; cpmix status OUT/* says where it stands. OTmix needs: pip install 'cpmix[transport]'
set -euo pipefail
data=$1 out=$2 seed=$3 epochs=$4
finetune=$(((epochs + 5) / 10)) # CP-Mix's 30 of 300, for all alike
finetune=$((finetune > 0 ? finetune : 1))

measured() { # evaluate, finetune, evaluate
    cpmix evaluate --from "$1" --phase "$2"
    cpmix finetune --from "$1" "${@:3}"
    cpmix evaluate --from "$1"
}

cpmix train-stage1 --data "$data" --recipe cifar100-lt/cpmix --epochs "$epochs" --seed "$seed" --out "$out/cpmix"
cpmix train-stage2 --from "$out/cpmix"
measured "$out/cpmix" stage2
for method in balanced-softmax cpmix-class-uniform cpmix-random ablation-3 ablation-4 ablation-5 ablation-6 ablation-7; do
    # Rows 1, 2, 8 and 9 are cross-entropy, balanced-softmax, and cpmix before and after its finetune.
    cpmix train-stage2 --from "$out/cpmix" --recipe "cifar100-lt/$method" --epochs "$epochs" --seed "$seed" --out "$out/$method"
    measured "$out/$method" stage2
done

for method in cross-entropy ldam-drw lade mixup remix cmo unimix otmix; do
    cpmix train-stage1 --data "$data" --recipe "cifar100-lt/$method" --epochs "$epochs" --seed "$seed" --out "$out/$method"
    measured "$out/$method" stage1 --set "finetune.epochs=$finetune"
done
# MiSLAS has a finetune of its own; the others' goes beside it.
cpmix train-stage1 --data "$data" --recipe cifar100-lt/mislas --epochs "$epochs" --seed "$seed" --out "$out/mislas"
measured "$out/mislas" stage1 --set "finetune.epochs=$finetune"
cpmix finetune --from "$out/mislas" --out "$out/mislas-same-finetune" --set "finetune.epochs=$finetune" \
    --set finetune.lr=0.5 --set finetune.weight_decay=0.0 --set finetune.head=keep --set finetune.batchnorm=frozen \
    --set 'finetune.groups=[]' --set finetune.terms.erm.loss=cross-entropy
cpmix evaluate --from "$out/mislas-same-finetune"
