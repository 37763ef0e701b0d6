# shellcheck shell=bash
# Runs a launcher to its end: signals reach the ranks, waits are bounded, the exit code is that of the rank that failed
# first, and a crash may be tried again. Sourced by preflight.sh.
#
#   FORWARD_SIGNAL   what the ranks get when this script is asked to stop (USR1, TERM, INT); empty: nothing
#                                                   (default: USR1, on which `checkpoint_on_signal` saves and leaves)
#   GRACE_S          seconds that they then have                                                   (default: 200)
#   RETRIES          starts after a crash: not after exit code 2, not without CHECKPOINT_DIR, not twice from the same
#                    checkpoint                                                                     (default: 3)
#   HANG_S           end the job, with the stacks of its ranks on this machine, when nobody has written to LOG_DIR or
#                    CHECKPOINT_DIR for so long                                                     (default: 0, never)
#   DCGM_PAUSE=1     pause dcgm's profiling on the nodes while the job runs (a profiler needs the counters) (default: 0)
#
# A script may define tell_ranks (a signal to all ranks), on_stop (what follows when they have left; its exit code is the
# job's) and on_every_node (runs a command once per node).

: "${GRACE_S:=200}" "${RETRIES:=3}" "${HANG_S:=0}" "${FORWARD_SIGNAL=USR1}"
: "${STOPPING:=}"
STOP_BY=0 LAUNCHER_PID='' FAILED_RANK=''

# Runs the launcher; never returns. Arguments: the launcher line.
run_until_done() {
  local code tries=0 before now
  dcgm --pause
  before=$(newest_or_none)
  while true; do
    code=143
    [[ -z $STOPPING ]] || break # asked before the first start
    code=0
    run_once "$@" || code=$?
    # Ranks that somebody else told to stop, as Slurm does at a preemption: they have saved and left, nobody crashed.
    if [[ -z $STOPPING && ($code == 138 || $code == 143) ]] && declare -F on_stop >/dev/null; then STOPPING=TERM; fi
    [[ -z $STOPPING && $code != 0 && $code != 2 ]] || break
    now=$(newest_or_none)
    if [[ -z ${CHECKPOINT_DIR:-} || $((tries++)) -ge $RETRIES ]]; then break; fi
    if ((tries > 1)) && [[ $now == "$before" ]]; then
      say "it ended with exit code $code again, with no checkpoint since ${before:-the start}: not tried again"
      break
    fi
    before=$now
    say "it ended with exit code $code; start $((tries + 1)) of $((RETRIES + 1)), from ${now:-the beginning}"
    build_command "${SCRIPT_WITH_ARGUMENTS[@]}"
    rebuild_launcher "$@"
    set -- "${LAUNCHER[@]}"
  done
  dcgm --resume
  [[ $code == 0 ]] || show_failed_rank "$code"
  if [[ -n $STOPPING ]] && ! is_done "$code" && declare -F on_stop >/dev/null; then
    if on_stop "$STOPPING"; then code=0; else code=$?; fi
  fi
  exit "$code"
}

# Exit code 0 after a signal: a script may have saved and left in good order. Ours leaves with 128 + signal, so 0 is the end.
is_done() { [[ $1 == 0 ]] && grep -q checkpoint_on_signal "$DS_CONFIG" 2>/dev/null; }

# The launcher line ends in COMMAND; after a crash there is another checkpoint, so another COMMAND.
rebuild_launcher() {
  local length=$(($# - ${#STARTED[@]}))
  LAUNCHER=("${@:1:length}" "${COMMAND[@]:SKIPPED}")
  STARTED=("${COMMAND[@]:SKIPPED}")
}

# How many words of COMMAND the launcher line leaves out, because it brings them itself (`python -u`).
SKIPPED=0

run_once() {
  local code=0 notes
  notes=$(mktemp)
  STARTED=("${COMMAND[@]:SKIPPED}")
  # The launcher's own words on stderr tell which rank failed first, with which code; its exit code may be another's.
  "$@" 2> >(exec tee >(exec grep --line-buffered -aoE "$FAILURES" >"$notes" 2>/dev/null) >&2) &
  LAUNCHER_PID=$!
  WATCHERS=()
  if [[ ${TELL_EXIT:-0} == 1 ]]; then
    end_after_failure "$LAUNCHER_PID" "$notes" >&2 </dev/null &
    WATCHERS+=("$!")
  fi
  if ((HANG_S > 0)); then
    watch_for_hang "$LAUNCHER_PID" >&2 </dev/null &
    WATCHERS+=("$!")
  fi
  while true; do
    code=0
    # bash handles a signal only between commands, and `wait` is one that a signal ends.
    if [[ -n $STOPPING ]]; then
      nap 0.3
      if ! kill -0 "$LAUNCHER_PID" 2>/dev/null; then wait "$LAUNCHER_PID" || code=$?; break; fi
      ((SECONDS < STOP_BY)) || end_launcher
    else
      wait "$LAUNCHER_PID" || code=$?
      # Above 128 either the launcher died of a signal, or a trap interrupted the wait and the launcher still runs.
      if ((code <= 128)) || ! kill -0 "$LAUNCHER_PID" 2>/dev/null; then break; fi
    fi
  done
  ((${#WATCHERS[@]} == 0)) || kill "${WATCHERS[@]}" 2>/dev/null || true
  if ((code != 0)); then
    nap 0.5
    [[ ! -s $notes ]] || read -r code FAILED_RANK < <(first_failure "$notes")
  fi
  rm -f "$notes"
  return "$code"
}

# rank_env.sh, srun and torchrun, each in its words. Slurm's TERM to the others is not what went wrong.
FAILURES='rank_env: rank [0-9]+ ended with exit code [0-9]+|tasks? [0-9][-0-9,]*: Exited with exit code [0-9]+|failed \(exitcode: [0-9]+\) local_rank: [0-9]+'

# Prints the code and, where it is reported, the rank of the first failure in a file of notes.
first_failure() {
  local line
  IFS= read -r line <"$1" || return 0
  if [[ $line =~ rank\ ([0-9]+)\ ended.*code\ ([0-9]+) || $line =~ tasks?\ ([0-9]+).*code\ ([0-9]+) ]]; then
    echo "${BASH_REMATCH[2]} ${BASH_REMATCH[1]}"
  elif [[ $line =~ exitcode:\ ([0-9]+) ]]; then
    echo "${BASH_REMATCH[1]}"
  fi
}

# Called by the traps. The second signal changes nothing: the first one's deadline counts.
stop_asked() {
  [[ -z $STOPPING ]] || return 0
  STOPPING=$1 STOP_BY=$((SECONDS + GRACE_S))
  say "asked to stop ($1)${FORWARD_SIGNAL:+: the ranks get $FORWARD_SIGNAL, and $GRACE_S s}"
  if [[ -z $LAUNCHER_PID ]]; then # still checking: a warning is answered afterwards
    [[ $1 == USR1 ]] || exit 143
    return 0
  fi
  if [[ -z $FORWARD_SIGNAL ]]; then STOP_BY=$SECONDS; else tell_all "$FORWARD_SIGNAL"; fi
}

trap 'stop_asked USR1' USR1
trap 'stop_asked TERM' TERM
trap 'stop_asked INT' INT

tell_all() {
  if declare -F tell_ranks >/dev/null; then tell_ranks "$1"; else signal_local_ranks "$1"; fi || true
}

# The time is over. TERM once, then KILL, to the launcher and all that descends from it.
end_launcher() {
  if [[ -z ${ENDING:-} ]]; then
    ENDING=1 STOP_BY=$((SECONDS + 20))
    say "ending the launcher"
    kill -TERM "$LAUNCHER_PID" 2>/dev/null || true
  else
    descendants "$LAUNCHER_PID" | xargs -r kill -KILL 2>/dev/null || true
    kill -KILL "$LAUNCHER_PID" 2>/dev/null || true
    STOP_BY=$((SECONDS + 20))
  fi
}

# Children, grandchildren ... of a process, one pid a line.
descendants() {
  ps -e -o pid=,ppid= | awk -v top="$1" '
    { parent[$1] = $2 }
    END { for (pid in parent) { p = pid; while (p > 1 && p != top && p in parent) p = parent[p]; if (p == top && pid != top) print pid } }'
}

# A signal to the ranks among them: processes that know their RANK, whose parent does not. A launcher would die of USR1,
# a data loader's worker is not meant.
signal_local_ranks() {
  local pid parent ranks=()
  while read -r pid; do
    has_rank "$pid" || continue
    parent=$(ps -o ppid= -p "$pid" 2>/dev/null) || continue
    has_rank "${parent// /}" || ranks+=("$pid")
  done < <(descendants "$LAUNCHER_PID")
  ((${#ranks[@]} > 0)) || return 1
  kill "-$1" "${ranks[@]}" 2>/dev/null
}

has_rank() { grep -qz '^LOCAL_RANK=' "/proc/$1/environ" 2>/dev/null; }

# A rank has failed and the launcher waits on: the others get some time to notice by themselves, or to finish their save.
end_after_failure() {
  while kill -0 "$1" 2>/dev/null; do
    sleep 0.5 >/dev/null 2>&1
    [[ -s $2 ]] || continue
    for _ in {1..20}; do kill -0 "$1" 2>/dev/null || return 0; sleep 0.5 >/dev/null 2>&1; done
    say "a rank has failed, the others go on: ending them"
    kill -TERM "$1" 2>/dev/null || true
    return 0
  done
}

watch_for_hang() {
  local last
  touch_stamp=$(mktemp)
  while kill -0 "$1" 2>/dev/null; do
    sleep $((HANG_S < 20 ? HANG_S : 20)) >/dev/null 2>&1
    last=$(find ${LOG_DIR:+"$LOG_DIR"} ${CHECKPOINT_DIR:+"$CHECKPOINT_DIR"} "$touch_stamp" -newermt "-$HANG_S seconds" -print -quit 2>/dev/null)
    [[ -z $last ]] || continue
    say "nothing written for $HANG_S s (HANG_S): stacks of the ranks, then the end"
    LAUNCHER_PID=$1 tell_all ABRT
    break
  done
  rm -f "$touch_stamp"
}

# Where to look: the failed rank's own log, its last lines here.
show_failed_rank() {
  local log=${LOG_DIR:-}/rank_${FAILED_RANK:-}.log
  say "exit code $1${FAILED_RANK:+, from rank $FAILED_RANK}"
  [[ -n ${LOG_DIR:-} && -n $FAILED_RANK && -s $log ]] || return 0
  say "the end of $log:"
  tail -n 20 "$log" >&2
}

newest_or_none() {
  [[ -n ${CHECKPOINT_DIR:-} && -d $CHECKPOINT_DIR ]] || return 0
  newest_checkpoint 2>/dev/null || true
}

dcgm() {
  [[ ${DCGM_PAUSE:-0} == 1 ]] || return 0
  declare -F on_every_node >/dev/null || die "DCGM_PAUSE: this launcher cannot run a command on every node"
  on_every_node dcgmi profiling "$1" || say "dcgmi profiling $1 failed"
}

# A sleep that holds neither the output's pipe nor a signal up.
nap() {
  sleep "$1" >/dev/null 2>&1 &
  wait $! || true
}
