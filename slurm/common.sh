# Shared by the job scripts of this folder. Submit them from the root of the repository; what follows the script's
# name on the command line goes to the recipe.
#
# The cluster's particulars come from sbatch's flags (--partition --account --nodes --gpus-per-node --time ...; for the
# first two also from SBATCH_PARTITION and SBATCH_ACCOUNT) and from the environment:
#
#   DATA       the recipe's data.path
#   RUNS       folder of the run folders; runs if not set
#   PYTHON     interpreter; .venv/bin/python if not set
#   CONTAINER  image.sif (Apptainer) or an image of enroot (pyxis) in which PYTHON is
#   MOUNTS     what the container sees besides this folder: /data:/data,...
#   PAUSE      seconds before the next start after one that left no new checkpoint, for a file server to come back; 300

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
FRUITLESS=3 # starts in a row without a new checkpoint, after which a job that fails is not started again

# A build that was killed leaves a lock on which later ones would wait: each start gets a cache of its own.
export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/extensions-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the loader's workers are processes

# Wait for srun, process $1, and return its status. When Slurm begins to end the job, all get TERM, and after KillWait
# seconds KILL, this shell too: it has to start the job again before that, even if a rank does not end.
await() {
  local status patience left
  wait "$1"
  status=$?
  [[ ${ending:-} ]] || return $status
  patience=$(scontrol show config | grep -oP '^KillWait\s*=\s*\K\d+')
  for ((left = ${patience:-30} - 10; left > 0; left--)); do
    kill -0 "$1" 2> /dev/null || break
    sleep 1
  done
  if kill -0 "$1" 2> /dev/null; then
    echo "a rank does not end" >&2
    return 75
  fi
  wait "$1"
}

# Python with the arguments given, one task of Slurm for each rank. When one ends the others get half a minute: they may
# be about to report the same, or wait for it for ever.
on_all_ranks() {
  # A container has no scontrol to ask for the first node.
  export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  local launch=(srun --kill-on-bad-exit=0 --wait=30)
  launch+=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}") # else one: srun doesn't inherit sbatch's since Slurm 22.05
  case ${CONTAINER:-} in
    "") ;;
    *.sif) launch+=(apptainer exec --nv --bind "$PWD${MOUNTS:+,$MOUNTS}" "$CONTAINER") ;;
    *)
      launch+=(--container-image="$CONTAINER" --container-workdir="$PWD")
      launch+=(--container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}")
      ;;
  esac
  "${launch[@]}" "$PYTHON" "$@" &
  await $!
}

# A command of Slurm, again and again while the controller is away: ten minutes.
patiently() {
  local _
  for _ in {1..20}; do
    "$@" && return
    sleep 30
  done
  return 1
}

# The newest file of path $2 below folder $1, with its time.
newest() {
  find -L "$1" -path "$2" -printf '%T@ %p\n' 2> /dev/null | sort -n | tail -n 1
}

# Whether it is for this script to start the job again; sets $state. Slurm itself starts a job again that it preempts
# by PreemptMode=REQUEUE, and counts that at once; a node that was lost and lives on may run an earlier start, too. A
# canceled job is not to be started. It is COMPLETING by now, as is one that is out of time, and one that was canceled
# by PreemptMode=CANCEL, which ends when it is preempted.
ours() {
  state=$(patiently scontrol show job --oneliner "$SLURM_JOB_ID" |
    grep -oE '\b(JobState|Reason|Restarts|EndTime|PreemptTime)=[^ ]*' | xargs)
  [[ $state == *"Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || return
  [[ $state == @(JobState=RUNNING*|*Reason=TimeLimit*) ]] && return
  local end=${state##*EndTime=} preempted=${state##*PreemptTime=}
  [[ $state == *PreemptTime=2* ]] && (($(date -d "${end%% *}" +%s) - $(date -d "${preempted%% *}" +%s) < 5))
}

# Python with the arguments from the third on, on all ranks; start the job again unless it is done (exit status 0) or
# somebody must mend something (64). Its progress shows in files of path $2 below folder $1.
until_done() {
  local folder=$1 progress=$2 before now status count=0 last="" state ending=
  shift 2
  [[ ${SLURM_RESTART_COUNT:-0} == 0 ]] && rm -f "$folder/fruitless-starts"
  trap 'ending=yes' TERM
  before=$(newest "$folder" "$progress")
  on_all_ranks "$@"
  status=$?
  ours
  local decide=$?
  echo "$(date '+%F %T') start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID ended with status $status, $state"
  ((status == 0 || status == 64 || decide)) && exit "$status"
  now=$(newest "$folder" "$progress")
  if [[ $now == "$before" ]]; then
    # Starts that Slurm itself made again since did not write here: what they left shows in the progress.
    { read -r count && read -r last; } 2> /dev/null < "$folder/fruitless-starts"
    [[ $now == "$last" ]] && ((++count)) || count=1
  fi
  mkdir -p "$folder"
  printf '%s\n' "$count" "$now" > "$folder/fruitless-starts"
  if ((count >= FRUITLESS)); then
    echo "$FRUITLESS starts in a row left no new checkpoint: not started again" >&2
    exit "$status"
  fi
  if ((count)) && [[ ! $ending ]]; then
    echo "no new checkpoint: the next start is in ${PAUSE:-300} seconds"
    sleep "${PAUSE:-300}" &
    wait $! # which the time limit's TERM ends, unlike a sleep
    ours || exit "$status"
  fi
  patiently scontrol requeue "$SLURM_JOB_ID"
}
