#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A real guest on two replicated disks.  While it writes, each committed epoch
# that is looked at is an ext4 that only needs its journal replayed.  Then the
# plug is pulled on QEMU and everything else of the primary, the backup is
# promoted, and the guest finds in its images every record that it acknowledged
# and goes on; a second time with the backup killed too.
# timeout: 150
. "$(dirname "$0")/lib.sh"
requires nbdkit nbdinfo nbdcopy e2fsck truncate
requires_guest

disks=(a b)
port=$(free_port)
uri=nbd://127.0.0.1:$port
store=$tmp/store
mkdir "$store"
start_backup () {
  nbdkit_backup backup -i 127.0.0.1 -p "$port" dir="$store"
}

start_primary () { # DISK FOLDER
  rm -f "$tmp/$1.sock"
  nbdkit_vmrep "$1" -U "$tmp/$1.sock" primary="$2/$1" vm=vm disk="$1" \
    backup="$uri" epoch="$2/epoch" journal-size=64M flush=remote
}

guest_disks () {
  args=()
  for disk in "${disks[@]}"; do args+=(--disk "$tmp/$disk.sock"); done
}

acked_at_least () { # GUEST N
  [ "$(last_ack "$tmp/$1.console")" -ge "$2" ]
}

# The file system in $tmp/copy is what a crash leaves and no worse: e2fsck
# replays the journal, may set right what the superblock counts and what a
# crash between unlink and the next commit leaves, and then has nothing to say.
crash_consistent () {
  local rc=0
  e2fsck -fy "$tmp/copy" >"$tmp/fsck" 2>&1 || rc=$?
  if [ $rc -gt 1 ] || grep -vE "$harmless" "$tmp/fsck" | grep -q .; then
    cat "$tmp/fsck"
    fail "$1: damaged (e2fsck -fy: exit status $rc)"
  fi
  e2fsck -fn "$tmp/copy" >"$tmp/fsck" 2>&1 || {
    cat "$tmp/fsck"
    fail "$1: not clean afterwards"
  }
}
harmless='^e2fsck |recovering journal|^Pass [1-5]|^Setting free |^Clearing orphan'
harmless+='|^Free (blocks|inodes) count wrong|^Fix\? yes|FILE SYSTEM WAS MODIFIED'
harmless+='|: [0-9]+/[0-9]+ files |^[[:space:]]*$'

# The guest runs until it has acknowledged N records more than it had; on the
# way every epoch that can be had is checked.  Sets epochs.
watch_epochs () { # GUEST N
  local disk
  epochs=0
  until acked_at_least "$1" "$2"; do
    is_running "$1" || fail "guest $1 ended"
    for disk in "${disks[@]}"; do
      # A view is given up when the journal fills; then there is another.
      nbdcopy "$uri/vm/$disk@committed" "$tmp/copy" 2>"$tmp/nbdcopy" ||
        continue
      # No file system yet, or half of one: mke2fs ran.
      grep -qx 'ACK 1' "$tmp/$1.console" || continue
      crash_consistent "$disk"
      epochs=$(( epochs + 1 ))
    done
  done
}

# The images that promotion left, checked like a disk after a crash.
check_promoted () { # ACKED
  local disk
  for disk in "${disks[@]}"; do
    cp --sparse=always "$store/vm/$disk.img" "$tmp/copy"
    crash_consistent "promoted $disk"
  done
}

# ---- The first life
start_backup
for disk in "${disks[@]}"; do
  truncate -s 96M "$tmp/$disk"
  start_primary "$disk" "$tmp"
done
guest_disks
start_guest first fresh "${args[@]}"
wait_guest 60 first 'ACK 1'
watch_epochs first 250
kill_bg first "${disks[@]}"
acked=$(last_ack "$tmp/first.console")
echo "$epochs committed disks checked, $acked records acknowledged"
[ $epochs -ge 6 ] || fail 'too few epochs were looked at'
stop_bg backup || fail "exit status $?"
vmrep promote "$store" vm || fail 'promote'
check_promoted

# ---- It goes on from the backup's images, replicated to another backup
mkdir "$tmp/new"
for disk in "${disks[@]}"; do mv "$store/vm/$disk.img" "$tmp/new/$disk"; done
mv "$store" "$store.old"
mkdir "$store"
start_backup
for disk in "${disks[@]}"; do start_primary "$disk" "$tmp/new"; done
start_guest second resume "${args[@]}"
wait_guest 60 second 'VERIFY ok'
resumed=$(sed -n 's/^RESUME //p' "$tmp/second.console")
echo "acknowledged $acked, found $resumed"
[ "$resumed" -ge "$acked" ] || fail 'an acknowledged record is lost'
for disk in "${disks[@]}"; do
  wait_for 30 nbdinfo --size "$uri/vm/$disk@committed" ||
    fail "$disk: the first copy does not end"
done
watch_epochs second $(( resumed + 60 ))
kill_bg second backup "${disks[@]}"
acked=$(last_ack "$tmp/second.console")
vmrep promote "$store" vm || fail 'promote'
check_promoted

# ---- And once more, to the end
for disk in "${disks[@]}"; do
  rm -f "$tmp/$disk.sock"
  start_bg "$disk" nbdkit -f -U "$tmp/$disk.sock" file "$store/vm/$disk.img"
done
for disk in "${disks[@]}"; do wait_for 10 test -S "$tmp/$disk.sock"; done
start_guest third check "${args[@]}"
wait_guest 60 third 'END 0'
wait_guest_off third
[ "$(grep -c '^FSCK ok ' "$tmp/third.console")" -eq 2 ] || fail 'fsck'
resumed=$(sed -n 's/^RESUME //p' "$tmp/third.console")
echo "acknowledged $acked, found $resumed"
[ "$resumed" -ge "$acked" ] || fail 'an acknowledged record is lost'
