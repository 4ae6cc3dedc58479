#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# memsync attaches to a running QEMU, finds all of its RAM, and misses no page
# that the guest changes: pc and q35, private and shared RAM, as root and not,
# sandboxed.  Whoever attaches may be killed at any moment: the guest goes on.
. "$(dirname "$0")/lib.sh"
requires nbdkit
requires_root
tmpdir
requires_guest

# start NAME QEMU-ARG…: a guest with a disk in memory, up and working.
start () {
  local name=$1
  shift
  start_bg "nbd-$name" nbdkit -f -P "$tmp/$name.pid" -U "$tmp/$name.nbd" \
    memory 64M
  wait_for 10 test -s "$tmp/$name.pid" || fail 'nbdkit did not start'
  chmod 666 "$tmp/$name.nbd"
  start_guest "$name" fresh --disk "$tmp/$name.nbd" -- "$@" \
    -qmp "unix:$tmp/$name.qmp,server=on,wait=off"
}

# on NAME COMMAND ARG…: tests/tools/track on a guest.
on () {
  local name=$1 what=$2
  shift 2
  tool track "$what" "${bg_pid[$name]}" "$tmp/$name.qmp" "$@"
}

has_block () {
  grep -qE "^block $2 [0-9]+ 0x[1-9a-f][0-9a-f]* $3\$" "$tmp/$1.blocks" ||
    fail "$1: no block '$2 … $3'"
}

check () {
  local name=$1
  on "$name" list >"$tmp/$name.blocks"
  cat "$tmp/$name.blocks"
  on "$name" check 5 60
  on "$name" check 3 30 runs
  on "$name" die "$tmp/$name.console" 20
  # Nothing is left over that would be in the way of the next one.
  on "$name" check 1 60
}

tool track probe ||
  skip 'this kernel has no asynchronous write-protection, or forbids it'
chmod 711 "$tmp"

# QEMU 9.1 has the new option, 10.0 no longer the old one.
as_nobody=(-runas nobody)
! qemu-system-x86_64 -help | grep -qE 'run-with.*user=' ||
  as_nobody=(-run-with user=nobody)

start pc -smp 2 -vga std
start q35 -machine q35,memory-backend=ram -smp 2 -vga std \
  "${as_nobody[@]}" -sandbox on -device virtio-rng-pci \
  -object memory-backend-memfd,id=ram,size=256M,share=on

wait_guest 60 pc 'ACK 1'
check pc
has_block pc pc.ram private
has_block pc '0000:00:02.0/vga.vram' private
has_block pc '/rom@etc/acpi/tables' private
kill_bg pc

wait_guest 60 q35 'ACK 1'
grep -qE '^Uid:[[:space:]]+65534' "/proc/${bg_pid[q35]}/status" ||
  fail 'q35 runs as root'
check q35
has_block q35 ram shared
has_block q35 '0000:00:01.0/vga.vram' private
kill_bg q35

# refused NAME REGEX QEMU-ARG…: memsync says no to such a QEMU, and why.
refused () {
  local name=$1 regex=$2
  shift 2
  start_bg "$name" qemu-system-x86_64 -accel tcg -S -m 16 -nodefaults \
    -display none -qmp "unix:$tmp/$name.qmp,server=on,wait=off" "$@"
  wait_for 20 test -S "$tmp/$name.qmp" || fail "$name did not start"
  on "$name" refuse >"$tmp/$name.why" || fail "$name is not refused"
  cat "$tmp/$name.why"
  grep -qE "$regex" "$tmp/$name.why" || fail "$name: not '$regex'"
  kill_bg "$name"
}

refused ivshmem '^device shm0 \(ivshmem-plain\): ' \
  -object memory-backend-memfd,id=m,size=1M,share=on \
  -device ivshmem-plain,id=shm0,memdev=m
refused incoming 'incoming migration' -incoming defer
