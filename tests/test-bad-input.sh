#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Bad input: a message that names the thing, exit status 1 or an NBD errno, and
# nothing changed on disk.
. "$(dirname "$0")/lib.sh"
requires nbdkit nbdinfo nbdcopy qemu-io cmp truncate sha256sum
tmpdir
mounts=()
at_exit () {
  local m
  for m in "${mounts[@]}"; do umount "$m"; done
}

image=$tmp/image
truncate -s 8M "$image"
good=(primary="$image" backup=none vm=vm journal-size=8M)

# All files but the epoch counter, which is no record of anything; of those
# that a running server may write only the names.
contents () {
  local files
  mapfile -t files < <(find "$tmp" -type f ! -name '*.log' ! -name '*.pid' \
    ! -name said ! -name '*.epoch' ! -name epoch | sort)
  if [ ${#bg_pid[@]} -gt 0 ]; then
    echo "${files[@]}"
  else
    sha256sum "${files[@]}"
  fi
}

# start NAME ARG…: serves on $tmp/NAME.sock.
start () {
  rm -f "$tmp/$1.sock"
  nbdkit_vmrep "$1" -U "$tmp/$1.sock" "${@:2}"
}

# refuses TEXT PLUGIN ARG…: does not start, says TEXT, changes no file.
refuses () {
  local text=$1 rc=0 before
  shift
  before=$(contents)
  timeout $(( 20 * $(slower) )) \
    bash -c '. tests/lib.sh; nbdkit_fg "$@"' x "$1" -U "$tmp/none.sock" \
    "${@:2}" </dev/null >"$tmp/said" 2>&1 || rc=$?
  [ $rc -eq 1 ] || fail "exit status $rc: $* ($(cat "$tmp/said"))"
  grep -qF -- "$text" "$tmp/said" ||
    fail "does not say '$text': $* ($(cat "$tmp/said"))"
  [ "$(contents)" = "$before" ] || fail "changed a file: $*"
}

said () { # NAME TEXT
  grep -qF -- "$2" "${bg_log[$1]}"
}

io () { # SOCKET COMMAND…
  local c args=()
  for c in "${@:2}"; do args+=(-c "$c"); done
  timeout $(( 30 * $(slower) )) qemu-io -f raw "${args[@]}" \
    "nbd+unix:///?socket=$1" >"$tmp/io" 2>&1 || return 1
  ! grep -q 'failed\|Pattern verification' "$tmp/io"
}

# ---- Parameters
p () { refuses "$1" vmrep "${@:2}"; }
p 'primary=IMAGE is required' vm=vm backup=none
p 'backup=NBD-URI is required' primary="$image" vm=vm
p 'vm=NAME is required' primary="$image" backup=none
p "unknown parameter 'colour'" "${good[@]}" colour=red
p 'vm=a/b' "${good[@]}" vm=a/b
p 'vm=..' "${good[@]}" vm=..
p 'disk=' "${good[@]}" disk=
p 'node=a b' "${good[@]}" 'node=a b'
p 'journal-size=4194304' "${good[@]}" journal-size=4M
p 'could not parse' "${good[@]}" journal-size=much
p 'epoch-interval=25' "${good[@]}" epoch-interval=25
p 'epoch-interval=0ms' "${good[@]}" epoch-interval=0ms
p 'epoch-interval=-1ms' "${good[@]}" epoch-interval=-1ms
p 'epoch-interval=2h' "${good[@]}" epoch-interval=2h
p 'flush=never' "${good[@]}" flush=never
p 'flush=remote contradicts backup=none' "${good[@]}" flush=remote
p 'on-loss=solo' "${good[@]}" on-loss=solo
p 'on-loss=panic' "${good[@]}" on-loss=panic
p 'witness=' "${good[@]}" witness=etcd:x
p 'boolean (maybe)' "${good[@]}" unsafe=maybe
b () { refuses "$1" vmrep-backup "${@:2}"; }
b 'dir=DIR is required'
b "$tmp/missing" dir="$tmp/missing"
b "dir=$image: not a directory" dir="$image"
b 'sync=often' dir="$tmp" sync=often
b "unknown parameter 'colour'" dir="$tmp" colour=red

# ---- The image
p "$tmp/nothing: No such file" "${good[@]}" primary="$tmp/nothing"
p "image $tmp: Is a directory" "${good[@]}" primary="$tmp"
: >"$tmp/empty"
p "image $tmp/empty: is empty" "${good[@]}" primary="$tmp/empty"
mkfifo "$tmp/fifo"
p "image $tmp/fifo: " "${good[@]}" primary="$tmp/fifo"
rm "$tmp/fifo" "$tmp/empty"
[ ! -e "$tmp/image.journal" ] || fail 'a journal was made'

# ---- In use
start one "${good[@]}" disk=a
p "image $image: locked by another process (pid ${bg_pid[one]})" "${good[@]}"
truncate -s 8M "$tmp/other"
p "journal $image.journal: locked by another process" "${good[@]}" \
  primary="$tmp/other" journal="$image.journal"
p 'disk a of VM vm is being served by another process' "${good[@]}" \
  primary="$tmp/other" epoch="$image.epoch" disk=a
stop_bg one || fail "exit status $?"

# ---- Journals and epoch files that do not belong, or are damaged
p "belongs to disk a of VM vm, not to disk b" "${good[@]}" disk=b
p "belongs to disk a of VM vm" "${good[@]}" disk=a vm=another
truncate -s 9M "$tmp/other"
p 'is for a disk of 8388608 bytes' "${good[@]}" primary="$tmp/other" \
  journal="$image.journal" disk=a
good+=(disk=a)
p "epoch file $tmp/other: is not an epoch file" "${good[@]}" epoch="$tmp/other"
cp "$image.journal" "$tmp/saved"
cp "$image.epoch" "$tmp/saved-epoch"

spoil () { # FILE OFFSET BYTES
  printf '%b' "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
spoil "$image.epoch" 8 '\x02'
p 'is of a newer format' "${good[@]}"
cp "$tmp/saved-epoch" "$image.epoch"
start stranger "${good[@]}" vm=stranger \
  primary="$tmp/other" epoch="$tmp/stranger"
stop_bg stranger || fail "exit status $?"
p 'belongs to another VM' "${good[@]}" epoch="$tmp/stranger"
rm "$tmp/other.journal" "$tmp/stranger"

# Both superblocks, then one: which is enough.
for at in 0 65536; do spoil "$image.journal" $(( at + 100 )) 'xyz'; done
p "journal $image.journal: at byte 0: no valid superblock" "${good[@]}"
cp "$tmp/saved" "$image.journal"
truncate -s 200K "$image.journal"
p "journal $image.journal: at byte" "${good[@]}"
: >"$image.journal"
p 'too short to be a journal' "${good[@]}"
seq 40000 >"$image.journal"
p 'not a journal' "${good[@]}"
cp "$tmp/saved" "$image.journal"
tool edit-super "$image.journal" version 2
p 'format version 2, this program knows version 1' "${good[@]}"
cp "$tmp/saved" "$image.journal"
tool edit-super "$image.journal" incompat 4
p "journal $image.journal: at byte" "${good[@]}"
cp "$tmp/saved" "$image.journal"
tool edit-super "$image.journal" flags 1
p "is a backup's; run vmrep promote first" "${good[@]}"
cp "$tmp/saved" "$image.journal"
tool edit-super "$image.journal" disk-size 77
p 'is for a disk of 77 bytes' "${good[@]}"
cp "$tmp/saved" "$image.journal"

# Bytes that were committed: damage is found, and not repaired by guessing.
start one "${good[@]}"
for byte in 0x51 0x52 0x53; do
  io "$tmp/one.sock" "write -P $byte 64k 64k" flush || fail "$(cat "$tmp/io")"
  sleep 0.1
done
kill_bg one
place=$(grep -abom1 "$(printf 'Q%.0s' {1..64})" "$image.journal" | head -n1)
[ -n "$place" ] || fail 'the first write is not in the journal any more'
cp "$image.journal" "$tmp/before"
spoil "$image.journal" $(( ${place%%:*} + 1000 )) 'x'
p 'is damaged' "${good[@]}"
cp "$tmp/before" "$image.journal"
start one "${good[@]}"
io "$tmp/one.sock" "read -P 0x53 64k 64k" || fail 'undamaged, but not served'
stop_bg one || fail "exit status $?"

# ---- At the backup
store=$tmp/store
mkdir "$store"
start_backup () {
  rm -f "$tmp/backup.sock"
  nbdkit_backup backup -U "$tmp/backup.sock" dir="$store"
}
uri="nbd+unix://?socket=$tmp/backup.sock"
committed="nbd+unix:///vm/a@committed?socket=$tmp/backup.sock"
linked=("${good[@]}" backup="$uri")

# Not there yet: said, served all the same, and joined when it appears.
start one "${linked[@]}"
said one 'starting without it and trying again' || fail 'nothing said'
io "$tmp/one.sock" 'write -P 0x54 0 4k' flush || fail 'not served'
start_backup
wait_for 20 nbdinfo --size "$committed" || fail 'the backup is not found'
b "$store/vm: in use by another process (pid ${bg_pid[backup]})" dir="$store"

# Another primary of this VM: a copy of all its files, while it runs.
cp "$image" "$tmp/twin"
cp "$image.journal" "$tmp/twin.journal"
cp "$image.epoch" "$tmp/twin.epoch"
checked nbdkit
start_bg twin "${checker[@]}" nbdkit -f "$BUILD/nbdkit-vmrep-plugin.so" \
  -U "$tmp/twin.sock" "${linked[@]}" primary="$tmp/twin" node=twin
# Which reason it is depends on how far the two have parted.
wait_for 20 grep -qE 'is writing this log|does not reach back|beyond the end' \
  "${bg_log[twin]}" || fail 'a second writer got in'
io "$tmp/one.sock" 'write -P 0x55 4k 4k' flush || fail 'the first one suffers'
kill_bg twin
stop_bg one || fail "exit status $?"
nbdcopy "$committed" "$tmp/copy"
cmp "$tmp/copy" "$image" || fail 'the second writer changed the backup'
rm "$tmp"/twin "$tmp"/twin.{journal,epoch}

# Another VM of that name; another size.
p 'the backup holds another VM called vm' "${linked[@]}" \
  primary="$tmp/other"
cp "$image.epoch" "$tmp/other.epoch"
p 'disk a has 9437184 bytes here and 8388608 at the backup' "${linked[@]}" \
  primary="$tmp/other"
rm -f "$tmp"/other*

# Names that would lead out of the store.
for name in ../vm/a vm/../a vm vm/a/b .vm/a '' vm/a@ vm/a@-1 vm/a@x \
  vm/a@committed.md5 vm/nothing@committed nothing/a@committed; do
  ! nbdinfo --size "nbd+unix:///$name?socket=$tmp/backup.sock" \
    >/dev/null 2>&1 || fail "export '$name' was served"
done

# What no primary sends.
before=$(sha256sum "$store/vm/a.img")
tool bad-log "$uri" || fail 'bad-log'
is_running backup || fail 'the backup died'
[ "$(sha256sum "$store/vm/a.img")" = "$before" ] || fail 'another VM was changed'
said backup 'not a hello of version' || fail 'nothing was logged'

# The backup's journal is damaged: this VM is refused with the reason, others
# are served.
kill_bg backup
spoil "$store/vm/a.journal" 2000 x
spoil "$store/vm/a.journal" 67536 x
start_backup
said backup "$store/vm/a.journal: at byte 0: no valid superblock" ||
  fail 'the damage is not named'
! nbdinfo --size "$committed" >/dev/null 2>&1 || fail 'damage was served'
p 'the backup is damaged' "${linked[@]}"
! nbdinfo --size "nbd+unix:///bad0/disk0@committed?socket=$tmp/backup.sock" \
  >/dev/null 2>&1 || fail 'an unfinished copy was served'
tool bad-log "$uri" >/dev/null || fail 'other VMs are not served'
is_running backup || fail 'the backup died'
kill_bg backup

# ---- Disks that are full
mount_small () { # NAME SIZE
  mkdir "$tmp/$1"
  mount -t tmpfs -o size="$2" none "$tmp/$1" 2>/dev/null || {
    echo "cannot mount a small file system: full disks are not tested"
    exit 0
  }
  mounts+=("$tmp/$1")
}

# No room for the journal.
rm -f "$image".*
mount_small full 4M
refuses 'cannot create: No space left on device' vmrep "${good[@]}" \
  journal="$tmp/full/journal"
[ -z "$(ls -A "$tmp/full")" ] || fail 'something was left behind'

# No room for the image: it was sparse.  What was acknowledged is in the
# journal, is read from there, and gets into the image when there is room.
truncate -s 16M "$tmp/full/image"
big=(primary="$tmp/full/image" backup=none vm=vm journal="$tmp/journal"
     journal-size=32M epoch="$tmp/epoch")
start one "${big[@]}"
io "$tmp/one.sock" 'write -P 0x61 0 8M' flush || fail 'not acknowledged'
wait_for 20 said one 'No space left on device' || fail 'nothing was said'
io "$tmp/one.sock" 'write -P 0x62 8M 1M' flush 'read -P 0x61 0 8M' \
  'read -P 0x62 8M 1M' || fail 'what is in the journal is not served'
stop_bg one || : # it cannot end in order
mount -o remount,size=40M "$tmp/full"
start one "${big[@]}"
io "$tmp/one.sock" 'read -P 0x61 0 8M' 'read -P 0x62 8M 1M' ||
  fail 'acknowledged data is lost'
stop_bg one || fail "exit status $?"
start one "${big[@]}"
io "$tmp/one.sock" 'read -P 0x61 0 8M' || fail 'the image is wrong'
stop_bg one || fail "exit status $?"

# No room at the backup: first for its journal, then for its image.  The
# primary is told why, keeps all it acknowledged and goes on by itself.
mount_small small 2M
mkdir "$tmp/small/store"
store=$tmp/small/store
start_backup
truncate -s 64M "$tmp/wide"
wide=(primary="$tmp/wide" backup="$uri" vm=vm disk=a journal-size=8M)
start one "${wide[@]}"
wait_for 20 said one 'No space left on device' ||
  fail "the backup's reason is not told"
mount -o remount,size=20M "$tmp/small"
io "$tmp/one.sock" 'write -P 0x63 0 4M' flush || fail 'not acknowledged'
wait_for 20 nbdinfo --size "$committed" || fail 'does not go on by itself'
io "$tmp/one.sock" 'write -P 0x64 4M 8M' &
writer=$!
wait_for 20 said backup 'No space left on device' || fail 'nothing was said'
mount -o remount,size=90M "$tmp/small"
wait $writer || fail 'a write failed because the backup was full'
io "$tmp/one.sock" 'write -P 0x65 12M 16M' flush || fail 'not acknowledged'
stop_bg one || fail "exit status $?"
nbdcopy "$committed" "$tmp/copy"
cmp "$tmp/copy" "$tmp/wide" || fail 'the backup differs'
stop_bg backup || fail "exit status $?"
