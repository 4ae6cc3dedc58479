#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# On a kernel of Debian 12 (older than 6.7), in a guest: the soft-dirty tracker
# reports what a process writes, and the one with userfaultfd says that it
# cannot work.
. "$(dirname "$0")/lib.sh"
requires ldd cpio
[ -z "${ASAN-}${VALGRIND-}" ] || skip 'no checker in the guest'
requires_guest

# Another root laid over the guest's own, with the test and its libraries.
root=$tmp/root
mkdir -p "$root/bin"
cp "$BUILD/unit/test-track" "$root/bin/"
ldd "$BUILD/unit/test-track" | grep -o '/[^ ]*' | while read -r lib; do
  mkdir -p "$root$(dirname "$lib")"
  cp -L "$lib" "$root$lib"
done
cat >"$root/track-init" <<'END'
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox uname -r
/bin/test-track
echo "STATUS $?"
/bin/busybox poweroff -f
END
chmod 755 "$root/track-init"
guest=${GUEST:-build/guest}
(cd "$root" && find . | cpio -o -H newc --quiet -R 0:0 |
   gzip -1 -n) >"$tmp/over"
cat "$guest/initrd" "$tmp/over" >"$tmp/initrd"

kernel=("$guest"/kernel/boot/vmlinuz-*)
start_bg guest qemu-system-x86_64 -accel tcg -cpu qemu64,+rdrand -m 256 \
  -nodefaults -no-user-config -display none -vga none -no-reboot \
  -kernel "${kernel[0]}" -initrd "$tmp/initrd" -append \
  'console=ttyS0 quiet panic=-1 mitigations=off rdinit=/track-init' \
  -serial "file:$tmp/guest.console"
wait_for 60 is_gone "${bg_pid[guest]}" || fail 'the guest does not end'
tr -d '\r' <"$tmp/guest.console" >"$tmp/said"
cat "$tmp/said"
grep -q '^STATUS 0$' "$tmp/said" || fail 'the test failed in the guest'
grep -qE '^\[ +OK \] test_soft_dirty$' "$tmp/said" ||
  skip 'the guest has no soft-dirty bits'
