#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# serial
#
# The link between primary and backup: a backup that is restarted under load is
# resumed and not copied anew; one that stands still for some seconds delays
# writes, never fails or loses them, and costs no memory; four VMs share one
# backup process; a disk with data is copied while it is written to.
. "$(dirname "$0")/lib.sh"
requires nbdkit nbdinfo nbdcopy fio qemu-io cmp truncate
fio --enghelp 2>/dev/null | grep -qw nbd || skip 'fio has no nbd engine'
tmpdir

mkdir "$tmp/store"
uri="nbd+unix://?socket=$tmp/backup.sock"
start_backup () {
  rm -f "$tmp/backup.sock"
  nbdkit_backup backup -U "$tmp/backup.sock" dir="$tmp/store"
}

start_primary () { # VM PARAMETER…
  rm -f "$tmp/$1.sock"
  nbdkit_vmrep "$1" -U "$tmp/$1.sock" primary="$tmp/$1" vm="$1" \
    backup="$uri" "${@:2}"
}

committed () { # VM
  echo "nbd+unix:///$1/disk0@committed?socket=$tmp/backup.sock"
}

is_whole () { # VM
  nbdinfo --size "$(committed "$1")"
}

# Load in the background, as process NAME: 64 KiB writes for SECONDS.
load () { # NAME VM SECONDS FIO-OPTION…
  start_bg "$1" fio --name="$1" --ioengine=nbd --size=24M --rw=randwrite \
    --uri="nbd+unix:///?socket=$tmp/$2.sock" --bs=64k --iodepth=16 \
    --time_based --runtime="$3" --random_generator=tausworthe64 \
    --output-format=terse --terse-version=3 --eta=never "${@:4}"
}

# It must end well, with no request failed.
ended () { # NAME
  wait_for 60 is_gone "${bg_pid[$1]}" || fail "$1 does not end"
  stop_bg "$1" || fail "$1: a request failed: $(tail -n 3 "${bg_log[$1]}")"
}

same_on_both () { # VM
  timeout 60 qemu-io -f raw -c flush "nbd+unix:///?socket=$tmp/$1.sock" \
    >/dev/null || fail "$1: flush"
  nbdcopy "$(committed "$1")" "$tmp/copy"
  nbdcopy "nbd+unix:///?socket=$tmp/$1.sock" "$tmp/now"
  cmp "$tmp/copy" "$tmp/now" || fail "$1: the backup differs"
}

rss_kib () { # NAME
  sed -n 's/^VmRSS:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/${bg_pid[$1]}/status"
}

# ---- First copy of a disk with data, under load
truncate -s 24M "$tmp/vm0"
head -c 24M /dev/urandom | dd of="$tmp/vm0" bs=1M conv=notrunc status=none
start_backup
start_primary vm0 journal-size=64M flush=remote
load writer vm0 2
wait_for 30 is_whole vm0 || fail 'the first copy does not end under load'
ended writer
same_on_both vm0

# ---- The backup is killed and started again under load, three times
# A new copy would begin with a new image.
image=$(stat -c %i "$tmp/store/vm0/disk0.img")
load writer vm0 3
for i in 1 2 3; do
  sleep 0.5
  kill_bg backup
  sleep 0.2
  start_backup
done
ended writer
same_on_both vm0
[ "$(stat -c %i "$tmp/store/vm0/disk0.img")" = "$image" ] ||
  fail 'copied anew, not resumed'

# ---- The backup stands still, for less than the link's deadline and for more
# Half the journal in memory, and a buffer for each request; but not all of it.
limit_kib=81920
bounded () { # NAME…
  local name kib
  [ -z "${VALGRIND-}${ASAN-}" ] || return 0
  for name in "$@"; do
    kib=$(rss_kib "$name")
    echo "$name: $kib KiB"
    [ "$kib" -le $limit_kib ] || fail "$name: $kib KiB of memory"
  done
}

written () { # bytes that the device of vm0 has taken
  vmrep status --json "$tmp/vm0.epoch" |
    sed -n 's/.*"written_bytes": *\([0-9]\+\).*/\1/p' | head -n1
}

for seconds in 2 7; do
  load writer vm0 $(( seconds + 2 ))
  sleep 0.5
  kill -STOP "${bg_pid[backup]}"
  before=$(written)
  sleep "$seconds"
  bounded vm0 backup
  taken=$(( $(written) - before ))
  echo "stopped for $seconds s: $taken bytes taken"
  [ "$taken" -gt 1000000 ] || fail 'writes do not go on into the journal'
  [ "$taken" -le $(( 64 << 20 )) ] || fail 'more than the journal can hold'
  kill -CONT "${bg_pid[backup]}"
  ended writer
  same_on_both vm0
done
bounded vm0 backup
[ "$(stat -c %i "$tmp/store/vm0/disk0.img")" = "$image" ] ||
  fail 'copied anew, not resumed'

# ---- Four more VMs, one backup; killed under all their load
for i in 1 2 3 4; do
  truncate -s 24M "$tmp/vm$i"
  start_primary "vm$i" journal-size=8M flush=remote
  load "writer$i" "vm$i" 3 --randseed="$i"
done
sleep 1
kill_bg backup
start_backup
for i in 1 2 3 4; do ended "writer$i"; done
for i in 0 1 2 3 4; do
  wait_for 20 is_whole "vm$i" || fail "vm$i is not replicated"
  same_on_both "vm$i"
done
nbdinfo --list "$uri" >"$tmp/exports"
for i in 0 1 2 3 4; do
  for name in "vm$i/disk0" "vm$i/disk0@committed"; do
    grep -qF "export=\"$name\"" "$tmp/exports" || fail "$name is not listed"
  done
done
[ "$(grep -c 'export=' "$tmp/exports")" -eq 10 ] || fail 'other exports'
bounded backup

# ---- One who was primary before a promotion is sent away, and serves nothing
for i in 0 1 2 3 4; do stop_bg "vm$i" || fail "vm$i: exit status $?"; done
stop_bg backup || fail "exit status $?"
vmrep promote "$tmp/store" vm0 >/dev/null || fail 'promote'
start_backup
checked nbdkit
start_bg vm0 "${checker[@]}" nbdkit -f "$BUILD/nbdkit-vmrep-plugin.so" \
  -U "$tmp/late.sock" primary="$tmp/vm0" vm=vm0 backup="$uri"
wait_for 20 is_gone "${bg_pid[vm0]}" || fail 'an old primary is served'
grep -q 'was promoted' "${bg_log[vm0]}" || fail 'no reason is given'
