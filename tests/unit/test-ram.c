/* SPDX-License-Identifier: BSD-3-Clause */
/* memsync/ram.h: what QEMU prints is understood, or refused.  (That blocks are
   found in a real QEMU is shown by tests/test-memory-tracking.sh.) */
#include "util.h"

#include "memsync/delta.h"
#include "memsync/ram.h"

/* QEMU 7.2.22, pc, -vga std. */
static const char table_72[]
  = "              Block Name    PSize              Offset               Used "
    "             Total\n"
    "                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 "
    "0x0000000008000000\r\n"
    "   0000:00:02.0/vga.vram    4 KiB  0x0000000008080000 0x0000000001000000 "
    "0x0000000001000000\r\n"
    "    /rom@etc/acpi/tables    2 MiB  0x0000000009100000 0x0000000000020000 "
    "0x0000000000200000\r\n"
    "0000:00:03.0/virtio-net-pci.rom    4 KiB  0x00000000090c0000 "
    "0x0000000000040000 0x0000000000040000\r\n";

/* The form since QEMU 8.1 (softmmu/physmem.c, ram_block_format). */
static const char table_81[]
  = "              Block Name    PSize              Offset               Used "
    "             Total                HVA  RO\n"
    "                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 "
    "0x0000000008000000 0x00007f6063e00000  rw\n"
    "             a name, wide    1 GiB  0x0000000008080000 "
    "0x0000000040000000 0x0000000040000000 0x00007f5c40000000  ro\n";

static struct vr_ram
parse (const char *text)
{
  struct vr_problem problem = { "" };
  struct vr_ram ram;

  if (vr_ram_parse_blocks (text, &ram, &problem) < 0)
    fail_msg ("%s", problem.text);
  return ram;
}

static void
test_blocks_72 (void **state)
{
  struct vr_ram ram = parse (table_72);

  (void) state;
  assert_int_equal (ram.count, 4);
  assert_string_equal (ram.blocks[0].name, "pc.ram");
  assert_int_equal (ram.blocks[0].size, 128 << 20);
  assert_int_equal (ram.blocks[0].page_size, 4096);
  assert_int_equal (ram.blocks[0].address, 0);
  assert_string_equal (ram.blocks[1].name, "0000:00:02.0/vga.vram");
  assert_string_equal (ram.blocks[2].name, "/rom@etc/acpi/tables");
  assert_int_equal (ram.blocks[2].used, 0x20000);
  assert_int_equal (ram.blocks[2].size, 0x200000);
  assert_int_equal (ram.blocks[2].page_size, 2 << 20);
  assert_string_equal (ram.blocks[3].name, "0000:00:03.0/virtio-net-pci.rom");
  vr_ram_free (&ram);
}

static void
test_blocks_81 (void **state)
{
  struct vr_ram ram = parse (table_81);

  (void) state;
  assert_int_equal (ram.count, 2);
  assert_string_equal (ram.blocks[0].name, "pc.ram");
  assert_true (ram.blocks[0].address == UINT64_C (0x7f6063e00000));
  assert_string_equal (ram.blocks[1].name, "a name, wide");
  assert_true (ram.blocks[1].address == UINT64_C (0x7f5c40000000));
  assert_int_equal (ram.blocks[1].page_size, 1 << 30);
  vr_ram_free (&ram);
}

static void
refuse_table (const char *line, int expected)
{
  struct vr_problem problem = { "" };
  struct vr_ram ram;
  char text[1024];

  snprintf (text, sizeof text, "Block Name and so on\n%s\n", line);
  assert_int_equal (vr_ram_parse_blocks (text, &ram, &problem), expected);
  assert_true (problem.text[0] != 0);
  vr_ram_free (&ram);
}

static void
test_bad_blocks (void **state)
{
  struct vr_ram ram;
  char name[400];

  (void) state;
  assert_int_equal (vr_ram_parse_blocks ("", &ram, NULL), -EPROTO);
  vr_ram_free (&ram);
  assert_int_equal (vr_ram_parse_blocks ("no such command\n", &ram, NULL),
                    -EPROTO);
  vr_ram_free (&ram);
  refuse_table ("", -EPROTO);
  refuse_table ("x", -EPROTO);
  refuse_table ("ro", -EPROTO);
  refuse_table ("0x0 0x1000 0x1000", -EPROTO);
  refuse_table ("a 4 XiB 0x0 0x1000 0x1000", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x1000 0x1000 0x1000", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x1000 0x1001", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x2000 0x1000", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x1000 0xffffffffffffffff", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x0 0x3000000000000000", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x1000 0x1000 0x123 rw", -EPROTO);
  refuse_table ("a 4 KiB 0x0 0x1000 0x1000 0x7ffffffffffff000 rw", -EPROTO);
  refuse_table ("  4 KiB 0x0 0x1000 0x1000", -ENODEV);
  memset (name, 'n', sizeof name);
  snprintf (name + 300, 100, " 4 KiB 0x0 0x1000 0x1000");
  refuse_table (name, -EPROTO);
}

static void
test_ranges (void **state)
{
  static const char tree[]
    = "FlatView #0\r\n"
      " AS \"memory\", root: system\r\n"
      " Root memory region: system\r\n"
      "  0000000000000000-000000000009ffff (prio 0, ram): pc.ram\r\n"
      "  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\r\n"
      "  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram "
      "@00000000000c0000\r\n"
      "  0000000100000000-000000013fffffff (prio 0, ram): pc.ram "
      "@00000000c0000000 KVM\r\n"
      "  00000000fd000000-00000000fdffffff (prio 1, ramd): 0000:00:05.0 BAR "
      "0 mmaps[0]\r\n"
      "  00000000ffc00000-00000000ffffffff (prio 0, romd): system.flash0 "
      "KVM\r\n";
  const char *p = tree;
  struct vr_ram_range r;

  (void) state;
  assert_true (vr_ram_next_range (&p, &r));
  assert_string_equal (r.name, "pc.ram");
  assert_int_equal (r.offset, 0);
  assert_true (vr_ram_next_range (&p, &r));
  assert_int_equal (r.guest_address, 0xc0000);
  assert_int_equal (r.offset, 0xc0000);
  assert_true (vr_ram_next_range (&p, &r));
  assert_string_equal (r.name, "pc.ram");
  assert_true (r.guest_address == UINT64_C (0x100000000));
  assert_true (r.offset == 0xc0000000);
  assert_true (vr_ram_next_range (&p, &r));
  assert_string_equal (r.name, "system.flash0");
  assert_int_equal (r.offset, 0);
  assert_false (vr_ram_next_range (&p, &r));
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_blocks_72),
    cmocka_unit_test (test_blocks_81),
    cmocka_unit_test (test_bad_blocks),
    cmocka_unit_test (test_ranges),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
