#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# fio finds what it wrote, in 4 KiB and 64 KiB pieces with many in flight, and
# after each flush the backup's committed disk is the primary's, byte for byte:
# also when two clients wrote over each other without any order.
. "$(dirname "$0")/lib.sh"
requires nbdkit fio nbdcopy nbdinfo qemu-io cmp truncate
fio --enghelp 2>/dev/null | grep -qw nbd || skip 'fio has no nbd engine'
tmpdir

size=$(( 48 << 20 ))
truncate -s $size "$tmp/image"
mkdir "$tmp/store"
nbdkit_backup backup -U "$tmp/backup.sock" dir="$tmp/store"
start_primary () {
  rm -f "$tmp/sock"
  nbdkit_vmrep primary -U "$tmp/sock" primary="$tmp/image" vm=vm \
    journal-size=32M flush=remote backup="nbd+unix://?socket=$tmp/backup.sock"
}
start_primary
primary_uri="nbd+unix:///?socket=$tmp/sock"
committed="nbd+unix:///vm/disk0@committed?socket=$tmp/backup.sock"

wait_for 20 nbdinfo --size "$committed" || fail 'not replicated'

run_fio () { # NAME OPTION…
  local name=$1
  shift
  fio --name="$name" --ioengine=nbd --uri="$primary_uri" --size=$size \
    --randseed=7 --verify_state_save=0 "$@" >"$tmp/$name.out" 2>&1 || {
    tail -n 20 "$tmp/$name.out"
    fail "fio $name"
  }
}

same_on_both () {
  qemu-io -f raw -c flush "$primary_uri" >/dev/null || fail 'flush'
  nbdcopy "$committed" "$tmp/copy"
  nbdcopy "$primary_uri" "$tmp/now"
  cmp "$tmp/copy" "$tmp/now" || fail "$1: the backup differs"
}

verify=(--verify=xxhash --verify_fatal=1 --do_verify=1)
run_fio small --rw=randwrite --bs=4k --iodepth=32 "${verify[@]}"
same_on_both small
run_fio large --rw=randwrite --bs=64k --iodepth=16 "${verify[@]}"
same_on_both large
run_fio mixed --rw=randrw --bsrange=512-128k --blockalign=512 --iodepth=16 \
  --fsync=50 "${verify[@]}"
same_on_both mixed
# Verified once more after a crash: all of it was flushed.
run_fio written --rw=randwrite --bs=16k --iodepth=8 --verify=xxhash \
  --do_verify=0 --end_fsync=1
kill_bg primary
start_primary
run_fio reread --rw=randread --bs=16k --iodepth=8 "${verify[@]}"

# Overlapping writes in flight: any order will do, but one for both hosts.
# Few blocks, so that they meet often.
pids=()
for i in 1 2; do
  fio --name="race$i" --ioengine=nbd --uri="$primary_uri" --size=256k \
    --io_size=24M --rw=randwrite --bsrange=1k-32k --blockalign=512 \
    --norandommap --iodepth=16 --randseed="$i" --buffer_compress_percentage=0 \
    --refill_buffers >"$tmp/race$i.out" 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || fail "fio race"; done
same_on_both race
stop_bg primary || fail "exit status $?"
cmp "$tmp/image" "$tmp/now" || fail "the primary's image differs"
