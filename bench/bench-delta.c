/* SPDX-License-Identifier: BSD-3-Clause */
/* Speed of memsync/delta in GB/s of guest memory, and bytes sent per byte.
 *
 * Usage: bench-delta [SECONDS-PER-CASE [MIB]]
 *
 * Each case sends all of MIB (64) again and again, in runs of 16 pages:
 *   same       nothing has changed
 *   10% words  one word of ten of every page has changed
 *   10% pages  one page of ten has changed in all its words
 *   counters   four words of every page have changed
 *   random     every word has changed
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "memsync/delta.h"

#define RUN 16

struct bench {
  uint64_t pages;
  uint8_t *guest[2]; /* taken in turn, so that preparing costs no time */
  uint8_t *backup;
  struct vr_encoder *encoder;
  uint64_t sent, decode_ns;
  bool decode;
};

static uint8_t scratch[VR_DELTA_BODY_MAX];
static uint64_t rng_state = UINT64_C (88172645463325252);

static uint64_t
rng (void)
{
  rng_state ^= rng_state << 13;
  rng_state ^= rng_state >> 7;
  rng_state ^= rng_state << 17;
  return rng_state;
}

static uint64_t
now_ns (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
}

static int
take (void *opaque, const void *payload, uint32_t size)
{
  struct bench *b = opaque;
  const struct vr_ram_layout layout = { 1, &b->pages };
  const struct vr_delta_apply apply
    = { vr_delta_write_mapped, vr_delta_zero_mapped, &b->backup };
  uint64_t begin;

  b->sent += size;
  if (!b->decode)
    return 0;
  begin = now_ns ();
  if (vr_delta_decode (payload, size, &layout, scratch, &apply) < 0)
    abort ();
  b->decode_ns += now_ns () - begin;
  return 0;
}

/* ---- Changes ------------------------------------------------------------ */

static void
change_random (uint64_t *words, uint64_t page)
{
  (void) page;
  for (unsigned i = 0; i < VR_PAGE_WORDS; i++)
    words[i] = rng ();
}

static void
change_words (uint64_t *words, uint64_t page)
{
  (void) page;
  for (unsigned i = 0; i < VR_PAGE_WORDS / 10; i++)
    words[rng () % VR_PAGE_WORDS] = rng ();
}

static void
change_pages (uint64_t *words, uint64_t page)
{
  if (page % 10 == 0)
    change_random (words, page);
}

static void
change_counters (uint64_t *words, uint64_t page)
{
  (void) page;
  for (unsigned i = 0; i < VR_PAGE_WORDS; i += VR_PAGE_WORDS / 4)
    words[i]++;
}

static void
change_nothing (uint64_t *words, uint64_t page)
{
  (void) words;
  (void) page;
}

static const struct {
  const char *name;
  void (*change) (uint64_t *words, uint64_t page);
} cases[] = {
  { "same", change_nothing },       { "10% words", change_words },
  { "10% pages", change_pages },    { "counters", change_counters },
  { "random", change_random },
};

/* ---- Measure ------------------------------------------------------------ */

static void
send (struct bench *b, unsigned turn)
{
  for (uint64_t page = 0; page < b->pages; page += RUN)
    if (vr_encoder_pages (b->encoder, 0, page, RUN,
                          b->guest[turn] + page * VR_PAGE_SIZE) < 0)
      abort ();
  if (vr_encoder_flush (b->encoder) < 0)
    abort ();
}

static void
fill (struct bench *b, void (*change) (uint64_t *, uint64_t))
{
  for (uint64_t page = 0; page < b->pages; page++)
    change_random ((uint64_t *) (b->guest[0] + page * VR_PAGE_SIZE), page);
  memcpy (b->guest[1], b->guest[0], b->pages * VR_PAGE_SIZE);
  for (uint64_t page = 0; page < b->pages; page++)
    change ((uint64_t *) (b->guest[1] + page * VR_PAGE_SIZE), page);
}

/* Best round in GB/s: others use the machine too. */
static double
best_rate (struct bench *b, double seconds, uint64_t *ret_sent)
{
  const uint64_t until = now_ns () + (uint64_t) (seconds * 1e9);
  uint64_t best = UINT64_MAX;
  unsigned turn = 1;

  do {
    uint64_t begin = now_ns (), ns;

    b->sent = b->decode_ns = 0;
    send (b, turn);
    ns = b->decode ? b->decode_ns : now_ns () - begin;
    if (!b->decode || b->sent > 0) {
      *ret_sent = b->sent;
      if (ns < best)
        best = ns;
    }
    turn = 1 - turn;
  } while (now_ns () < until);
  return (double) (b->pages * VR_PAGE_SIZE) / (double) best;
}

static void
run (struct bench *b, enum vr_shadow shadow, bool lz4, double seconds)
{
  static const char *const names[] = { "none", "hash", "full" };
  const struct vr_ram_layout layout = { 1, &b->pages };
  const struct vr_delta_config config = { shadow, lz4, take, b };

  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    double encode, decode;
    uint64_t sent = 0;

    fill (b, cases[i].change);
    if (vr_encoder_new (&layout, &config, &b->encoder) < 0)
      abort ();
    b->decode = false;
    send (b, 0);
    encode = best_rate (b, seconds, &sent);
    b->decode = true;
    decode = best_rate (b, seconds / 4, &sent);
    printf ("%-5s %-4s %-10s %7.2f GB/s encode %6.1f %% sent", names[shadow],
            lz4 ? "lz4" : "", cases[i].name, encode,
            100.0 * (double) sent / (double) (b->pages * VR_PAGE_SIZE));
    if (sent > 0)
      printf (" %8.2f GB/s decode", decode);
    printf ("\n");
    vr_encoder_free (b->encoder);
  }
}

int
main (int argc, char **argv)
{
  const double seconds = argc > 1 ? strtod (argv[1], NULL) : 0.5;
  const uint64_t mib = argc > 2 ? strtoull (argv[2], NULL, 10) : 64;
  struct bench b = { .pages = mib << 8 };

  b.guest[0] = malloc (b.pages * VR_PAGE_SIZE);
  b.guest[1] = malloc (b.pages * VR_PAGE_SIZE);
  b.backup = calloc (b.pages, VR_PAGE_SIZE);
  if (b.pages < RUN || !b.guest[0] || !b.guest[1] || !b.backup)
    abort ();
  run (&b, VR_SHADOW_FULL, false, seconds);
  run (&b, VR_SHADOW_FULL, true, seconds);
  run (&b, VR_SHADOW_HASH, false, seconds);
  run (&b, VR_SHADOW_NONE, false, seconds);
  run (&b, VR_SHADOW_NONE, true, seconds);
  free (b.guest[0]);
  free (b.guest[1]);
  free (b.backup);
  return 0;
}
