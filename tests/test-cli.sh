#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# vmrep status, verify, inspect and promote tell the truth about real servers
# and files, and refuse what they must, changing nothing.
# timeout: 240
. "$(dirname "$0")/lib.sh"
requires jq qemu-io fio
tmpdir

MiB=$((1024 * 1024))
dir=$tmp/b
page=$tmp/d.epoch
primary="nbd+unix:///?socket=$tmp/p.sock"
backup="nbd+unix:///?socket=$tmp/b.sock"
log="nbd+unix:///vm1/disk0?socket=$tmp/b.sock"
mkdir "$dir"
holders=()

# expect STATUS CMD…: it exits with that; standard output is left in $out,
# standard error in $err.
expect () {
  local want=$1 rc=0
  shift
  out=$("$@" 2>"$tmp/err") || rc=$?
  err=$(cat "$tmp/err")
  [ $rc -eq "$want" ] || fail "$*: exit status $rc, not $want: ${out::2000} $err"
}

# says REGEX: the last $out or $err has it.
says () {
  grep -qE -- "$1" <<<"$out$err" || fail "no '$1' in: ${out::2000} $err"
}

# json FILTER: holds for $out, which is exactly one JSON object.
json () {
  jq -se 'length == 1' >/dev/null <<<"$out" || fail "not one object: ${out::2000}"
  jq -e "$1" >/dev/null <<<"$out" || fail "not true: $1 of ${out::2000}"
}

status () {
  expect 0 vmrep status --json "$@"
}

status_is () {
  vmrep status --json "$page" | jq -e "$1"
}

write_some () {
  qemu-io -f raw -c "write -P $1 $2 $3" -c flush "$primary" >/dev/null
}

checksums () {
  find "$1" -type f ! -name lock -exec cksum {} + | sort
}

start_backup () {
  rm -f "$tmp/b.sock" # a killed server leaves it
  nbdkit_backup b -U "$tmp/b.sock" dir="$dir"
}

start_primary () {
  nbdkit_vmrep p -U "$tmp/p.sock" primary="$tmp/d.img" \
    backup="$backup" vm=vm1 epoch="$page" journal-size=16M
}

flip_byte () {
  printf '\x5a' | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

# ---- Usage ------------------------------------------------------------------

expect 2 vmrep
expect 2 vmrep frobnicate
says "unknown verb 'frobnicate'"
expect 2 vmrep --frobnicate
expect 2 vmrep status
expect 2 vmrep status --frobnicate x
says 'option --frobnicate'
expect 2 vmrep status --watch=soon x
expect 2 vmrep status --json=1 x
expect 2 vmrep verify a
expect 2 vmrep promote a b c
expect 2 vmrep promote "$dir" ../vm1
expect 0 vmrep --help
expect 0 vmrep promote --help

# Output that cannot be written is no success.
rc=0
vmrep --help >/dev/full 2>/dev/null || rc=$?
[ $rc -eq 1 ] || fail "full: exit status $rc"

# ---- Status -----------------------------------------------------------------

expect 1 vmrep status --json "$tmp/nothing"
json '.vms == [] and (.errors | length) == 1'
expect 1 vmrep status "$dir"
says 'no VM is backed up here'
expect 1 vmrep status "nbd+unix:///?socket=$tmp/none.sock"

truncate -s $((200 * MiB)) "$tmp/d.img"
dd if=/dev/urandom of="$tmp/d.img" bs=1M count=20 conv=notrunc status=none
start_backup
expect 1 vmrep status "$backup"
says 'no log exports here'
start_primary
wait_for 20 status_is '.vms[0].protected' || fail 'not protected'
write_some 1 10M 1M
wait_for 10 status_is '.vms[0] | .lag_bytes == 0 and .lag_epochs == 0' ||
  fail 'lag stays'
status "$page" "$backup"
json '.errors == [] and (.vms | length) == 2'
json '.vms[0] | .vm == "vm1" and .role == "primary" and .clock.alive'
json '.vms[0].disks[0] | .disk == "disk0" and .state == "protected" and
      .commits > 0 and .written_bytes == 1048576 and .pid > 0 and
      .journal_used_bytes <= .journal_bytes and .commit_seconds > 0'
json '.vms[1] | .role == "backup" and .generation == 1'
json '.vms[1].disks[0] | .state == "complete" and .writer and
      .size == 209715200'
json '.vms[0].vm_id == .vms[1].vm_id'
for uri in "$log" "nbd+unix:///vm1?socket=$tmp/b.sock"; do
  status "$uri"
  json '[.vms[].disks[].disk] == ["disk0"]'
done
expect 1 vmrep status "nbd+unix:///vm2?socket=$tmp/b.sock"
expect 1 vmrep status "$primary"
expect 0 vmrep status "$page" "$backup"
says 'vm1: primary, protected'
says 'vm1: backup, epoch [0-9]+ committed'
status "$dir"
json '.vms[0].in_use'

# One line each, and rates from the second on.
timeout $((2 * $(slower))) "$BUILD/vmrep" status --json --watch=0.3 "$page" \
  "$backup" >"$tmp/watch" || :
jq -se 'length > 2 and all(.errors == [] and (.vms | length) == 2) and
        (.[1:] | all(.vms[0].disks[0] | .commits_per_second > 0))' \
  "$tmp/watch" >/dev/null || fail "watch: $(cat "$tmp/watch")"
[ "$(wc -l <"$tmp/watch")" -eq "$(jq -s length "$tmp/watch")" ] ||
  fail 'watch: an object is not one line'

# The backup goes away: lag is there, and grows.
kill_bg b
write_some 2 11M 1M
wait_for 10 status_is '.vms[0] | (.protected | not) and .lag_epochs > 0 and
  .lag_seconds > 0.5 and .lag_bytes > 1048576' || fail 'no lag'
status "$page"
json '.vms[0].disks[0].state == "connecting"'
expect 0 vmrep status "$page"
says 'NOT PROTECTED'
start_backup
wait_for 20 status_is '.vms[0] | .protected and .lag_epochs == 0' ||
  fail 'not protected again'
status "$page"
json '.vms[0].disks[0].reconnects > 0'

# ---- Verify -----------------------------------------------------------------

expect 0 vmrep verify --json "$primary" "$log"
json '.result == "same" and .extents == 800 and .compared_extents == 800 and
      .different_extents == 0 and (.epochs | length) == 1'
expect 0 vmrep verify --progress "$primary" "$log"
says '^same: 800 of 800'
says '100%'

# A guest that writes; so much that the small journal gets half full.
fio --name=guest --ioengine=nbd --uri="$primary" --rw=randwrite --bs=64k \
  --iodepth=8 --size=200M --rate=20m --time_based --runtime=8 >/dev/null &
fio=$!
for _ in 1 2 3 4; do
  expect 0 vmrep verify --json "$primary" "$log"
  json '.result == "same" and .compared_extents == 800'
done
wait $fio

# Damage at rest: where nothing is written any more.
wait_for 20 status_is '.vms[0].lag_epochs == 0'
sleep 1.5
flip_byte "$dir/vm1/disk0.img" $((30 * MiB + 12345))
flip_byte "$dir/vm1/disk0.img" $((30 * MiB + 300000))
flip_byte "$dir/vm1/disk0.img" $((200 * MiB - 1))
expect 3 vmrep verify --json "$primary" "$log"
json '.result == "different" and .different_extents == 3'
json '[.differences[] | [.offset, .length, .first_byte]] ==
      [[31457280, 524288, 31469625], [209453056, 262144, 209715199]]'
expect 3 vmrep verify "$primary" "$log"
says 'first at byte 31469625'
# The guest overwrites it, and it is gone.
write_some 3 30M 1M
write_some 3 199M 1M
expect 0 vmrep verify "$primary" "$log"

expect 1 vmrep verify "$backup" "$log"
says 'is no nbdkit vmrep'
expect 1 vmrep verify "$primary" "$primary"
says 'must name a log export'
expect 1 vmrep verify "$primary" "nbd+unix:///vm1/other?socket=$tmp/b.sock"
expect 1 vmrep verify --json "$primary" \
  "nbd+unix:///vm1/disk0?socket=$tmp/none.sock"
json '.result == "failed" and .error'

# ---- Promote: in use --------------------------------------------------------

expect 1 vmrep promote "$dir" vm2
says 'no VM vm2'
expect 1 vmrep promote --json "$dir" vm1
json '(.promoted | not) and .hint'
says "in use.*pid ${bg_pid[b]}"

# ---- Inspect ----------------------------------------------------------------

expect 0 vmrep inspect --json "$page"
json '.type == "epoch" and .kind == "shared" and .vm == "vm1" and
      .members[0].disk == "disk0"'

# Killed with committed epochs that are not yet in the images: open views hold
# them back.
mkfifo "$tmp/hold"
exec 9<>"$tmp/hold"
for uri in "nbd+unix:///@committed?socket=$tmp/p.sock" \
           "nbd+unix:///vm1/disk0@committed?socket=$tmp/b.sock"; do
  qemu-io -r -f raw "$uri" <"$tmp/hold" >/dev/null 2>&1 9>&- &
  holders+=($!)
done
sleep 1
write_some 4 40M 1M
wait_for 10 status_is '.vms[0].lag_epochs == 0'
# The superblock follows with the sync of a later epoch.
sleep 1
kill_bg p
journal=$tmp/d.img.journal
status "$page"
json '.vms[0] | (.protected | not) and .lag_seconds == null and
      (.clock.alive | not) and .disks[0].state == "offline"'
before=$(cksum <"$journal")
expect 0 vmrep inspect --json --records "$journal"
json '.type == "journal" and .role == "primary" and .recovery.ok and
      .damage == [] and ([.superblocks[].valid] == [true, true])'
json '.recovery | .redo_bytes > 0 and .committed_lsn <= .head_lsn'
# Records are in order, without a gap inside a segment.
json '[.records[].lsn] == ([.records[].lsn] | sort)'
json '(.segments | map(.records) | add) == (.records | length)'
at=$(jq '.recovery as $r | [.records[] | select(.kind == "write" and
  .lsn >= $r.applied_lsn and .lsn < $r.committed_lsn)][0].file_offset' \
  <<<"$out")
expect 0 vmrep inspect "$journal"
says 'recovery: good'
[ "$before" = "$(cksum <"$journal")" ] || fail 'inspect changed the journal'

# damaged OFFSET JQ: a journal whose byte there is another one.
damaged () {
  cp "$journal" "$tmp/damaged"
  flip_byte "$tmp/damaged" "$1"
  cmp -s "$journal" "$tmp/damaged" && fail 'no damage done'
  expect 3 vmrep inspect --json "$tmp/damaged"
  json "$2 and (.segments | length) > 0"
  expect 3 vmrep inspect --records "$tmp/damaged"
  says 'REFUSED'
}

damaged $((at + 1000)) "(.recovery.ok | not) and
  .damage[0].file_offset == $at and
  .damage[0].problem == \"payload hash does not match\""
damaged $((at + 33)) "(.recovery.ok | not) and
  .recovery.file_offset == $at and .damage[0].file_offset == $at"
cp "$journal" "$tmp/damaged"
flip_byte "$tmp/damaged" 100
flip_byte "$tmp/damaged" $((65536 + 100))
expect 3 vmrep inspect --json "$tmp/damaged"
json '.type == "journal" and ([.superblocks[].valid] == [false, false])'
head -c $((3 * MiB)) "$journal" >"$tmp/damaged"
expect 3 vmrep inspect "$tmp/damaged"
says 'file ends at'

# Wrong files.
: >"$tmp/empty"
expect 1 vmrep inspect "$tmp/empty"
says 'is empty'
expect 1 vmrep inspect "$tmp/d.img"
says 'neither a journal'
expect 1 vmrep inspect --json "$tmp/nothing"
json '.type == null and .error'
expect 1 vmrep inspect "$dir"
says 'is a directory'
expect 1 vmrep inspect /dev/null

# ---- Promote ----------------------------------------------------------------

kill_bg b
exec 9>&-
wait "${holders[@]}" || :
expect 0 vmrep inspect --json "$dir/vm1/epoch"
json '.kind == "backup" and .generation == 1'
cp "$dir/vm1/epoch" "$tmp/page"
flip_byte "$tmp/page" 100
expect 3 vmrep inspect "$tmp/page"
says 'checksum does not match'

cp -r "$dir" "$tmp/b2"
status "$dir"
epoch=$(jq '.vms[0].committed_epoch' <<<"$out")
before=$(checksums "$dir")
status "$dir/vm1"
[ "$before" = "$(checksums "$dir")" ] || fail 'status changed the folder'

expect 0 vmrep promote --json "$dir" vm1
json ".promoted and (.again | not) and .epoch == $epoch and .generation == 2"
json ".disks[0].image == \"$dir/vm1/disk0.img\""
next=$(jq -r '.disks[0].next' <<<"$out")
before=$(checksums "$dir")
expect 0 vmrep promote --json "$dir" vm1
json ".promoted and .again and .epoch == $epoch and .generation == 2"
expect 0 vmrep promote "$dir" vm1
says "promoted.* epoch $epoch"
[ "$before" = "$(checksums "$dir")" ] || fail 'a second promote changed it'
status "$dir"
json '.vms[0].disks[0].state == "promoted"'

# The image is what the primary acknowledged, and the command serves it.
[[ $next == "nbdkit vmrep "* ]] || fail "next: $next"
read -ra words <<<"${next#nbdkit vmrep }"
words=("${words[@]/#vm1-disk0.sock/$tmp/n.sock}")
nbdkit_vmrep n "${words[@]}"
qemu-io -r -f raw -c 'read -P 3 30M 1M' -c 'read -P 4 40M 1M' \
  "nbd+unix:///?socket=$tmp/n.sock" >/dev/null || fail 'the image is wrong'
stop_bg n

# Damage is refused.
journal=$tmp/b2/vm1/disk0.journal
at=$(vmrep inspect --json --records "$journal" |
       jq '.recovery as $r | [.records[] | select(.kind == "write" and
         .lsn >= $r.applied_lsn and .lsn < $r.committed_lsn)][0].file_offset')
flip_byte "$journal" $((at + 500))
before=$(checksums "$tmp/b2")
expect 1 vmrep promote "$tmp/b2" vm1
says 'disk0.journal: at byte'
[ "$before" = "$(checksums "$tmp/b2")" ] || fail 'a refusal changed it'
status "$tmp/b2"
json '.vms[0].disks[0].state == "damaged"'

# ---- Promote: two disks, and one whose first copy is not done ---------------

mkdir "$tmp/b3"
nbdkit_backup b3 -U "$tmp/b3.sock" dir="$tmp/b3"
for d in x y; do
  truncate -s 10M "$tmp/$d.img"
  nbdkit_vmrep "p$d" -U "$tmp/$d.sock" primary="$tmp/$d.img" vm=two \
    disk=$d epoch="$tmp/two.epoch" journal-size=8M \
    backup="nbd+unix:///?socket=$tmp/b3.sock"
done
both_protected () {
  vmrep status --json "$tmp/two.epoch" |
    jq -e '.vms[0] | .protected and (.disks | length) == 2'
}
wait_for 20 both_protected || fail 'two disks are not protected'
status "nbd+unix:///two?socket=$tmp/b3.sock"
json '[.vms[0].disks[].disk] == ["x", "y"]'
kill_bg px py

# A copy of this takes longer than it takes us to notice.
dd if=/dev/urandom of="$tmp/big.img" bs=1M count=300 status=none
nbdkit_vmrep big -U "$tmp/big.sock" primary="$tmp/big.img" vm=big \
  journal-size=8M backup="nbd+unix:///?socket=$tmp/b3.sock"
wait_for 10 test -s "$tmp/b3/big/epoch" || fail 'no copy began'
kill_bg big b3
status "$tmp/b3"
json '[.vms[] | [.vm, .disks[0].state]] ==
      [["big", "copying"], ["two", "complete"]]'
before=$(checksums "$tmp/b3")
expect 1 vmrep promote "$tmp/b3" big
says 'first copy was not finished'
[ "$before" = "$(checksums "$tmp/b3")" ] || fail 'a refusal changed it'

expect 0 vmrep promote --json "$tmp/b3" two
json '[.disks[].next | test("disk=[xy] epoch=[^ ]*/two/primary.epoch")] ==
      [true, true]'
