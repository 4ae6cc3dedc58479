#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The test guest itself tells the truth, on a disk that nothing replicates:
# after kill -9 of QEMU it finds every record that it acknowledged, goes on,
# and a disk that lost a record is called bad.
. "$(dirname "$0")/lib.sh"
requires nbdkit truncate
tmpdir
requires_guest

serve () {
  truncate -s 128M "$tmp/$1"
  start_bg "nbd-$1" nbdkit -f -P "$tmp/$1.pid" -U "$tmp/$1.sock" \
    file "$tmp/$1"
  wait_for 10 test -s "$tmp/$1.pid" || fail 'nbdkit did not start'
}

acked_at_least () {
  [ "$(last_ack "$1")" -ge "$2" ]
}

serve a
serve b
disks=(--disk "$tmp/a.sock" --disk "$tmp/b.sock,some-export")

start=${EPOCHREALTIME/[.,]/}
start_guest first fresh "${disks[@]}"
wait_guest 60 first 'ACK 1'
echo "first record after $(( (${EPOCHREALTIME/[.,]/} - start) / 1000 )) ms"
wait_for 60 acked_at_least "$tmp/first.console" 450 || fail 'too slow'
kill_bg first
grep -q '^REN ' "$tmp/first.console" || fail 'no rename'
grep -q '^TRIM [1-9]' "$tmp/first.console" || fail 'nothing trimmed'
acked=$(last_ack "$tmp/first.console")

start_guest second resume "${disks[@]}" --count 30
wait_guest 60 second 'VERIFY ok'
wait_guest 60 second 'END 0'
wait_guest_off second
resumed=$(sed -n 's/^RESUME //p' "$tmp/second.console")
echo "acknowledged $acked, found $resumed"
[ "$resumed" -ge "$acked" ] || fail 'an acknowledged record is lost'

start_guest third check "${disks[@]}"
wait_guest 60 third 'END 0'
wait_guest_off third
[ "$(grep -c '^FSCK ok ' "$tmp/third.console")" -eq 2 ] || fail 'fsck'
grep -qx "RESUME $(( resumed + 30 ))" "$tmp/third.console" ||
  fail 'the guest did not go on where it was'

# A disk of an older time beside one of now: each is well, the pair is not.
serve old
cp "$tmp/a" "$tmp/old"
start_guest fourth resume --disk "$tmp/a.sock" --count 3
wait_guest 60 fourth 'END 0'
wait_guest_off fourth
start_guest fifth check --disk "$tmp/a.sock" --disk "$tmp/old.sock"
wait_guest 60 fifth 'VERIFY bad .*'
