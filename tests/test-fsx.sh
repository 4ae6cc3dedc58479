#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Random operations of any size at any place, over two connections, agree with
# a model; also after the plugin was killed or ended and started again, and at
# the backup.  On a file whose size is no multiple of 512, and on a block
# device.  VR_SEED=N repeats a run.
. "$(dirname "$0")/lib.sh"
requires nbdkit nbdcopy nbdinfo cmp truncate
tmpdir

seed=${VR_SEED:-$(( $(od -An -N3 -tu4 /dev/urandom) ))}
echo "VR_SEED=$seed"
loop=
at_exit () {
  [ -z "$loop" ] || losetup -d "$loop"
}

primary_uri="nbd+unix:///?socket=$tmp/sock"
backup_uri="nbd+unix:///vm/disk0@committed?socket=$tmp/backup.sock"

start_primary () { # IMAGE PARAMETER…
  rm -f "$tmp/sock"
  nbdkit_vmrep primary -U "$tmp/sock" primary="$1" vm=vm \
    journal="$tmp/journal" epoch="$tmp/epoch" epoch-interval=5ms "${@:2}"
}

fsx () { # OPERATIONS [ALIGN]
  seed=$(( seed + 1 ))
  tool fsx-nbd "$seed" "$primary_uri" "$tmp/model" "$@" || fail fsx
}

# A file of an odd size, replicated; the small journal is recycled many times.
truncate -s $(( (6 << 20) + 333 )) "$tmp/image"
head -c 700000 /dev/urandom |
  dd of="$tmp/image" bs=1M seek=2 conv=notrunc status=none
mkdir "$tmp/store"
nbdkit_backup backup -U "$tmp/backup.sock" dir="$tmp/store"
args=("$tmp/image" journal-size=8M flush=remote
      backup="nbd+unix://?socket=$tmp/backup.sock")
start_primary "${args[@]}"
wait_for 20 nbdinfo --size "$backup_uri" || fail 'not replicated'
fsx 4000
kill_bg primary
start_primary "${args[@]}"
fsx 4000
stop_bg primary || fail "exit status $?"
start_primary "${args[@]}"
fsx 3000
# The last flush was for the backup too.
nbdcopy "$backup_uri" "$tmp/copy"
cmp "$tmp/copy" "$tmp/model" || fail 'the backup differs'
stop_bg primary || fail "exit status $?"
# All of it is in the image when the plugin has ended.
cmp "$tmp/image" "$tmp/model" || fail 'the image differs'
stop_bg backup || fail "exit status $?"
cmp "$tmp/store/vm/disk0.img" "$tmp/model" ||
  fail 'the image of the backup differs'

# A block device, without a backup; bytes there too, and whole sectors.
rm -f "$tmp/journal" "$tmp/epoch" "$tmp/model"
truncate -s 8M "$tmp/device"
if [ "$(id -u)" -eq 0 ] && loop=$(losetup -f --show "$tmp/device" 2>&1); then
  start_primary "$loop" journal-size=8M backup=none
  fsx 2000
  kill_bg primary
  start_primary "$loop" backup=none
  fsx 1500 512
  stop_bg primary || fail "exit status $?"
  cmp "$loop" "$tmp/model" || fail 'the device differs'
else
  echo "no block device: $loop"
  loop=
fi
