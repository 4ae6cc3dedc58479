#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The house rules that a machine can check: SPDX lines, no tabs in C, short lines,
# man pages and shell scripts without warnings.
. "$(dirname "$0")/lib.sh"
requires git
git rev-parse --git-dir >/dev/null 2>&1 || skip 'not a git work tree'

mapfile -t files < <(git ls-files --cached --others --exclude-standard)
bad=0
for f in "${files[@]}"; do
  [ -f "$f" ] || continue
  case $f in
    *.md | LICENSE | *.png | *.svg | *.json) continue ;;
  esac
  head -n 3 "$f" | grep -q 'SPDX-License-Identifier: BSD-3-Clause' || {
    echo "$f: no SPDX line"
    bad=1
  }
  case $f in
    *.[ch])
      ! grep -n "$(printf '\t')" "$f" /dev/null || bad=1
      ! grep -nE '^.{81,}$' "$f" /dev/null || bad=1 ;;
  esac
  ! grep -nE ' +$' "$f" /dev/null || bad=1
done

if command -v shellcheck >/dev/null; then
  mapfile -t scripts < <(grep -lE '^#!/bin/bash|^# shellcheck shell=bash' \
                           -- "${files[@]}" 2>/dev/null)
  shellcheck -S warning "${scripts[@]}" || bad=1
fi

if command -v mandoc >/dev/null; then
  for f in man/*.[1-8]; do
    [ -e "$f" ] || continue
    mandoc -T lint -W warning "$f" || bad=1
  done
fi

[ $bad -eq 0 ] || fail 'see above'
