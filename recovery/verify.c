/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep verify: compare the hashes of both copies of a disk, 16 bytes for each
 * 256 KiB, at one epoch while the guest runs.  When a view is given up the
 * comparison goes on from there at a later epoch. */
#include "vmrep.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image.h"
#include "output.h"
#include "rounds.h"

/* Extents compared at a time: 32 MiB of disk, and less when views are given up
   before that is read. */
#define BATCH 128
#define BATCH_MIN 4

/* Differences that are listed, and looked into. */
#define LISTED 10

/* Epochs in all, and in a row that showed nothing. */
#define ROUNDS_MAX 1000
#define FRUITLESS_MAX 10

#define PROGRESS_NS UINT64_C (200000000)

struct verification {
  const struct cli_args *args;
  struct round round;
  uint64_t size;      /* of the disk */
  uint64_t extents;   /* to compare */
  uint64_t at;        /* compared so far */
  size_t batch;       /* to compare at a time */
  uint64_t different; /* of them */
  uint64_t last_end;  /* where the last difference listed ended */
  json_t *epochs;
  json_t *differences;
  uint64_t started_ns, shown_ns;
};

static uint64_t
now_ns (void)
{
  return vr_now_ns (vr_io_real ());
}

static void
show_progress (struct verification *v, bool always)
{
  bool tty = isatty (STDERR_FILENO);
  uint64_t now = now_ns ();

  if (!tty && !v->args->progress)
    return;
  if (!always && now - v->shown_ns < PROGRESS_NS)
    return;
  v->shown_ns = now;
  fprintf (stderr, "%sepoch %llu: %llu of %llu extents, %.0f%%, %llu differ%s",
           tty ? "\r" : "", (unsigned long long) v->round.epoch,
           (unsigned long long) v->at, (unsigned long long) v->extents,
           v->extents ? 100.0 * (double) v->at / (double) v->extents : 100,
           (unsigned long long) v->different, tty ? "\033[K" : "\n");
  if (tty && always)
    fputc ('\n', stderr);
}

/* ---- Differences -------------------------------------------------------- */

/* The disk's bytes of extent i. */
static size_t
extent_length (const struct verification *v, uint64_t i)
{
  uint64_t left = v->size - i * VR_HASH_CHUNK;

  return left < VR_HASH_CHUNK ? left : VR_HASH_CHUNK;
}

/* A difference that goes on where the last one ended is the same one. */
static void
note_difference (struct verification *v, uint64_t i)
{
  uint64_t offset = i * VR_HASH_CHUNK, first;
  size_t length = extent_length (v, i);
  size_t n = json_array_size (v->differences);
  json_t *o = n ? json_array_get (v->differences, n - 1) : NULL;

  v->different++;
  if (o && v->last_end == offset) {
    set_count (o, "length", get_count (o, "length") + length);
    v->last_end = offset + length;
    return;
  }
  if (n == LISTED)
    return;
  o = must (json_object ());
  set_count (o, "offset", offset);
  set_count (o, "length", length);
  set_count (o, "epoch", v->round.epoch);
  if (round_first_difference (&v->round, offset, length, &first) == 0)
    set_count (o, "first_byte", first);
  append_json (v->differences, o);
  v->last_end = offset + length;
}

/* ---- Comparing ---------------------------------------------------------- */

/* The next extents; v->at moves behind them. */
static int
compare_batch (struct verification *v)
{
  static uint8_t hash[SIDES][BATCH * VR_HASH_SIZE];
  uint8_t *buf[SIDES] = { hash[PRIMARY], hash[BACKUP] };
  uint64_t left = v->extents - v->at, first = v->at;
  size_t n = left < v->batch ? left : v->batch;
  int err = round_read_hashes (&v->round, buf, n * VR_HASH_SIZE,
                               first * VR_HASH_SIZE);

  if (err < 0)
    return err;
  for (size_t i = 0; i < n; i++)
    if (memcmp (hash[PRIMARY] + i * VR_HASH_SIZE,
                hash[BACKUP] + i * VR_HASH_SIZE, VR_HASH_SIZE)
        != 0)
      note_difference (v, first + i);
  v->at += n;
  show_progress (v, false);
  return 0;
}

/* As far as one epoch's views last. */
static int
compare_round (struct verification *v)
{
  int err = round_open (&v->round);

  if (err < 0)
    return err;
  append_json (v->epochs, json_integer ((json_int_t) v->round.epoch));
  while (err == 0 && v->at < v->extents)
    err = compare_batch (v);
  round_close (&v->round);
  /* That the next round finds out, if it was more than a view. */
  return err == -EIO ? -EAGAIN : err;
}

static int
compare_all (struct verification *v)
{
  unsigned fruitless = 0;
  int err = -EAGAIN;

  for (unsigned i = 0; i < ROUNDS_MAX && err == -EAGAIN; i++) {
    uint64_t before = v->at;

    err = compare_round (v);
    fruitless = v->at > before ? 0 : fruitless + 1;
    if (fruitless && v->batch > BATCH_MIN)
      v->batch /= 2;
    if (fruitless == FRUITLESS_MAX)
      break;
  }
  return err;
}

/* ---- Results ------------------------------------------------------------ */

static json_t *
describe (const struct verification *v, int err)
{
  json_t *o = must (json_object ());

  set_text (o, "result",
            v->different ? "different" : err < 0 ? "failed" : "same");
  set_count (o, "size", v->size);
  set_count (o, "extent_bytes", VR_HASH_CHUNK);
  set_count (o, "extents", v->extents);
  set_count (o, "compared_extents", v->at);
  set_count (o, "different_extents", v->different);
  set_json (o, "epochs", json_incref (v->epochs));
  set_json (o, "differences", json_incref (v->differences));
  set_real (o, "seconds", (double) (now_ns () - v->started_ns) / 1e9);
  if (err < 0)
    set_text (o, "error", v->round.error);
  return o;
}

static void
print_differences (const json_t *list)
{
  json_t *o;
  size_t i;

  json_array_foreach ((json_t *) list, i, o) {
    printf ("  offset %llu, %s: differs",
            LLU (o, "offset"),
            bytes_text (get_count (o, "length")));
    if (has_value (o, "first_byte"))
      printf (", first at byte %llu",
              LLU (o, "first_byte"));
    printf ("\n");
  }
}

static void
print_result (const json_t *o)
{
  const json_t *epochs = json_object_get (o, "epochs");
  json_t *epoch;
  size_t i;

  printf ("%s: %llu of %llu extents (%s) compared in %s, at epoch%s",
          get_text (o, "result"),
          LLU (o, "compared_extents"),
          LLU (o, "extents"),
          bytes_text (get_count (o, "size")),
          seconds_text (get_real (o, "seconds")),
          json_array_size (epochs) == 1 ? "" : "s");
  json_array_foreach ((json_t *) epochs, i, epoch)
    printf (" %lld", (long long) json_integer_value (epoch));
  printf ("\n");
  if (get_count (o, "different_extents"))
    printf ("%llu extents differ:\n",
            LLU (o, "different_extents"));
  print_differences (json_object_get (o, "differences"));
}

static int
report (const struct verification *v, int err)
{
  json_t *o = describe (v, err);

  if (v->args->json)
    print_json (o, false);
  else if (json_array_size (v->epochs) > 0)
    print_result (o);
  json_decref (o);
  if (err < 0)
    complain ("verify: %s", v->round.error);
  if (v->different)
    return VMREP_FOUND;
  return err < 0 ? VMREP_FAILED : VMREP_OK;
}

int
run_verify (const struct cli_args *args)
{
  struct verification v = { .args = args, .batch = BATCH,
                            .started_ns = now_ns () };
  int r, err = round_start (&v.round, args->operand[0], args->operand[1]);

  v.epochs = must (json_array ());
  v.differences = must (json_array ());
  if (err == 0) {
    v.size = v.round.status.disk_size;
    v.extents = (v.size + VR_HASH_CHUNK - 1) / VR_HASH_CHUNK;
    err = compare_all (&v);
    show_progress (&v, true);
  }
  round_end (&v.round);
  r = report (&v, err);
  json_decref (v.epochs);
  json_decref (v.differences);
  return r;
}
