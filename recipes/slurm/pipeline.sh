#!/usr/bin/env bash
# The phases of one run as jobs of their own, each after the one before. A preempted one is queued again under its own number, so
# those that wait for it go on waiting; if one fails, those after it are taken out of the queue. The same line again goes on.
#
#   bash recipes/slurm/pipeline.sh DATA RUN [flags of train-stage1]
#   TRAIN=recipes/slurm/one-node.sbatch bash recipes/slurm/pipeline.sh data/places-lt ckpt/places --recipe places-lt/cpmix
#
# A recipe that has not all phases: PHASES=finetune, PHASES=train-stage2 or PHASES= before the line.
set -euo pipefail
data=$1 run=$2
shift 2
train=${TRAIN:-recipes/slurm/one-gpu.sbatch}
alone=${ALONE:-recipes/slurm/one-gpu.sbatch} # what is one GPU's work

after=()
submit() { # SCRIPT COMMAND FLAGS...
    local job
    job=$(sbatch --parsable --job-name="cpmix-$2" "${after[@]}" "$@")
    job=${job%%;*} # number;cluster
    after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
    echo "$job $2"
}

submit "$train" train-stage1 --data "$data" --out "$run" "$@"
for phase in ${PHASES-train-stage2 finetune}; do
    submit "$train" "$phase" --from "$run"
done
submit "$alone" evaluate --from "$run"
submit "$alone" confusion-report --from "$run"
