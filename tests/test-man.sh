#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Manual pages, --help, --dump-plugin and the code name the same options and
# parameters.
. "$(dirname "$0")/lib.sh"
[ -z "${ASAN-}${VALGRIND-}" ] || skip 'compares texts only'

# same WHAT A B: both lists (one word a line) have the same members.
same () {
  diff <(sort -u <<<"$2") <(sort -u <<<"$3") >&2 || fail "$1"
}

# The part of a page under the heading $2 ("Ss vmrep status").
section () {
  awk -v head=".$2" '
    $0 == head { on = 1; next }
    on && /^\.S[hs] / && (/^\.Sh / || head ~ /^\.Ss /) { exit }
    on' "$1"
}

# ---- vmrep ------------------------------------------------------------------

options_in_man () {
  section man/vmrep.8 "$1" | sed -n 's/^\.It Fl -\([a-z-]*\).*/\1/p'
}

help=$(vmrep --help)
verbs=$(sed -n '/^usage/,/VERB --help/s/^  \([a-z-]\{1,\}\) .*/\1/p' <<<"$help" |
          grep -vx vmrep)
same 'verbs of --help and of vmrep.8 differ' "$verbs" \
  "$(sed -n 's/^\.Ss vmrep //p' man/vmrep.8)"
for v in $verbs; do
  same "options of $v: --help and vmrep.8 differ" \
    "$(vmrep "$v" --help | sed -n 's/^  --\([a-z-]*\).*/\1/p')" \
    "$(options_in_man "Ss vmrep $v")"
  # Options are known to the code: it complains about something else.
  for o in $(options_in_man "Ss vmrep $v"); do
    err=$(vmrep "$v" "--$o" 2>&1 >/dev/null) || :
    ! grep -q 'option' <<<"$err" || fail "$v does not take --$o: $err"
  done
  grep -q "^\.Cm $v\$" man/vmrep.8 || fail "$v is not in the synopsis"
done
same 'options without a verb' $'help\nversion' \
  "$(options_in_man 'Ss Options without a verb')"
[ "$(vmrep --version)" = "vmrep $(sed -n 's/^VERSION *= *//p' Makefile)" ] ||
  fail '--version'

# ---- The plugins ------------------------------------------------------------

for p in vmrep vmrep-backup; do
  page=man/nbdkit-$p-plugin.1
  case $p in
    vmrep) source=nbd-plugin/primary/vmrep.c ;;
    *) source=nbd-plugin/backup/vmrep-backup.c ;;
  esac
  in_man=$(section $page 'Sh PARAMETERS' |
             sed -n 's/^\.It \(Op \)\{0,1\}Cm \([a-z-]*\)=.*/\2/p')
  [ -n "$in_man" ] || fail "$page: no parameters"
  same "parameters of $p: --help and $page differ" "$in_man" \
    "$(nbdkit_fg $p --help | sed -n 's/^\[\{0,1\}\([a-z-]*\)=.*/\1/p')"
  same "parameters of $p: the code and $page differ" "$in_man" \
    "$(sed -n 's/.*strcmp (key, "\([a-z-]*\)") == 0.*/\1/p' $source)"
  for k in $in_man; do
    err=$(nbdkit_fg $p "$k=/dev/null/x" --run true 2>&1) || :
    ! grep -q 'unknown parameter' <<<"$err" || fail "$p does not know $k"
  done
  err=$(nbdkit_fg $p no-such-parameter=1 2>&1) && fail "$p takes anything"
  grep -q "unknown parameter 'no-such-parameter'" <<<"$err" || fail "$p: $err"

  dump=$(nbdkit_fg $p --dump-plugin)
  same "--dump-plugin of $p and $page differ" \
    "$(sed -n 's/^\(vmrep_[a-z_]*\)=.*/\1/p' <<<"$dump")" \
    "$(section $page 'Sh DUMP-PLUGIN OUTPUT' | sed -n 's/^\.It Li //p')"
  magic=$(sed -n 's/^magic_config_key=//p' <<<"$dump")
  grep -q "^\.It Op Cm $magic=" $page ||
    fail "$page does not say that $magic= may be left out"
done

# ---- Formats ----------------------------------------------------------------

# Each field of a structure, with its offset, is in vmrep-journal.5.
fields_in_header () {
  sed -n "/^struct $2 {/,/^}/p" "$1" |
    sed -n 's/^ .*[ *]\([a-z_0-9]*\)\(\[[A-Za-z_0-9]*\]\)\{0,1\}; *\/\* *\([0-9]\{1,\}\).*/\3 \1/p'
}
in_man=$(sed -n 's/^\.It \([0-9]*\) Ta [a-z0-9]*\(\[[0-9]*\]\)\{0,1\} Ta \([a-z_0-9]*\) Ta.*/\1 \3/p' \
           man/vmrep-journal.5)
count=0
while read -r header struct; do
  fields=$(fields_in_header "$header" "$struct")
  [ "$(wc -l <<<"$fields")" -gt 7 ] || fail "$struct: no fields found"
  while read -r f; do
    # A page needs no two names for reserved fields.
    grep -qx "${f%0}" <<<"$in_man" || grep -qx "$f" <<<"$in_man" ||
      fail "vmrep-journal.5 lacks '$f' of struct $struct"
    count=$((count + 1))
  done <<<"$fields"
done <<'LIST'
journal/format.h vr_super
journal/format.h vr_segment
journal/format.h vr_record
journal/format.h vr_status
journal/format.h vr_hello
journal/epoch.h vr_epoch_page
journal/epoch.h vr_member
LIST
[ "$count" -gt 100 ] || fail "only $count fields compared"
