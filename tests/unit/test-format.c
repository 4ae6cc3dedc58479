/* SPDX-License-Identifier: BSD-3-Clause */
/* journal/format.h: every field that is checked is checked. */
#include "util.h"

#include "journal/format.h"

#define DISK 1000000
#define LSN 65536
#define END 131072

/* ---- Sizes, hashes, names ----------------------------------------------- */

static void
test_record_size (void **state)
{
  (void) state;
  assert_int_equal (vr_record_size (0), 64);
  assert_int_equal (vr_record_size (1), 128);
  assert_int_equal (vr_record_size (64), 128);
  assert_int_equal (vr_record_size (65), 192);
  assert_int_equal (vr_record_size (VR_PAYLOAD_MAX), 64 + VR_PAYLOAD_MAX);
  assert_true (vr_record_size (UINT32_MAX) == UINT64_C (0x100000000) + 64);
}

/* Every place of a field, as the format's documentation has it. */
static void
test_layout (void **state)
{
  (void) state;
  assert_int_equal (offsetof (struct vr_super, vm_id), 24);
  assert_int_equal (offsetof (struct vr_super, sequence), 56);
  assert_int_equal (offsetof (struct vr_super, committed_epoch), 96);
  assert_int_equal (offsetof (struct vr_super, epoch_limit), 144);
  assert_int_equal (offsetof (struct vr_super, vm), 160);
  assert_int_equal (offsetof (struct vr_super, reserved), 288);
  assert_int_equal (offsetof (struct vr_super, checksum), 4088);
  assert_int_equal (offsetof (struct vr_segment, salt), 48);
  assert_int_equal (offsetof (struct vr_segment, checksum), 120);
  assert_int_equal (offsetof (struct vr_record, payload_size), 56);
  assert_int_equal (offsetof (struct vr_record, flags), 62);
  assert_int_equal (offsetof (struct vr_status, session), 136);
  assert_int_equal (offsetof (struct vr_status, waiting_for), 800);
  assert_int_equal (offsetof (struct vr_status, checksum), 4088);
  assert_int_equal (offsetof (struct vr_hello, session), 96);
  assert_int_equal (offsetof (struct vr_hello, reserved), 296);
  assert_int_equal (offsetof (struct vr_hello, checksum), 4088);
}

static void
test_names (void **state)
{
  static const char *const good[] = { "a", "vm1", "A.b-c_9", "0", "_x" };
  static const char *const bad[]
      = { "", ".", "..", ".a", "-a", "a/b", "a b", "a@b", "\xc3\xa4", "a\n" };
  char name[VR_NAME_SIZE + 1];

  (void) state;
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
    assert_true (vr_name_ok (good[i]));
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
    assert_false (vr_name_ok (bad[i]));
  memset (name, 'x', sizeof name);
  name[VR_NAME_SIZE - 1] = 0;
  assert_true (vr_name_ok (name));
  name[VR_NAME_SIZE - 1] = 'x';
  name[VR_NAME_SIZE] = 0;
  assert_false (vr_name_ok (name));
}

static void
test_kind_names (void **state)
{
  (void) state;
  assert_string_equal (vr_kind_name (VR_WRITE), "write");
  assert_string_equal (vr_kind_name (VR_LAYOUT), "layout");
  assert_string_equal (vr_kind_name (0), "?");
  assert_string_equal (vr_kind_name (11), "?");
  assert_string_equal (vr_kind_name (UINT32_MAX), "?");
}

/* The chain depends on every byte of the header but the hash itself, and on
   what was before. */
static void
test_chain (void **state)
{
  uint64_t rng = seeded (1);
  struct vr_record r;
  uint64_t chain;

  (void) state;
  fill_random (&rng, &r, sizeof r);
  chain = vr_record_chain (&r, 7);
  for (int bit = 0; bit < 64; bit++)
    assert_true (chain != vr_record_chain (&r, 7 ^ UINT64_C (1) << bit));
  for (size_t i = 0; i < sizeof r; i++) {
    uint8_t *byte = (uint8_t *) &r + i;

    *byte ^= 1;
    assert_int_equal (vr_record_chain (&r, 7) == chain, i < sizeof r.hash);
    *byte ^= 1;
  }
  assert_true (vr_payload_hash ("ab", 2) != vr_payload_hash ("ac", 2));
  assert_true (vr_payload_hash ("ab", 2) != vr_payload_hash ("ab", 1));
}

static void
test_block (void **state)
{
  uint8_t block[VR_BLOCK];
  uint64_t rng = seeded (2);

  (void) state;
  fill_random (&rng, block, sizeof block);
  memcpy (block, "vmrepXYZ", 8);
  assert_false (vr_block_ok (block, "vmrepXYZ"));
  vr_block_seal (block);
  assert_true (vr_block_ok (block, "vmrepXYZ"));
  assert_false (vr_block_ok (block, "vmrepXYA"));
  for (size_t i = 0; i < sizeof block; i++) {
    block[i] ^= 0x10;
    assert_false (vr_block_ok (block, "vmrepXYZ"));
    block[i] ^= 0x10;
  }
}

/* ---- Superblock --------------------------------------------------------- */

static struct vr_super
good_super (void)
{
  struct vr_super s = {
    .version = VR_VERSION, .flags = VR_LOG_BACKUP | VR_LOG_COPYING,
    .sequence = 5, .generation = 1, .disk_size = DISK,
    .segment_size = 65536, .segment_count = 16,
    .committed_epoch = 9, .committed_lsn = 131072 + 4096,
    .applied_epoch = 8, .applied_lsn = 131072, .epoch_limit = 10,
    .vm = "vm", .disk = "d",
  };

  memcpy (s.magic, VR_SUPER_MAGIC, 8);
  return s;
}

static int
check (struct vr_super s)
{
  vr_block_seal (&s);
  return vr_super_check (&s);
}

/* good_super with one field changed. */
#define SUPER_WITH(field, value)                                              \
  ({                                                                          \
    struct vr_super s_ = good_super ();                                       \
    s_.field = (value);                                                       \
    check (s_);                                                               \
  })

static void
test_super_geometry (void **state)
{
  (void) state;
  assert_int_equal (check (good_super ()), 0);
  assert_int_equal (SUPER_WITH (segment_size, 0), -EUCLEAN);
  assert_int_equal (SUPER_WITH (segment_size, 4096), -EUCLEAN);
  assert_int_equal (SUPER_WITH (segment_size, 8192), 0);
  assert_int_equal (SUPER_WITH (segment_size, 8192 + 64), -EUCLEAN);
  assert_int_equal (SUPER_WITH (segment_size, 2 * VR_SEGMENT_MAX), -EUCLEAN);
  assert_int_equal (SUPER_WITH (segment_count, VR_SEGMENTS_MIN - 1),
                    -EUCLEAN);
  assert_int_equal (SUPER_WITH (segment_count, VR_SEGMENTS_MIN), 0);
  assert_int_equal (SUPER_WITH (segment_count, VR_SEGMENTS_MAX), 0);
  assert_int_equal (SUPER_WITH (segment_count, VR_SEGMENTS_MAX + 1),
                    -EUCLEAN);
  assert_int_equal (SUPER_WITH (segment_count, UINT64_MAX), -EUCLEAN);
  assert_int_equal (SUPER_WITH (disk_size, 0), 0);
  assert_int_equal (SUPER_WITH (disk_size, VR_LSN_MAX), -EUCLEAN);
}

static void
test_super_positions (void **state)
{
  (void) state;
  assert_int_equal (SUPER_WITH (applied_lsn, 65536), 0);
  assert_int_equal (SUPER_WITH (applied_lsn, 65536 - 64), -EUCLEAN);
  assert_int_equal (SUPER_WITH (applied_lsn, 0), -EUCLEAN);
  assert_int_equal (SUPER_WITH (applied_lsn, 131072 + 4096), 0);
  assert_int_equal (SUPER_WITH (applied_lsn, 131072 + 4160), -EUCLEAN);
  assert_int_equal (SUPER_WITH (applied_lsn, 131072 + 1), -EUCLEAN);
  assert_int_equal (SUPER_WITH (committed_lsn, 131072 - 64), -EUCLEAN);
  assert_int_equal (SUPER_WITH (committed_lsn, 131072 + 65), -EUCLEAN);
  assert_int_equal (SUPER_WITH (committed_lsn, VR_LSN_MAX), -EUCLEAN);
  assert_int_equal (SUPER_WITH (committed_epoch, 7), -EUCLEAN);
  assert_int_equal (SUPER_WITH (applied_epoch, 10), -EUCLEAN);
  assert_int_equal (SUPER_WITH (epoch_limit, 9), -EUCLEAN);
  assert_int_equal (SUPER_WITH (epoch_limit, 0), -EUCLEAN);
  assert_int_equal (SUPER_WITH (epoch_limit, UINT64_MAX), -EUCLEAN);
}

static void
test_super_features (void **state)
{
  struct vr_super s = good_super ();

  (void) state;
  assert_int_equal (SUPER_WITH (version, 0), -EPROTO);
  assert_int_equal (SUPER_WITH (version, VR_VERSION + 1), -EPROTO);
  assert_int_equal (SUPER_WITH (incompat, 1), -EPROTO);
  assert_int_equal (SUPER_WITH (compat, UINT32_MAX), 0);
  assert_int_equal (SUPER_WITH (flags, VR_LOG_FLAGS), 0);
  assert_int_equal (SUPER_WITH (flags, VR_LOG_FLAGS + 1), -EPROTO);
  assert_int_equal (SUPER_WITH (copied, 1), -EUCLEAN);
  assert_int_equal (SUPER_WITH (reserved[0], 1), -EUCLEAN);
  assert_int_equal (SUPER_WITH (reserved[sizeof s.reserved - 1], 1),
                    -EUCLEAN);
  assert_int_equal (SUPER_WITH (magic[7], 'X'), -EBADMSG);
  memset (s.vm, 'x', sizeof s.vm);
  assert_int_equal (check (s), -EUCLEAN);
  s = good_super ();
  memset (s.disk, 'x', sizeof s.disk);
  assert_int_equal (check (s), -EUCLEAN);
}

static void
test_super_damage (void **state)
{
  struct vr_super s = good_super ();

  (void) state;
  vr_block_seal (&s);
  for (size_t i = 0; i < sizeof s; i++) {
    ((uint8_t *) &s)[i] ^= 0x80;
    assert_int_equal (vr_super_check (&s), -EBADMSG);
    ((uint8_t *) &s)[i] ^= 0x80;
  }
  assert_int_equal (vr_super_check (&s), 0);
}

/* ---- Segment ------------------------------------------------------------ */

static const uint8_t log_id[16] = "0123456789abcde";

static bool
segment_ok (struct vr_segment s)
{
  vr_segment_seal (&s);
  return vr_segment_ok (&s, log_id, LSN);
}

#define SEGMENT_WITH(field, value)                                            \
  ({                                                                          \
    struct vr_segment s_ = good_segment ();                                   \
    s_.field = (value);                                                       \
    segment_ok (s_);                                                          \
  })

static struct vr_segment
good_segment (void)
{
  struct vr_segment s = { .version = VR_VERSION, .lsn = LSN,
                          .prev_chain = 42, .salt = "salt" };

  memcpy (s.magic, VR_SEGMENT_MAGIC, 8);
  memcpy (s.log_id, log_id, 16);
  return s;
}

static void
test_segment (void **state)
{
  struct vr_segment s = good_segment ();

  (void) state;
  assert_true (segment_ok (s));
  assert_true (SEGMENT_WITH (prev_chain, 43));
  assert_true (SEGMENT_WITH (salt[0], 43));
  assert_false (SEGMENT_WITH (magic[0], 'x'));
  assert_false (SEGMENT_WITH (version, VR_VERSION + 1));
  assert_false (SEGMENT_WITH (reserved0, 1));
  assert_false (SEGMENT_WITH (log_id[15], 1));
  assert_false (SEGMENT_WITH (lsn, LSN + 65536));
  assert_false (SEGMENT_WITH (reserved[0], 1));
  assert_false (SEGMENT_WITH (reserved[55], 1));
  vr_segment_seal (&s);
  for (size_t i = 0; i < sizeof s; i++) {
    ((uint8_t *) &s)[i] ^= 4;
    assert_false (vr_segment_ok (&s, log_id, LSN));
    ((uint8_t *) &s)[i] ^= 4;
  }
}

/* ---- Record ------------------------------------------------------------- */

static struct vr_record
good_record (unsigned kind)
{
  struct vr_record r = { .lsn = LSN, .epoch = 5, .generation = 1,
                         .kind = (uint16_t) kind };

  if (kind == VR_WRITE || kind == VR_ZERO || kind == VR_TRIM) {
    r.offset = 1000;
    r.length = 512;
  }
  if (kind == VR_WRITE) {
    r.payload_size = 512;
    r.payload_hash = 99;
  }
  return r;
}

static bool
possible (struct vr_record r)
{
  return vr_record_problem (&r, LSN, END, DISK) == NULL;
}

#define RECORD_WITH(kind, field, value)                                       \
  ({                                                                          \
    struct vr_record r_ = good_record (kind);                                 \
    r_.field = (value);                                                       \
    possible (r_);                                                            \
  })

static void
test_record_any (void **state)
{
  (void) state;
  for (unsigned kind = 0; kind < 70000; kind = kind < 20 ? kind + 1
                                                         : kind * 3) {
    const bool known = kind >= VR_PAD && kind <= VR_SEAL;

    if (kind > UINT16_MAX)
      break;
    assert_int_equal (possible (good_record (kind)), known);
    assert_false (RECORD_WITH (kind, lsn, LSN + 64));
    assert_false (RECORD_WITH (kind, flags, 2));
    assert_false (RECORD_WITH (kind, flags, 0x8000));
    assert_int_equal (RECORD_WITH (kind, epoch, VR_EPOCH_MAX - 1), known);
    assert_false (RECORD_WITH (kind, epoch, VR_EPOCH_MAX));
    assert_false (RECORD_WITH (kind, epoch, UINT64_MAX));
    assert_int_equal (RECORD_WITH (kind, generation, 77), known);
  }
}

static void
test_record_write (void **state)
{
  struct vr_record r = good_record (VR_WRITE);

  (void) state;
  assert_true (RECORD_WITH (VR_WRITE, flags, VR_RECORD_COPY));
  assert_false (RECORD_WITH (VR_WRITE, payload_size, 511));
  assert_false (RECORD_WITH (VR_WRITE, length, 513));
  assert_false (RECORD_WITH (VR_WRITE, length, UINT64_C (1) << 32 | 512));
  r.length = r.payload_size = 0;
  assert_false (possible (r));
  r.length = r.payload_size = VR_PAYLOAD_MAX;
  assert_null (vr_record_problem (&r, LSN, UINT64_C (1) << 30, DISK));
  r.length = r.payload_size = VR_PAYLOAD_MAX + 1;
  assert_non_null (vr_record_problem (&r, LSN, UINT64_C (1) << 30, DISK));
  r.length = r.payload_size = END - LSN - 64;
  assert_true (possible (r));
  r.length = ++r.payload_size;
  assert_false (possible (r));
}

static void
test_record_range (void **state)
{
  static const unsigned kinds[] = { VR_WRITE, VR_ZERO, VR_TRIM };

  (void) state;
  for (size_t i = 0; i < 3; i++) {
    const unsigned k = kinds[i];

    assert_true (RECORD_WITH (k, offset, DISK - 512));
    assert_false (RECORD_WITH (k, offset, DISK - 511));
    assert_false (RECORD_WITH (k, offset, DISK));
    assert_false (RECORD_WITH (k, offset, UINT64_MAX));
    assert_false (RECORD_WITH (k, offset, UINT64_MAX - 511));
    assert_false (RECORD_WITH (k, length, 0));
    if (k == VR_WRITE)
      continue;
    assert_true (RECORD_WITH (k, length, DISK - 1000));
    assert_false (RECORD_WITH (k, length, DISK - 999));
    assert_false (RECORD_WITH (k, length, UINT64_MAX));
    assert_false (RECORD_WITH (k, payload_size, 64));
    assert_false (RECORD_WITH (k, payload_hash, 1));
  }
}

static void
test_record_pad_and_seal (void **state)
{
  (void) state;
  assert_true (RECORD_WITH (VR_PAD, payload_size, END - LSN - 64));
  assert_false (RECORD_WITH (VR_PAD, payload_size, END - LSN - 63));
  assert_false (RECORD_WITH (VR_PAD, payload_size, UINT32_MAX));
  assert_false (RECORD_WITH (VR_PAD, offset, 1));
  assert_false (RECORD_WITH (VR_PAD, length, 1));
  assert_false (RECORD_WITH (VR_PAD, payload_hash, 1));
  assert_false (RECORD_WITH (VR_PAD, flags, VR_RECORD_COPY));

  assert_true (RECORD_WITH (VR_SEAL, offset, UINT64_MAX));
  assert_true (RECORD_WITH (VR_SEAL, length, UINT64_MAX));
  assert_false (RECORD_WITH (VR_SEAL, payload_size, 1));
  assert_false (RECORD_WITH (VR_SEAL, payload_hash, 1));
  assert_false (RECORD_WITH (VR_SEAL, flags, VR_RECORD_COPY));
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_record_size),
    cmocka_unit_test (test_layout),
    cmocka_unit_test (test_names),
    cmocka_unit_test (test_kind_names),
    cmocka_unit_test (test_chain),
    cmocka_unit_test (test_block),
    cmocka_unit_test (test_super_geometry),
    cmocka_unit_test (test_super_positions),
    cmocka_unit_test (test_super_features),
    cmocka_unit_test (test_super_damage),
    cmocka_unit_test (test_segment),
    cmocka_unit_test (test_record_any),
    cmocka_unit_test (test_record_write),
    cmocka_unit_test (test_record_range),
    cmocka_unit_test (test_record_pad_and_seal),
  };

  return cmocka_run_group_tests_name ("format", tests, NULL, NULL);
}
