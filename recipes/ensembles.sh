#!/usr/bin/env bash
# The ensembles on one CIFAR-100-LT, at one budget and one seed: RIDE with three and six experts, SADE, ACE, CP-Mix + RIDE.
# None has a finetune. Usage: bash recipes/ensembles.sh DATA OUT SEED EPOCHS
# For example: bash recipes/ensembles.sh data/cifar100-lt-rho200 ensembles 0 20. Interrupted, the same line goes on.
set -euo pipefail
data=$1 out=$2 seed=$3 epochs=$4

for method in ride-3 ride sade ace cpmix-ride; do
    cpmix train-stage1 --data "$data" --recipe "cifar100-lt/$method" --epochs "$epochs" --seed "$seed" --out "$out/$method"
    if [ "$method" = cpmix-ride ]; then
        cpmix train-stage2 --from "$out/$method"
    fi
    cpmix evaluate --from "$out/$method"
done
for distribution in forward backward; do # as if the test set were long-tailed too
    cpmix evaluate --from "$out/ride-3" --test-distribution "$distribution"
    cpmix evaluate --from "$out/sade" --test-distribution "$distribution"
    cpmix evaluate --from "$out/sade" --test-distribution "$distribution" --set evaluation.aggregate=test-time
done
