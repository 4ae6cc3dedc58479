#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The backup link over TLS, with a pre-shared key and with certificates.
# Whoever has neither is refused by the backup; a primary told to use TLS does
# not talk to a backup without it.
. "$(dirname "$0")/lib.sh"
requires nbdkit nbdcopy nbdinfo qemu-io psktool certtool cmp truncate
nbdkit --dump-config | grep -qx 'tls=yes' || skip 'nbdkit has no TLS'
tmpdir

make_keys () {
  psktool -u vmrep -p "$tmp/keys.psk" >/dev/null 2>&1
  psktool -u vmrep -p "$tmp/wrong.psk" >/dev/null 2>&1
}

# An authority, a certificate for localhost, one for the primary.
make_certificates () {
  local who
  mkdir "$tmp/pki"
  cd "$tmp/pki"
  printf 'cn = test\nca\ncert_signing_key\nexpiration_days = 2\n' >ca.info
  printf 'cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\n'\
'tls_www_server\nencryption_key\nsigning_key\nexpiration_days = 2\n' \
    >server.info
  printf 'cn = primary\ntls_www_client\nencryption_key\nsigning_key\n'\
'expiration_days = 2\n' >client.info
  certtool --generate-privkey --key-type=ed25519 --outfile ca-key.pem
  certtool --generate-self-signed --load-privkey ca-key.pem \
    --template ca.info --outfile ca-cert.pem
  for who in server client; do
    certtool --generate-privkey --key-type=ed25519 --outfile $who-key.pem
    certtool --generate-certificate --load-ca-certificate ca-cert.pem \
      --load-ca-privkey ca-key.pem --load-privkey $who-key.pem \
      --template $who.info --outfile $who-cert.pem
  done
  cd "$OLDPWD"
}

make_keys
make_certificates >"$tmp/certtool.log" 2>&1 || {
  cat "$tmp/certtool.log"
  fail 'certtool'
}

said () { # NAME TEXT
  grep -q "$2" "${bg_log[$1]}"
}

start_backup () { # NBDKIT-OPTION…
  port=$(free_port)
  rm -rf "$tmp/store"
  mkdir "$tmp/store"
  nbdkit_backup backup -i 127.0.0.1 -p "$port" "$@" dir="$tmp/store"
}

start_primary () { # URI FLUSH
  rm -f "$tmp"/image* "$tmp/sock"
  truncate -s 4M "$tmp/image"
  nbdkit_vmrep primary -U "$tmp/sock" primary="$tmp/image" vm=vm \
    journal-size=8M flush="$2" backup="$1"
}

write_and_flush () { # BYTE
  timeout 20 qemu-io -f raw -c "write -P $1 4k 1M" -c flush \
    "nbd+unix:///?socket=$tmp/sock" >"$tmp/qemu-io" 2>&1 ||
    fail "$(cat "$tmp/qemu-io")"
}

# What the primary wrote has arrived, when the backup is asked over URI.
replicates () { # BYTE COMMITTED-URI
  write_and_flush "$1"
  # It is there once the first copy is complete.
  wait_for 20 nbdinfo --size "$2" || fail 'not replicated'
  nbdcopy "$2" "$tmp/copy"
  nbdcopy "nbd+unix:///?socket=$tmp/sock" "$tmp/now"
  cmp "$tmp/copy" "$tmp/now" || fail 'the backup differs'
  stop_bg primary || fail "exit status $?"
}

# This primary is not let in; it says so, goes on without, and its backup
# stays empty.
is_refused () { # URI TEXT
  start_primary "$1" local
  wait_for 10 said primary "$2" || fail "$1: no message like '$2'"
  timeout 20 qemu-io -f raw -c 'write 0 4k' \
    "nbd+unix:///?socket=$tmp/sock" >/dev/null || fail 'write'
  [ -z "$(ls "$tmp/store")" ] || fail "$1 was let in"
  kill_bg primary
  : >"${bg_log[primary]}"
}

# A pre-shared key.
start_backup --tls=require --tls-psk="$tmp/keys.psk"
start_primary "nbds://vmrep@127.0.0.1:$port/?tls-psk-file=$tmp/keys.psk" remote
replicates 0x51 "nbds://vmrep@127.0.0.1:$port/vm/disk0@committed\
?tls-psk-file=$tmp/keys.psk"
rm -rf "$tmp/store/vm"
is_refused "nbd://127.0.0.1:$port" 'require TLS'
is_refused "nbds://vmrep@127.0.0.1:$port/?tls-psk-file=$tmp/wrong.psk" \
  'gnutls_handshake'
! nbdinfo "nbd://127.0.0.1:$port/vm/disk0" >/dev/null 2>&1 ||
  fail 'a client without TLS was served'
stop_bg backup || fail "exit status $?"

# Certificates, of both sides.
start_backup --tls=require --tls-certificates="$tmp/pki" --tls-verify-peer
start_primary "nbds://localhost:$port/?tls-certificates=$tmp/pki" remote
replicates 0x52 \
  "nbds://localhost:$port/vm/disk0@committed?tls-certificates=$tmp/pki"
rm -rf "$tmp/store/vm"
is_refused "nbd://localhost:$port" 'require TLS'
# A stranger's certificate.
mv "$tmp/pki" "$tmp/pki.old"
make_certificates >/dev/null 2>&1
is_refused "nbds://localhost:$port/?tls-certificates=$tmp/pki" 'gnutls'
stop_bg backup || fail "exit status $?"

# A backup without TLS.
start_backup
is_refused "nbds://vmrep@127.0.0.1:$port/?tls-psk-file=$tmp/keys.psk" \
  'backup nbds://.*: the connection was closed\|TLS'
stop_bg backup || fail "exit status $?"
