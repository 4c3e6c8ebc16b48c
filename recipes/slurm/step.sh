# What the job scripts beside this file share; they source it. Edit those, not this.
#
# A job that cpmix leaves with 75 is queued again under its own number, and goes on where it stopped; a hundred times at most
# (REQUEUES). Every other exit code ends it.
#
# How the warning gets there: `#SBATCH --signal=B:USR1@120` sends USR1 to this shell alone, 120 seconds before the time limit (or up to
# a minute earlier), and before a preemption where the cluster has preempt_send_user_signal. bash runs a trap only when the command
# in the foreground has ended, so the step runs behind, and srun passes the USR1 that it gets on to all tasks. TERM is not handed on:
# srun would answer by SIGKILL to its tasks, and Slurm sends TERM to them itself. At this shell it means that the job is over
# (scancel, or the time limit): what is saved stays, and submitting it again goes on.

warned='' # USR1 came
ended=''  # TERM came
rang=''   # one of the two came while this shell waited
child=''  # srun, once it has been started and until it has been told
trap 'warned=1 rang=1; hand_on' USR1
trap 'ended=1 rang=1' TERM

# srun does not take --cpus-per-task over from the job any more (since Slurm 22.05).
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

hand_on() { # once: at a second signal cpmix leaves without saving
    if [ -n "$child" ]; then
        kill -USR1 "$child" 2>/dev/null || true
        child=''
    fi
}

interrupted() { # EXIT-CODE: is there something to go on with? Over 128: the warning came before Python could listen.
    [ "$1" -eq 75 ] || { [ -n "$warned" ] && [ "$1" -gt 128 ]; }
}

step() { # srun's arguments: one step of the job; comes back if it succeeded
    if [ -n "$warned$ended" ]; then
        queue_again # no time to begin another one
    fi
    # All tasks end by themselves, with the same code: killing the slower ones would make it another.
    srun --kill-on-bad-exit=0 "$@" &
    local pid=$! code
    child=$pid
    if [ -n "$warned" ]; then
        hand_on
    fi
    while true; do
        rang='' code=0
        wait "$pid" || code=$?
        if [ -z "$rang" ]; then # else it was the signal that ended the wait
            break
        fi
    done
    child=''
    if [ "$code" -eq 0 ]; then
        return
    fi
    if interrupted "$code"; then
        queue_again
    fi
    exit "$code"
}

queue_again() {
    # An array's first number means all of its tasks.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    if [ -n "$ended" ]; then
        echo "job $job was ended; submit it again to go on" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${REQUEUES:-100}" ]; then
        echo "job $job was queued again ${SLURM_RESTART_COUNT:-0} times, which is enough; submit it again to go on" >&2
    elif scontrol requeue "$job"; then
        exit 0 # Slurm takes no notice: the job waits again, and so do the jobs that wait for it
    else
        echo "job $job cannot be queued again (scontrol, see above); submit it again to go on" >&2
    fi
    exit 75
}

copy_to_nodes() { # the folder COPY, if it is set, onto each node's own disk; sets data=(--data FOLDER)
    data=()
    if [ -n "${COPY:-}" ]; then
        local folder=${TMPDIR:-/tmp}/cpmix-$SLURM_JOB_ID each_node=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
        # shellcheck disable=SC2064 # now, not then
        trap "srun ${each_node[*]} rm -rf '$folder' || true" EXIT
        data=(--data "$folder/$(basename "$COPY")")
        # shellcheck disable=SC2016 # for the shell on the node
        step "${each_node[@]}" sh -c 'mkdir -p "$2" && cp -R "$1/." "$2"' sh "$COPY" "${data[1]}"
    fi
}
