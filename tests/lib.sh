# SPDX-License-Identifier: BSD-3-Clause
# shellcheck shell=bash
#
# Sourced by test scripts:
#
#   #!/bin/bash
#   # SPDX-License-Identifier: BSD-3-Clause
#   # One line that says what this test claims.
#   . "$(dirname "$0")/lib.sh"
#   requires qemu-img
#   tmpdir
#   truncate -s 64M "$tmp/disk"
#   nbdkit_vmrep primary -U "$tmp/sock" primary="$tmp/disk" backup=none vm=a
#   …
#
# The script runs from the top of the source tree.  $BUILD is the build under
# test, as an absolute path.  Whatever start_bg started and what tmpdir made is
# gone when the script ends, however it ends; a function at_exit, if there is
# one, is called in between.
set -euE

cd "$(dirname "${BASH_SOURCE[0]}")/.."
BUILD=$(realpath -m "${BUILD:-build}")
tmp=
declare -A bg_pid=() bg_log=()

# fail MSG: the test has failed.
fail () {
  echo "FAIL: $*" >&2
  exit 1
}

# skip MSG: the test cannot run here.
skip () {
  echo "$*"
  exit 77
}

# requires CMD…: skip unless each command (or file, if it has a slash) is there.
requires () {
  local c
  for c in "$@"; do
    case $c in
      */*) [ -e "$c" ] || skip "needs $c" ;;
      *) command -v "$c" >/dev/null || skip "needs the command $c" ;;
    esac
  done
}

# requires_root: skip unless root.
requires_root () {
  [ "$(id -u)" -eq 0 ] || skip 'needs root'
}

# tmpdir: make a folder, $tmp, that is removed at exit.  Short, because a unix
# socket's path has at most 107 bytes.
tmpdir () {
  [ -z "$tmp" ] || return 0
  tmp=$(mktemp -d "${TMPDIR:-/tmp}/vmrep.XXXXXX")
}

# free_port: print a TCP port that nothing listens on.  Below the ephemeral
# range, and reserved for the rest of the run among parallel tests.
free_port () {
  local port tries=0 ports=${VMREP_PORTS:-}
  while [ $((tries++)) -lt 200 ]; do
    port=$(( 20000 + RANDOM % 12000 ))
    ! grep -qi ":$(printf %04x $port) " /proc/net/tcp /proc/net/tcp6 \
      2>/dev/null || continue
    [ -z "$ports" ] || mkdir "$ports/$port" 2>/dev/null || continue
    echo $port
    return
  done
  fail 'no free port'
}

# wait_for SECONDS CMD…: run CMD until it succeeds; 1 when time is up.
wait_for () {
  local end=$(( ${EPOCHREALTIME/[.,]/} + $1 * 1000000 * $(slower) ))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "${EPOCHREALTIME/[.,]/}" -lt $end ] || return 1
    sleep 0.02
  done
}

# By what factor everything takes longer under a checker.
slower () {
  if [ -n "${VALGRIND-}" ]; then echo 8
  elif [ -n "${ASAN-}" ]; then echo 3
  else echo 1
  fi
}

# start_bg NAME CMD…: run CMD in the background with its output in
# ${bg_log[NAME]} and its process id in ${bg_pid[NAME]}.  A NAME may be used
# again once it is stopped; the log is appended to.
start_bg () {
  local name=$1
  shift
  tmpdir
  bg_log[$name]=$tmp/$name.log
  "$@" </dev/null >>"${bg_log[$name]}" 2>&1 &
  bg_pid[$name]=$!
}

# is_running NAME
is_running () {
  [ -n "${bg_pid[$1]-}" ] && kill -0 "${bg_pid[$1]}" 2>/dev/null
}

# stop_bg NAME [SIGNAL]: end it and return its exit status (128+SIGNAL when the
# signal killed it).  After 20 s it is killed with SIGKILL.
stop_bg () {
  local name=$1 signal=${2:-TERM} pid rc=0
  pid=${bg_pid[$name]}
  kill "-$signal" "$pid" 2>/dev/null || :
  wait_for 20 is_gone "$pid" || kill -KILL "$pid" 2>/dev/null || :
  wait "$pid" 2>/dev/null || rc=$?
  unset "bg_pid[$name]"
  return $rc
}

# kill_bg NAME…: pull the plug (SIGKILL), all at once.
kill_bg () {
  local name
  for name in "$@"; do
    kill -KILL "${bg_pid[$name]}" 2>/dev/null || :
  done
  for name in "$@"; do
    wait "${bg_pid[$name]}" 2>/dev/null || :
    unset "bg_pid[$name]"
  done
}

# Gone, or dead and waiting for us to collect it.
is_gone () {
  local state
  state=$(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) ||
    return 0
  case $state in '' | Z*) return 0 ;; esac
  return 1
}

# What valgrind (with -q) or a sanitizer says in a log, if anything: a server
# that we killed has no exit status to tell it.
complaints () {
  [ -n "${VALGRIND-}${ASAN-}" ] || return 1
  grep -m1 -A40 -E '^==[0-9]+==|: runtime error: ' "$1"
}

show_logs () {
  local name
  for name in "${!bg_log[@]}"; do
    echo "--- last lines of $name:"
    complaints "${bg_log[$name]}" || tail -n 15 "${bg_log[$name]}"
    [ ! -e "$tmp/$name.console" ] || tail -n 15 "$tmp/$name.console"
  done
}

cleanup () {
  local rc=$? name
  trap - EXIT ERR
  set +e
  for name in "${!bg_pid[@]}"; do
    stop_bg "$name" >/dev/null 2>&1
  done
  ! declare -F at_exit >/dev/null || at_exit
  for name in "${!bg_log[@]}"; do
    ! complaints "${bg_log[$name]}" >/dev/null || [ $rc -ne 0 ] || rc=1
  done
  [ $rc -eq 0 ] || [ $rc -eq 77 ] || show_logs
  if [ -n "$tmp" ] && [ -z "${KEEP_TMP-}" ]; then
    rm -rf "$tmp"
  elif [ -n "$tmp" ]; then
    echo "kept $tmp"
  fi
  exit $rc
}
trap cleanup EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'echo "$0:$LINENO: failed: $BASH_COMMAND" >&2' ERR

# checked: sets checker[], the words to put before one of our programs ($1 =
# nbdkit or program).
checked () {
  checker=()
  if [ -n "${VALGRIND-}" ]; then
    checker=(valgrind -q --num-callers=24 --error-exitcode=99)
  elif [ -n "${ASAN-}" ] && [ "$1" = nbdkit ]; then
    # nbdkit itself has no sanitizer: the runtime must come before it.  Its
    # own leaks at exit are not our subject, nor is that it hangs there.
    checker=(env
             "LD_PRELOAD=$(gcc -print-file-name=libasan.so):$BUILD/no-freelocale.so"
             ASAN_OPTIONS=detect_leaks=0)
  fi
}

# nbdkit_fg PLUGIN ARG…: run nbdkit with our plugin vmrep or vmrep-backup in
# the foreground; for what should fail at once, --dump-plugin and the like.
nbdkit_fg () {
  local plugin=$1 checker
  shift
  checked nbdkit
  "${checker[@]}" nbdkit -f "$BUILD/nbdkit-$plugin-plugin.so" "$@"
}

# Start nbdkit with plugin $1 as background process $2 and wait until it
# serves, which is when it writes its pid file.
nbdkit_bg () {
  local plugin=$1 name=$2 checker pidfile
  shift 2
  tmpdir
  checked nbdkit
  pidfile=$tmp/$name.pid
  rm -f "$pidfile"
  start_bg "$name" "${checker[@]}" nbdkit -f -P "$pidfile" \
    "$BUILD/nbdkit-$plugin-plugin.so" "$@"
  wait_for 20 serves_or_gone "$name" "$pidfile" || fail "$name does not start"
  [ -s "$pidfile" ] || fail "$name did not start"
}

serves_or_gone () {
  [ -s "$2" ] || is_gone "${bg_pid[$1]}"
}

# nbdkit_vmrep NAME ARG…, nbdkit_backup NAME ARG…: the plugin in the background
# as NAME; returns when it serves.  ARGs are nbdkit's options and the plugin's
# parameters.
nbdkit_vmrep () {
  nbdkit_bg vmrep "$@"
}

nbdkit_backup () {
  nbdkit_bg vmrep-backup "$@"
}

# vmrep ARG…: the command under test.
vmrep () {
  local checker
  checked program
  "${checker[@]}" "$BUILD/vmrep" "$@"
}

# tool NAME ARG…: one of tests/tools/.
tool () {
  local name=$1
  shift
  "$BUILD/tools/$name" "$@"
}

# requires_guest: build the test guest (quick when it is there), or skip.
requires_guest () {
  requires qemu-system-x86_64 busybox cpio
  tmpdir
  scripts/guest >"$tmp/guest-build.log" 2>&1 || {
    cat "$tmp/guest-build.log"
    skip 'the test guest cannot be built'
  }
}

# start_guest NAME MODE ARG…: boot the test guest in the background; its
# console goes to $tmp/NAME.console.  ARGs as for scripts/guest-run.
start_guest () {
  local name=$1 mode=$2
  shift 2
  start_bg "$name" scripts/guest-run --mode "$mode" \
    --serial "$tmp/$name.console" "$@"
}

# wait_guest SECONDS NAME REGEX: wait for a whole line on guest NAME's console;
# fail when time is up or the guest ended without it.
wait_guest () {
  local seconds=$1 name=$2 regex=$3
  wait_for "$seconds" said_or_gone "$name" "$regex" ||
    fail "guest $name: no line '$regex' in $seconds s"
  grep -qxE "$regex" "$tmp/$name.console" ||
    fail "guest $name ended without a line '$regex'"
}

said_or_gone () {
  grep -qxE "$2" "$tmp/$1.console" || is_gone "${bg_pid[$1]}"
}

# wait_guest_off NAME: wait until the guest has turned itself off.
wait_guest_off () {
  wait_for 30 is_gone "${bg_pid[$1]}" || fail "guest $1 does not turn off"
  stop_bg "$1" || fail "guest $1: QEMU failed"
}

# last_ack CONSOLE: the last record that the guest said is durable, or 0.
last_ack () {
  # A last line that a kill cut off reads as a smaller number: still true.
  sed -n 's/^ACK \([0-9]\+\)\r\{0,1\}$/\1/p' "$1" | tail -n1 | grep . || echo 0
}
