/* SPDX-License-Identifier: BSD-3-Clause */
/* memsync/delta.h: what is encoded comes back, in every mode and whatever
   happens in between; what is malformed is refused and changes nothing.

   VMREP_SEED=n replays the property test of one seed. */
#include "util.h"

#include <lz4.h>

#include "memsync/delta.h"

#define BLOCKS 3

static const uint64_t block_pages[BLOCKS] = { 300, 1, 77 };
static const struct vr_ram_layout layout = { BLOCKS, block_pages };

/* A guest, the log, and a backup. */
struct pair {
  uint8_t *guest[BLOCKS];
  uint8_t *backup[BLOCKS];
  struct vr_encoder *encoder;
  uint8_t *log; /* payloads, each after its size */
  size_t log_size;
  int emit_error;
};

static uint8_t scratch[VR_DELTA_BODY_MAX];

static int
keep (void *opaque, const void *payload, uint32_t size)
{
  struct pair *p = opaque;

  if (p->emit_error)
    return p->emit_error;
  assert_true (size <= VR_PAYLOAD_MAX);
  p->log = realloc (p->log, p->log_size + sizeof size + size);
  assert_non_null (p->log);
  memcpy (p->log + p->log_size, &size, sizeof size);
  memcpy (p->log + p->log_size + sizeof size, payload, size);
  p->log_size += sizeof size + size;
  return 0;
}

static void
open_pair (struct pair *p, enum vr_shadow shadow, bool lz4)
{
  const struct vr_delta_config config = { shadow, lz4, keep, p };

  memset (p, 0, sizeof *p);
  for (unsigned i = 0; i < BLOCKS; i++) {
    p->guest[i] = calloc (block_pages[i], VR_PAGE_SIZE);
    p->backup[i] = malloc (block_pages[i] * VR_PAGE_SIZE);
    assert_non_null (p->guest[i]);
    assert_non_null (p->backup[i]);
    /* The backup's image starts as anything. */
    memset (p->backup[i], 0x5a, block_pages[i] * VR_PAGE_SIZE);
  }
  assert_int_equal (vr_encoder_new (&layout, &config, &p->encoder), 0);
}

static void
close_pair (struct pair *p)
{
  for (unsigned i = 0; i < BLOCKS; i++) {
    free (p->guest[i]);
    free (p->backup[i]);
  }
  vr_encoder_free (p->encoder);
  free (p->log);
}

static int
decode_into (uint8_t *const *image, const void *payload, uint32_t size)
{
  const struct vr_delta_apply apply
    = { vr_delta_write_mapped, vr_delta_zero_mapped, (void *) image };

  return vr_delta_decode (payload, size, &layout, scratch, &apply);
}

/* Apply the log's bytes before `end`. */
static void
apply_log (struct pair *p, size_t end)
{
  uint32_t size;

  for (size_t at = 0; at < end; at += sizeof size + size) {
    memcpy (&size, p->log + at, sizeof size);
    assert_int_equal (
      decode_into (p->backup, p->log + at + sizeof size, size), 0);
  }
}

static void
assert_same (const struct pair *p)
{
  for (unsigned i = 0; i < BLOCKS; i++)
    assert_memory_equal (p->guest[i], p->backup[i],
                         block_pages[i] * VR_PAGE_SIZE);
}

static void
send_all (struct pair *p)
{
  for (uint32_t i = 0; i < BLOCKS; i++)
    assert_int_equal (vr_encoder_pages (p->encoder, i, 0, block_pages[i],
                                        p->guest[i]),
                      0);
  assert_int_equal (vr_encoder_flush (p->encoder), 0);
}

/* ---- Round trips -------------------------------------------------------- */

/* Change some of a page, in one of the ways that a guest does. */
static void
scribble (uint64_t *rng, uint8_t *page)
{
  const unsigned way = (unsigned) below (rng, 7);

  switch (way) {
  case 0: /* written, but not changed */
    break;
  case 1:
    memset (page, 0, VR_PAGE_SIZE);
    break;
  case 2:
    fill_random (rng, page, VR_PAGE_SIZE);
    break;
  case 3: /* a run of words at either end, or all: 255 and 256 matter */
    memset (page + (chance (rng, 50) ? 0 : VR_PAGE_SIZE - 2048),
            (int) below (rng, 256), 2032 + below (rng, 3) * 8);
    break;
  case 4: /* every second word */
    for (unsigned i = 0; i < VR_PAGE_WORDS; i += 2)
      page[i * 8] ^= (uint8_t) (1 + below (rng, 255));
    break;
  default: /* a few bytes anywhere */
    for (uint64_t n = 1 + below (rng, 20); n > 0; n--)
      page[below (rng, VR_PAGE_SIZE)] ^= (uint8_t) (1 + below (rng, 255));
  }
}

static void
send_dirty_run (struct pair *p, uint64_t *rng)
{
  const uint32_t block = (uint32_t) below (rng, BLOCKS);
  const uint64_t first = below (rng, block_pages[block]);
  uint64_t pages = 1 + below (rng, 40);

  if (pages > block_pages[block] - first)
    pages = block_pages[block] - first;
  for (uint64_t i = first; i < first + pages; i++)
    scribble (rng, p->guest[block] + i * VR_PAGE_SIZE);
  assert_int_equal (vr_encoder_pages (p->encoder, block, first, pages,
                                      p->guest[block] + first * VR_PAGE_SIZE),
                    0);
}

/* After each epoch the backup has the guest's memory; a backup that applies a
   part of the log, dies and applies all of it again, has it too. */
static void
play (uint64_t seed, enum vr_shadow shadow, bool lz4)
{
  uint64_t rng = seeded (seed);
  struct vr_delta_stats s;
  struct pair p;

  open_pair (&p, shadow, lz4);
  send_all (&p);
  for (unsigned epoch = 0; epoch < 12; epoch++) {
    for (unsigned runs = (unsigned) below (&rng, 12); runs > 0; runs--)
      send_dirty_run (&p, &rng);
    if (chance (&rng, 10)) {
      vr_encoder_forget (p.encoder);
      send_all (&p);
    }
    assert_int_equal (vr_encoder_flush (p.encoder), 0);
    if (chance (&rng, 60)) {
      apply_log (&p, p.log_size);
      apply_log (&p, p.log_size);
      assert_same (&p);
      p.log_size = 0;
    }
  }
  apply_log (&p, p.log_size);
  assert_same (&p);
  vr_encoder_stats (p.encoder, &s);
  assert_int_equal (s.pages, s.unchanged + s.zero + s.whole + s.words);
  close_pair (&p);
}

static void
test_property (void **state)
{
  const uint64_t only = env_number ("VMREP_SEED", 0);
  const uint64_t first = only ? only : 1, last = only ? only : 20;

  (void) state;
  for (uint64_t seed = first; seed <= last; seed++) {
    print_message ("seed %llu\n", (unsigned long long) seed);
    for (int shadow = VR_SHADOW_NONE; shadow <= VR_SHADOW_FULL; shadow++) {
      play (seed, (enum vr_shadow) shadow, false);
      play (seed, (enum vr_shadow) shadow, true);
    }
  }
}

/* ---- What is sent ------------------------------------------------------- */

static struct vr_delta_stats
stats_of (const struct pair *p)
{
  struct vr_delta_stats s;

  vr_encoder_stats (p->encoder, &s);
  return s;
}

static uint64_t
bytes_to_send (struct pair *p)
{
  const uint64_t before = stats_of (p).payload_bytes;

  send_all (p);
  return stats_of (p).payload_bytes - before;
}

static void
test_sizes (void **state)
{
  uint64_t rng = seeded (7);
  struct pair p;

  (void) state;
  open_pair (&p, VR_SHADOW_FULL, false);
  /* Zeros: a header and one entry for each block. */
  assert_int_equal (bytes_to_send (&p), BLOCKS * (32 + 16));
  assert_int_equal (bytes_to_send (&p), 0);
  /* The last byte: header, entry, three skips, word. */
  p.guest[2][5 * VR_PAGE_SIZE + 4095] = 1;
  assert_int_equal (bytes_to_send (&p), 32 + 16 + 3 * 2 + 8);
  /* Two neighbours, whole. */
  fill_random (&rng, p.guest[2], 2 * VR_PAGE_SIZE);
  assert_int_equal (bytes_to_send (&p), 32 + 16 + 2 * VR_PAGE_SIZE);
  close_pair (&p);

  open_pair (&p, VR_SHADOW_HASH, false);
  send_all (&p);
  assert_int_equal (bytes_to_send (&p), 0);
  p.guest[1][0] = 1;
  assert_int_equal (bytes_to_send (&p), 32 + 16 + VR_PAGE_SIZE);
  close_pair (&p);
}

static void
test_counters_are_small (void **state)
{
  struct pair p;
  uint64_t sent;

  (void) state;
  open_pair (&p, VR_SHADOW_FULL, false);
  send_all (&p);
  for (unsigned i = 0; i < block_pages[0] * VR_PAGE_SIZE; i += 256)
    p.guest[0][i]++;
  sent = bytes_to_send (&p);
  assert_true (sent * 20 < block_pages[0] * VR_PAGE_SIZE); /* 5 % */
  close_pair (&p);
}

static void
test_lz4 (void **state)
{
  struct pair plain, packed;

  (void) state;
  open_pair (&plain, VR_SHADOW_NONE, false);
  open_pair (&packed, VR_SHADOW_NONE, true);
  for (unsigned i = 0; i < 300 * VR_PAGE_SIZE; i++)
    plain.guest[0][i] = packed.guest[0][i] = (uint8_t) (i / 97);
  assert_true (bytes_to_send (&packed) * 4 < bytes_to_send (&plain));
  apply_log (&packed, packed.log_size);
  assert_same (&packed);
  close_pair (&plain);
  close_pair (&packed);
}

/* ---- Errors ------------------------------------------------------------- */

static void
test_emit_fails (void **state)
{
  struct pair p;

  (void) state;
  open_pair (&p, VR_SHADOW_FULL, false);
  send_all (&p);
  p.guest[0][0] = 1;
  p.emit_error = -ENOSPC;
  assert_int_equal (vr_encoder_pages (p.encoder, 0, 0, 1, p.guest[0]), 0);
  assert_int_equal (vr_encoder_flush (p.encoder), -ENOSPC);
  p.emit_error = 0;
  /* The change is in the shadow but not in the log: nothing may be sent on
     top of it. */
  assert_int_equal (vr_encoder_pages (p.encoder, 0, 0, 1, p.guest[0]),
                    -ECANCELED);
  assert_int_equal (vr_encoder_flush (p.encoder), -ECANCELED);
  vr_encoder_forget (p.encoder);
  send_all (&p);
  apply_log (&p, p.log_size);
  assert_same (&p);
  close_pair (&p);
}

static void
test_encode_limits (void **state)
{
  static uint64_t too_many[] = { VR_RAM_PAGES_MAX + 1 };
  const struct vr_ram_layout big = { 1, too_many };
  const struct vr_delta_config config = { VR_SHADOW_NONE, false, keep, NULL };
  struct vr_encoder *e;
  struct pair p;

  (void) state;
  assert_int_equal (vr_encoder_new (&big, &config, &e), -EINVAL);
  open_pair (&p, VR_SHADOW_HASH, false);
  assert_int_equal (vr_encoder_pages (p.encoder, 3, 0, 1, p.guest[0]),
                    -ERANGE);
  assert_int_equal (vr_encoder_pages (p.encoder, 1, 1, 1, p.guest[0]),
                    -ERANGE);
  assert_int_equal (vr_encoder_pages (p.encoder, 1, 0, 2, p.guest[0]),
                    -ERANGE);
  assert_int_equal (vr_encoder_pages (p.encoder, 1, 1, UINT64_MAX,
                                      p.guest[0]),
                    -ERANGE);
  assert_int_equal (vr_encoder_pages (p.encoder, 1, UINT64_MAX, 2,
                                      p.guest[0]),
                    -ERANGE);
  close_pair (&p);
}

/* A payload by hand. */
struct by_hand {
  struct vr_delta_header h;
  struct vr_delta_entry e;
  uint8_t data[3 * VR_PAGE_SIZE];
};

static struct by_hand
by_hand (uint8_t kind, uint64_t page, uint32_t pages, uint32_t data_size)
{
  struct by_hand b = {
    .h = { .magic = VR_DELTA_MAGIC, .version = VR_DELTA_VERSION, .block = 2,
           .entries = 1, .body_size = 16 + data_size,
           .stored_size = 16 + data_size },
    .e = { .page = page, .pages = pages, .kind = kind },
  };

  if (kind == VR_DELTA_WORDS)
    b.e.code_size = (uint16_t) data_size;
  return b;
}

static int
decode_hand (const struct by_hand *b)
{
  struct pair p;
  int err;

  open_pair (&p, VR_SHADOW_NONE, false);
  memcpy (p.guest[0], p.backup[0], block_pages[0] * VR_PAGE_SIZE);
  memcpy (p.guest[1], p.backup[1], block_pages[1] * VR_PAGE_SIZE);
  memcpy (p.guest[2], p.backup[2], block_pages[2] * VR_PAGE_SIZE);
  err = decode_into (p.backup, b, 32 + b->h.stored_size);
  if (err < 0)
    assert_same (&p);
  close_pair (&p);
  return err;
}

static void
test_header_checks (void **state)
{
  const struct by_hand good = by_hand (VR_DELTA_ZERO, 76, 1, 0);
  struct by_hand b;

  (void) state;
  assert_int_equal (decode_hand (&good), 0);
#define BAD(field, value, error)                                              \
  do {                                                                        \
    b = good;                                                                 \
    b.field = value;                                                          \
    assert_int_equal (decode_hand (&b), error);                               \
  } while (0)
  BAD (h.magic, 1, -EBADMSG);
  BAD (h.version, 2, -EPROTO);
  BAD (h.flags, 2, -EPROTO);
  BAD (h.reserved, 1, -EBADMSG);
  BAD (h.entries, 0, -EBADMSG);
  BAD (h.entries, 2, -EBADMSG);
  BAD (h.block, 3, -ERANGE);
  BAD (h.block, UINT32_MAX, -ERANGE);
  BAD (h.body_size, 17, -EBADMSG);
  BAD (h.body_size, UINT32_MAX, -EBADMSG);
  BAD (h.stored_size, 17, -EBADMSG);
  BAD (h.flags, VR_DELTA_LZ4, -EBADMSG);
  BAD (e.reserved, 1, -EBADMSG);
  BAD (e.kind, 0, -EBADMSG);
  BAD (e.kind, 4, -EBADMSG);
  BAD (e.pages, 0, -EBADMSG);
  BAD (e.pages, 2, -ERANGE);
  BAD (e.pages, UINT32_MAX, -ERANGE);
  BAD (e.page, 77, -ERANGE);
  BAD (e.page, UINT64_MAX, -ERANGE);
  BAD (e.code_size, 1, -EBADMSG);
#undef BAD
}

static void
test_data_checks (void **state)
{
  struct by_hand b = by_hand (VR_DELTA_WHOLE, 0, 3, 3 * VR_PAGE_SIZE);

  (void) state;
  assert_int_equal (decode_hand (&b), 0);
  b.e.pages = 4;
  assert_int_equal (decode_hand (&b), -EBADMSG);
  b.e.pages = 2;
  assert_int_equal (decode_hand (&b), -EBADMSG);

  b = by_hand (VR_DELTA_WORDS, 0, 1, 10);
  b.data[1] = 1;
  assert_int_equal (decode_hand (&b), 0);
  b.e.pages = 2;
  assert_int_equal (decode_hand (&b), -EBADMSG);
  b.e.pages = 1;
  b.e.code_size = 0;
  assert_int_equal (decode_hand (&b), -EBADMSG);
  b.e.code_size = 11;
  assert_int_equal (decode_hand (&b), -EBADMSG);
  b.e.code_size = 10;
  b.data[1] = 2; /* more words than there are */
  assert_int_equal (decode_hand (&b), -EBADMSG);
}

/* The last word of a page may change, the one behind it may not. */
static void
test_word_positions (void **state)
{
  struct by_hand b = by_hand (VR_DELTA_WORDS, 76, 1, 14);

  (void) state;
  b.data[0] = 255;
  b.data[2] = 255;
  b.data[4] = 1;
  b.data[5] = 1;
  assert_int_equal (decode_hand (&b), 0);
  b.data[4] = 2;
  assert_int_equal (decode_hand (&b), -EBADMSG);
  b.data[4] = 3; /* a skip beyond the end with nothing to write */
  b.data[5] = 0;
  b.h.body_size = b.h.stored_size = 16 + 6;
  b.e.code_size = 6;
  assert_int_equal (decode_hand (&b), -EBADMSG);
}

/* Whatever is done to valid payloads, decode gives an answer; the sanitizers
   watch over the rest. */
static void
test_damage (void **state)
{
  uint64_t rng = seeded (99);
  struct pair p;
  size_t size;

  (void) state;
  open_pair (&p, VR_SHADOW_FULL, true);
  for (unsigned i = 0; i < 40; i++)
    send_dirty_run (&p, &rng);
  assert_int_equal (vr_encoder_flush (p.encoder), 0);
  size = p.log_size;
  for (unsigned i = 0; i < 300; i++) {
    uint32_t n;
    uint8_t *copy;

    memcpy (&n, p.log, sizeof n);
    copy = malloc (n);
    assert_non_null (copy);
    memcpy (copy, p.log + sizeof n, n);
    for (uint64_t k = 1 + below (&rng, 4); k > 0; k--)
      copy[below (&rng, chance (&rng, 50) ? 64 : n)]
        = (uint8_t) next_random (&rng);
    decode_into (p.backup, copy, chance (&rng, 80)
                                   ? n : (uint32_t) below (&rng, n));
    free (copy);
  }
  assert_int_equal (p.log_size, size);
  close_pair (&p);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_property),
    cmocka_unit_test (test_sizes),
    cmocka_unit_test (test_counters_are_small),
    cmocka_unit_test (test_lz4),
    cmocka_unit_test (test_emit_fails),
    cmocka_unit_test (test_encode_limits),
    cmocka_unit_test (test_header_checks),
    cmocka_unit_test (test_data_checks),
    cmocka_unit_test (test_word_positions),
    cmocka_unit_test (test_damage),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
