#!/usr/bin/env bash
# What a GPU should measure first, in order of worth, within a time limit: the paper's main table at rho 200 and 100 with three
# seeds, then the ablation, the ensembles and the recipes beyond the paper. Rows are appended to a results file as they are measured.
# Usage: bash recipes/paper.sh MINUTES OUT FOLDER      FOLDER holds CIFAR-100; "digits" for a dry run on scikit-learn's digits
# For example: bash recipes/paper.sh 15 paper data/download. The same line goes on where it stopped. Exit code 0: all is measured,
# 75: the time is over, 1: a run failed (OUT/log says why) or the check of the machine did.
# Environment: JOBS runs at a time (3 on a GPU, else 1), RESULTS the results file (OUT/results.csv), EPOCHS shorter runs than the paper's.
set -euo pipefail
[ $# = 3 ] || { sed -n 's/^# Usage: /usage: /p' "$0" >&2; exit 2; }
command -v cpmix > /dev/null || { echo 'cpmix is not on the PATH: activate its virtual environment' >&2; exit 4; }
minutes=$1 out=$2 folder=$3
deadline=$(awk "BEGIN { print int(60 * $minutes) - 10 }") # of SECONDS, which bash counts from the start; ten of them to save states
recipes=$(cd "$(dirname "$0")" && pwd)
results=${RESULTS:-$out/results.csv}
length=(${EPOCHS:+--epochs "$EPOCHS"})
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then device=cuda; else device=cpu; fi
if [ "$folder" = digits ]; then
    set=digits rhos=(20 10) build=(digits)
else
    set=cifar100-lt rhos=(200 100) build=(cifar100 --data-root "$folder")
fi
mkdir -p "$out/log"

say() { printf '%3d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

within() { # run a command until the time is over; it then saves its state and ends, and so does the job
    local left=$((deadline - SECONDS)) code=0
    [ "$left" -gt 0 ] || exit 75
    timeout --signal=TERM "$left" "$@" &
    running=$!
    wait "$running" || code=$?
    [ "$code" != 124 ] || code=75
    return "$code"
}

measured() { # RUN PHASE: evaluate it, and after its finetune if it has one
    within cpmix evaluate --from "$1" --phase "$2"
    within cpmix finetune --from "$1"
    if [ -d "$1/finetune" ]; then
        within cpmix evaluate --from "$1"
    fi
}

is_there() { [ -f "$recipes/$set/$1.toml" ]; }

second_stage() { # RUN NAME FLAGS: another stage 2 from the stage 1 of a run
    within cpmix train-stage2 --from "$1" --out "$2" "${@:3}"
    measured "$2" stage2
}

whole() { # DATA SEED NAME RUN FLAGS: a recipe from its first epoch on
    local last=stage1
    within cpmix train-stage1 --data "$1" --recipe "$set/$3" --seed "$2" --out "$4" "${@:5}"
    within cpmix train-stage2 --from "$4"
    if [ -d "$4/stage2" ]; then last=stage2; fi
    measured "$4" "$last"
}

main_table() { # RHO SEED: CP-Mix, Balanced Softmax, random partners, which share stage 1; cross entropy; CP-Mix, tuned
    local data=$out/data-$1 run=$out/rho$1-seed$2
    within cpmix build-lt "${build[@]}" --rho "$1" --out "$data"
    whole "$data" "$2" cpmix "$run-cpmix" "${length[@]}"
    second_stage "$run-cpmix" "$run-balanced-softmax" --recipe "$set/balanced-softmax" --seed "$2" "${length[@]}"
    second_stage "$run-cpmix" "$run-random" --set stage2.terms.cp.partner=random
    whole "$data" "$2" cross-entropy "$run-cross-entropy" "${length[@]}"
    if is_there cpmix-mixed-finetune; then
        within cpmix finetune --from "$run-cpmix" --recipe "$set/cpmix-mixed-finetune" --seed "$2" "${length[@]}" \
            --out "$run-mixed-finetune"
        within cpmix evaluate --from "$run-mixed-finetune"
    fi
    if is_there cpmix-tuned; then
        whole "$data" "$2" cpmix-tuned "$run-cpmix-tuned" "${length[@]}"
    fi
}

ablation() { # RHO SEED: rows 3 to 7 of Table 3; rows 1, 2, 8 and 9 are in the main table
    local run=$out/rho$1-seed$2 row
    for row in 3 4 5 6 7; do
        second_stage "$run-cpmix" "$run-ablation-$row" --recipe "$set/ablation-$row" --seed "$2" "${length[@]}"
    done
}

recipe() { # RHO SEED NAME: any other recipe
    whole "$out/data-$1" "$2" "$3" "$out/rho$1-seed$2-$3" "${length[@]}"
}

declare -A names=() # jobs that run: process -> name
worst=0
stop() { # end all jobs: they save their states
    for process in "${!names[@]}"; do kill -TERM "$process" 2> /dev/null || true; done
}
trap 'deadline=0; stop' TERM INT

job() { # NAME WORDS: run a job in the background as soon as there is room for it
    while [ "${#names[@]}" -ge "$jobs" ]; do collect; done
    if [ "$SECONDS" -ge "$deadline" ]; then
        worst=75
        return
    fi
    say "$1"
    (
        trap 'kill -TERM "$running" 2> /dev/null; wait "$running"; exit 75' TERM
        "${@:2}"
    ) > "$out/log/$1.txt" 2>&1 &
    names[$!]=$1
}

collect() { # wait until a job ends; what it has measured is appended to the results file
    local process code
    wait -n || true
    for process in "${!names[@]}"; do
        if ! kill -0 "$process" 2> /dev/null; then
            code=0
            wait "$process" || code=$?
            case $code in
                0) say "${names[$process]}: measured" ;;
                75) say "${names[$process]}: goes on next time" ;;
                *) say "${names[$process]}: failed, see $out/log/${names[$process]}.txt" ;;
            esac
            if [ "$code" != 0 ] && [ "$worst" != 1 ]; then
                worst=$([ "$code" = 75 ] && echo 75 || echo 1)
            fi
            unset "names[$process]"
        fi
    done
    append
}

append() {
    local runs=("$out"/*/evaluation)
    if [ -d "${runs[0]}" ]; then
        cpmix compare "${runs[@]%/evaluation}" --append "$results" --study "paper-$set" > /dev/null 2> "$out/log/append.txt" ||
            say "not appended, see $out/log/append.txt"
    fi
}

jobs=${JOBS:-$([ "$device" = cuda ] && echo 3 || echo 1)}
tests=$recipes/../tests
if [ -d "$tests" ] && [ ! -f "$out/log/check-passed" ]; then
    say "check of the $device path, two minutes: graphs against eager steps, speed, resume"
    code=0
    within python "$tests/first_minutes_on_a_gpu.py" machine graphs speed signal --device "$device" > "$out/log/check.txt" 2>&1 || code=$?
    if [ "$code" != 0 ]; then
        say "the check did not pass, see $out/log/check.txt"
        exit $((code == 75 ? 75 : 1))
    fi
    mv "$out/log/check.txt" "$out/log/check-passed"
fi

for seed in 0 1 2; do
    for rho in "${rhos[@]}"; do
        job "rho$rho-seed$seed" main_table "$rho" "$seed"
    done
done
if is_there ablation-3; then
    job "rho${rhos[0]}-ablation" ablation "${rhos[0]}" 0
fi
for rho in "${rhos[@]}"; do
    for name in cpmix-strong cpmix-strong-single cpmix-fast ride cpmix-ride; do
        if is_there "$name"; then
            job "rho$rho-$name" recipe "$rho" 0 "$name"
        fi
    done
done
while [ "${#names[@]}" -gt 0 ]; do collect; done
say "$([ "$worst" = 0 ] && echo "all is measured" || echo "not all is measured: the same line goes on"): $results"
exit "$worst"
