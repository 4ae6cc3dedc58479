#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# serial
# timeout: 240
#
# Pulls the plug, more than 200 times, on primaries, the backup and all at
# once, under load and while they start and recover.  An outside observer
# (tests/tools/observer.c) checks each time, byte by byte, what came back:
# invariants I1 to I4, on one disk and on two that share an epoch counter.
#
# VR_SEED=N repeats the decisions of a run (not its timing); VR_KILLS=N asks
# for another number of kills.
. "$(dirname "$0")/lib.sh"
requires nbdkit truncate
tmpdir

seed=${VR_SEED:-$(( $(od -An -N3 -tu4 /dev/urandom) ))}
wanted=${VR_KILLS:-210}
kills=0 aborts=0 early=0
echo "VR_SEED=$seed"
RANDOM=$(( seed % 32768 ))
# Not RANDOM itself: free_port uses it, and what it draws is not ours.
state=$seed
draw () { # MAX: sets r to 0..MAX-1
  state=$(( (state * 1103515245 + 12345) & 0x7fffffff ))
  r=$(( (state >> 8) % $1 ))
}

# ---- The observer

ask () { # COMMAND…: sets answer
  echo "$*" >&"${observer[1]}"
  read -r -t $(( 100 * $(slower) )) answer <&"${observer[0]}" ||
    fail "observer: no answer to: $*"
  [[ $answer == ok* ]] || fail "observer: $answer"
  [ -z "${TRACE-}" ] || echo "$EPOCHREALTIME $*: $answer"
}

# ---- Servers of one round

# nbdkit refuses a socket that is there already.
start_backup () {
  rm -f "$dir/backup.sock"
  nbdkit_backup backup "${listen[@]}" dir="$dir/store" sync="$sync"
}

primary_args () { # DISK
  args=(-U "$dir/$1.sock" primary="$dir/$1" backup="$uri" vm=vm disk="$1"
        epoch="$dir/epoch" journal-size="$journal" epoch-interval=10ms
        flush="$flush" node=test)
}

start_primary () { # DISK
  local args
  primary_args "$1"
  rm -f "$dir/$1.sock"
  nbdkit_vmrep "$1" "${args[@]}"
}

# Start NAME (a disk, or backup) and pull the plug somewhere on the way.
kill_while_starting () {
  local args plugin=vmrep checker
  draw 4
  [ "$r" -eq 0 ] || return 0
  if [ "$1" = backup ]; then
    plugin=vmrep-backup
    args=("${listen[@]}" dir="$dir/store" sync="$sync")
    rm -f "$dir/backup.sock"
  else
    primary_args "$1"
    rm -f "$dir/$1.sock"
  fi
  checked nbdkit
  start_bg "$1" "${checker[@]}" nbdkit -f \
    "$BUILD/nbdkit-$plugin-plugin.so" "${args[@]}"
  draw 70
  sleep "0.0$(printf %02d "$r")"
  kill_bg "$1"
  kills=$(( kills + 1 ))
  early=$(( early + 1 ))
}

restart_backup () {
  kill_while_starting backup
  start_backup
}

# Disk number $1 again, checked, and under load.
restart_primary () {
  local name=${disks[$1]}
  kill_while_starting "$name"
  start_primary "$name"
  ask "primary $1 nbd+unix://?socket=$dir/$name.sock"
  ask "load $1 nbd+unix://?socket=$dir/$name.sock"
}

# nbdkit before 1.33.10 may abort when a client dies while replies are pending
# (its commit 9d82aa4f).  To us it is one more kill; anything else is a bug.
look_after_backup () {
  is_gone "${bg_pid[backup]}" || return 0
  grep -q 'raw_send_socket: Assertion .sock >= 0. failed' \
    "${bg_log[backup]}" || fail 'the backup died'
  kill_bg backup
  : >"${bg_log[backup]}"
  aborts=$(( aborts + 1 ))
  start_backup
}

pause () { # MAX: somewhere up to MAX ms
  draw "$1"
  ask "wait $(( r + 1 ))"
}

# ---- What is killed

kill_primaries () {
  local i
  kill_bg "${disks[@]}"
  for i in "${!disks[@]}"; do ask "gone $i"; done
  kills=$(( kills + 1 ))
  look_after_backup
  ask "still $uri"
  for i in "${!disks[@]}"; do restart_primary "$i"; done
}

kill_one_primary () {
  local i
  draw ${#disks[@]}
  i=$r
  kill_bg "${disks[$i]}"
  ask "gone $i"
  kills=$(( kills + 1 ))
  pause 60
  look_after_backup
  # The other disk goes on, but nothing can be committed without this one.
  ask "still $uri"
  restart_primary "$i"
}

kill_backup () {
  kill_bg backup
  kills=$(( kills + 1 ))
  pause 200
  restart_backup
}

kill_all () {
  local i
  kill_bg backup "${disks[@]}"
  for i in "${!disks[@]}"; do ask "gone $i"; done
  kills=$(( kills + 1 ))
  restart_backup
  ask "still $uri"
  for i in "${!disks[@]}"; do restart_primary "$i"; done
}

# An orderly end with requests in flight loses nothing either.  nbdkit waits
# for its clients to go.
end_primaries () {
  local i name
  for i in "${!disks[@]}"; do ask "closing $i"; done
  for name in "${disks[@]}"; do kill -TERM "${bg_pid[$name]}"; done
  pause 40
  for i in "${!disks[@]}"; do ask "gone $i"; done
  for name in "${disks[@]}"; do
    stop_bg "$name" || fail "$name: SIGTERM: exit status $?"
  done
  look_after_backup
  for i in "${!disks[@]}"; do restart_primary "$i"; done
}

check_alive () {
  local name
  look_after_backup
  for name in "${disks[@]}"; do
    is_running "$name" || fail "$name died"
  done
}

one_step () {
  pause 180
  check_alive
  draw 20
  case $r in
    [0-4]) kill_primaries ;;
    [5-9]) kill_backup ;;
    1[0-4]) kill_all ;;
    1[5-8]) kill_one_primary ;;
    19) end_primaries ;;
  esac
  draw 3
  [ "$r" -ne 0 ] || { check_alive; ask "live $uri"; }
}

# ---- Rounds

random_image () { # PATH SIZE: half of it holes
  truncate -s "$2" "$1"
  head -c 6M /dev/urandom | dd of="$1" bs=64K seek=48 conv=notrunc \
    status=none
}

# Ends with a kill at any moment, and promotion.
finish_round () {
  local i
  check_alive
  ask flush
  for i in "${!disks[@]}"; do
    ask "equal $i nbd+unix://?socket=$dir/${disks[$i]}.sock"
  done
  for i in "${!disks[@]}"; do
    ask "load $i nbd+unix://?socket=$dir/${disks[$i]}.sock"
  done
  # A view holds every epoch up to it, so the first copy is done.
  ask "live $uri"
  pause 100
  kill_bg backup "${disks[@]}"
  kills=$(( kills + 1 ))
  for i in "${!disks[@]}"; do ask "gone $i"; done
  vmrep promote "$dir/store" vm >"$dir/promote" || fail "promote"
  ask "promoted $dir/store/vm"
  # Once more changes nothing.
  vmrep promote "$dir/store" vm >"$dir/promote" || fail "promote again"
  ask "promoted $dir/store/vm"
}

round () { # KILLS FLUSH SYNC JOURNAL tcp|unix DISK…
  local until=$(( kills + $1 )) name
  flush=$2 sync=$3 journal=$4 via=$5
  shift 5
  disks=("$@")
  rounds=$(( rounds + 1 ))
  dir=$tmp/r$rounds
  mkdir -p "$dir/store"
  if [ "$via" = tcp ]; then
    port=$(free_port)
    listen=(-i 127.0.0.1 -p "$port")
    uri=nbd://127.0.0.1:$port
  else
    listen=(-U "$dir/backup.sock")
    uri="nbd+unix://?socket=$dir/backup.sock"
  fi
  images=()
  for name in "${disks[@]}"; do
    # No multiple of 512, and not all the same.
    random_image "$dir/$name" $(( (20 << 20) + ${#images[@]} * 4096 + 77 ))
    images+=("$name=$dir/$name")
  done
  coproc observer_process {
    exec "$BUILD/tools/observer" $(( seed + rounds )) "$dir/epoch" \
      flush="$flush" vm "${images[@]}"
  }
  # shellcheck disable=SC2154 # coproc sets it
  observer=("${observer_process[@]}")
  start_backup
  for name in "${!disks[@]}"; do
    start_primary "${disks[$name]}"
    ask "load $name nbd+unix://?socket=$dir/${disks[$name]}.sock"
  done
  while [ $kills -lt $until ]; do one_step; done
  finish_round
  ask count
  echo "flush=$flush sync=$sync journal=$journal $via ${disks[*]}: $answer"
  # shellcheck disable=SC2154
  kill "$observer_process_PID"
  wait "$observer_process_PID" 2>/dev/null || :
  rm -rf "$dir"
}

rounds=0
round $(( wanted / 5 )) local disk 8M unix a
round $(( wanted / 5 )) remote disk 16M tcp a
round $(( wanted * 3 / 10 )) local disk 12M tcp a b
round $(( wanted * 3 / 10 )) remote disk 8M unix a b
round 2 remote memory 32M unix a b

echo "$kills kills ($early while starting), $aborts times nbdkit's own" \
  'assertion'
[ "$kills" -ge "$wanted" ] || fail "only $kills kills"
