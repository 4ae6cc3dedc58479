/* SPDX-License-Identifier: BSD-3-Clause */
/* Random operations against a model, after fsx of Apple and SGI.
 *
 *   fsx-nbd SEED URI MODEL-FILE OPERATIONS [ALIGN]
 *
 * Reads, writes, zeros, trims, fast zeros, cache, flushes and extents of 1
 * byte to 256 KiB anywhere on the export, over two connections that take
 * turns or write over each other: what one has acknowledged the other must
 * see.  MODEL-FILE is what the export must hold; it is made from the export if
 * it does not exist, and at the end the export is flushed and the model
 * written, so that another run can go on after the server was restarted.
 * ALIGN makes all offsets and sizes multiples of it.  Exit status 1 and a
 * message if anything differs.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <libnbd.h>

enum {
  CONNS = 2,
  LENGTH_MAX = 256 << 10,
  CHECK_EVERY = 500,
  RACES = 12, /* pairs in flight, of so many bytes each */
  RACE_LENGTH = 1024,
};

static struct nbd_handle *conn[CONNS];
static uint8_t *model;
static uint64_t size, align = 1;
static uint64_t random_state;
static unsigned long step;

static void __attribute__ ((noreturn))
die (const char *what)
{
  fprintf (stderr, "fsx-nbd: operation %lu: %s: %s\n", step, what,
           nbd_get_error () ? nbd_get_error () : strerror (errno));
  exit (1);
}

/* xorshift64*, by Vigna. */
static uint64_t
draw (uint64_t limit)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * UINT64_C (0x2545f4914f6cdd1d) >> 16) % limit;
}

static struct nbd_handle *
any (void)
{
  return conn[draw (CONNS)];
}

/* A place: often at the last one's edges, at the end, or on a boundary. */
static void
draw_range (uint64_t *ret_offset, uint64_t *ret_length)
{
  static uint64_t last_end;
  uint64_t max = draw (3) ? 8192 : LENGTH_MAX;
  uint64_t n = 1 + draw (max < size ? max : size);
  uint64_t offset = draw (size - n + 1);

  switch (draw (8)) {
  case 0:
    offset = size - n;
    break;
  case 1:
    offset = last_end + n <= size ? last_end : offset;
    break;
  case 2:
    offset -= offset % 4096;
    break;
  default:
    break;
  }
  offset -= offset % align;
  n -= n % align;
  if (n == 0)
    n = align;
  last_end = offset + n;
  *ret_offset = offset;
  *ret_length = n;
}

static void
compare (const uint8_t *got, uint64_t offset, uint64_t n, const char *what)
{
  if (memcmp (got, model + offset, n) == 0)
    return;
  for (uint64_t i = 0; i < n; i++)
    if (got[i] != model[offset + i]) {
      fprintf (stderr,
               "fsx-nbd: operation %lu: %s of %" PRIu64 " bytes at %" PRIu64
               ": byte %" PRIu64 " is %02x, must be %02x\n",
               step, what, n, offset, offset + i, got[i], model[offset + i]);
      exit (1);
    }
}

static void
check_all (void)
{
  static uint8_t buf[1 << 20];

  for (uint64_t at = 0; at < size; at += sizeof buf) {
    uint64_t n = size - at < sizeof buf ? size - at : sizeof buf;

    if (nbd_pread (any (), buf, n, at, 0) < 0)
      die ("read");
    compare (buf, at, n, "read of all");
  }
}

/* ---- Operations --------------------------------------------------------- */

static void
do_read (void)
{
  static uint8_t buf[LENGTH_MAX];
  uint64_t offset, n;

  draw_range (&offset, &n);
  if (nbd_pread (any (), buf, n, offset, 0) < 0)
    die ("read");
  compare (buf, offset, n, "read");
}

static uint32_t
maybe_fua (void)
{
  return draw (16) ? 0 : LIBNBD_CMD_FLAG_FUA;
}

static void
do_write (void)
{
  uint64_t offset, n;

  draw_range (&offset, &n);
  for (uint64_t i = 0; i < n; i++)
    model[offset + i] = (uint8_t) draw (256);
  if (nbd_pwrite (any (), model + offset, n, offset, maybe_fua ()) < 0)
    die ("write");
}

/* Two writes in flight at once that touch, but do not overlap. */
static void
do_two_writes (void)
{
  uint64_t offset, n, cut;
  int64_t a, b;

  draw_range (&offset, &n);
  if (n < 2 * align)
    return;
  cut = align * (1 + draw (n / align - 1));
  for (uint64_t i = 0; i < n; i++)
    model[offset + i] = (uint8_t) draw (256);
  a = nbd_aio_pwrite (conn[0], model + offset, cut, offset,
                      NBD_NULL_COMPLETION, 0);
  b = nbd_aio_pwrite (conn[1], model + offset + cut, n - cut, offset + cut,
                      NBD_NULL_COMPLETION, 0);
  if (a < 0 || b < 0)
    die ("two writes");
  while (!nbd_aio_command_completed (conn[0], (uint64_t) a))
    if (nbd_poll (conn[0], -1) < 0)
      die ("two writes");
  while (!nbd_aio_command_completed (conn[1], (uint64_t) b))
    if (nbd_poll (conn[1], -1) < 0)
      die ("two writes");
}

/* Pairs of writes in flight over each other: either may win, but from then on
   it has won, here and at the backup. */
static void
do_races (void)
{
  static uint8_t bytes[2][RACES * RACE_LENGTH], got[RACES * RACE_LENGTH];
  uint64_t n = RACES * RACE_LENGTH, offset;
  int64_t cookie[2][RACES];

  if (size < n)
    return;
  offset = draw (size - n + 1);
  offset -= offset % align;
  for (size_t c = 0; c < 2; c++)
    for (uint64_t i = 0; i < n; i++)
      bytes[c][i] = (uint8_t) draw (256);
  for (uint64_t i = 0; i < RACES; i++)
    for (size_t c = 0; c < 2; c++) {
      cookie[c][i] = nbd_aio_pwrite (conn[c], bytes[c] + i * RACE_LENGTH,
                                     RACE_LENGTH, offset + i * RACE_LENGTH,
                                     NBD_NULL_COMPLETION, 0);
      if (cookie[c][i] < 0)
        die ("race");
    }
  for (size_t c = 0; c < 2; c++)
    for (uint64_t i = 0; i < RACES; i++)
      while (!nbd_aio_command_completed (conn[c], (uint64_t) cookie[c][i]))
        if (nbd_poll (conn[c], -1) < 0)
          die ("race");
  if (nbd_pread (any (), got, n, offset, 0) < 0)
    die ("read");
  for (uint64_t i = 0; i < n; i++)
    if (got[i] != bytes[0][i] && got[i] != bytes[1][i]) {
      fprintf (stderr, "fsx-nbd: operation %lu: byte %" PRIu64 " is %02x, of "
                       "neither write\n",
               step, offset + i, got[i]);
      exit (1);
    }
  memcpy (model + offset, got, n);
}

static void
do_zero (void)
{
  uint64_t offset, n;
  uint32_t flags = maybe_fua ();

  draw_range (&offset, &n);
  if (draw (2))
    flags |= LIBNBD_CMD_FLAG_NO_HOLE;
  if (draw (2))
    flags |= LIBNBD_CMD_FLAG_FAST_ZERO;
  if (nbd_zero (any (), n, offset, flags) < 0)
    die ("zero");
  memset (model + offset, 0, n);
}

static void
do_trim (void)
{
  uint64_t offset, n;

  draw_range (&offset, &n);
  if (nbd_trim (any (), n, offset, maybe_fua ()) < 0)
    die ("trim");
  memset (model + offset, 0, n);
}

static void
do_cache (void)
{
  uint64_t offset, n;

  draw_range (&offset, &n);
  if (nbd_cache (any (), n, offset, 0) < 0)
    die ("cache");
}

static void
do_flush (void)
{
  if (nbd_flush (any (), 0) < 0)
    die ("flush");
}

/* What is said to read as zeros must, and the whole range be covered. */
static int
on_extents (void *opaque, const char *metacontext, uint64_t offset,
            uint32_t *entries, size_t count, int *error)
{
  uint64_t *covered = opaque;

  (void) error;
  if (strcmp (metacontext, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0)
    return 0;
  for (size_t i = 0; i + 1 < count; i += 2) {
    if (entries[i + 1] & LIBNBD_STATE_ZERO)
      for (uint64_t k = 0; k < entries[i] && offset + k < size; k++)
        if (model[offset + k]) {
          fprintf (stderr,
                   "fsx-nbd: operation %lu: byte %" PRIu64
                   " is %02x, said to be zero\n",
                   step, offset + k, model[offset + k]);
          exit (1);
        }
    offset += entries[i];
    *covered += entries[i];
  }
  return 0;
}

static void
do_extents (void)
{
  uint64_t offset, n, covered = 0;

  draw_range (&offset, &n);
  if (nbd_block_status (any (), n, offset,
                        (nbd_extent_callback){ .callback = on_extents,
                                               .user_data = &covered },
                        draw (4) ? 0 : LIBNBD_CMD_FLAG_REQ_ONE)
          < 0
      || covered == 0)
    die ("extents");
}

static void
do_something (void)
{
  static void (*const todo[]) (void)
    = { do_read,  do_read,  do_read,  do_write,      do_write,
        do_write, do_races, do_races, do_two_writes, do_zero,
        do_zero,  do_trim,  do_trim,  do_extents,    do_cache };

  if (draw (40) == 0)
    do_flush ();
  else
    todo[draw (sizeof todo / sizeof todo[0])]();
}

/* ---- Main --------------------------------------------------------------- */

static struct nbd_handle *
connect_to (const char *uri)
{
  struct nbd_handle *nbd = nbd_create ();

  /* Odd places are legal: the server's limits are its own to enforce. */
  if (nbd == NULL || nbd_set_strict_mode (nbd, 0) < 0
      || nbd_add_meta_context (nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0
      || nbd_connect_uri (nbd, uri) < 0)
    die ("connect");
  if (nbd_can_multi_conn (nbd) != 1 || nbd_can_fast_zero (nbd) != 1
      || nbd_can_fua (nbd) != 1 || nbd_can_trim (nbd) != 1
      || nbd_can_cache (nbd) != 1
      || nbd_can_meta_context (nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) != 1)
    die ("the server lacks a feature");
  return nbd;
}

static void
load_model (const char *path)
{
  FILE *f = fopen (path, "rb");

  if (f) {
    if (fread (model, 1, size, f) != size)
      die (path);
    fclose (f);
    check_all ();
    return;
  }
  for (uint64_t at = 0; at < size; at += 1 << 20)
    if (nbd_pread (conn[0], model + at,
                   size - at < 1 << 20 ? size - at : 1 << 20, at, 0)
        < 0)
      die ("read");
}

static void
save_model (const char *path)
{
  FILE *f = fopen (path, "wb");

  if (f == NULL || fwrite (model, 1, size, f) != size || fclose (f) != 0)
    die (path);
}

int
main (int argc, char *argv[])
{
  unsigned long operations;

  if (argc < 5) {
    fprintf (stderr, "usage: fsx-nbd SEED URI MODEL-FILE OPERATIONS "
                     "[ALIGN]\n");
    return 2;
  }
  random_state = strtoull (argv[1], NULL, 10) * 2 + 1;
  operations = strtoul (argv[4], NULL, 10);
  if (argc > 5)
    align = strtoull (argv[5], NULL, 10);
  for (size_t i = 0; i < CONNS; i++)
    conn[i] = connect_to (argv[2]);
  size = (uint64_t) nbd_get_size (conn[0]);
  model = malloc (size);
  if (model == NULL)
    die ("malloc");
  load_model (argv[3]);
  for (step = 1; step <= operations; step++) {
    do_something ();
    if (step % CHECK_EVERY == 0)
      check_all ();
  }
  check_all ();
  do_flush ();
  save_model (argv[3]);
  for (size_t i = 0; i < CONNS; i++) {
    nbd_shutdown (conn[i], 0);
    nbd_close (conn[i]);
  }
  return 0;
}
