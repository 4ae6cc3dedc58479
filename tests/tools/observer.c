/* SPDX-License-Identifier: BSD-3-Clause */
/* The outside observer: a client of a VM's disks that knows what a disk may
 * hold after anything at all was killed.
 *
 *   observer SEED EPOCH-FILE flush=local|remote VM DISK=IMAGE…
 *
 * IMAGE is read once, before anything writes to it.  Then one command a line
 * on stdin, one answer a line on stdout: "ok …", or "BAD …" and exit status 1.
 * Between commands it keeps the disks it is connected to under load.
 *
 *   load I URI        connect to disk I of the primary (the first is 0), load
 *   wait MS           just load
 *   gone I            disk I was killed: give the connections up
 *   closing I         disk I was asked to end: it may refuse requests from now
 *   drain             finish what is in flight, send nothing, until the next
 *                     `load`
 *   flush             drain, then flush every disk
 *   primary I URI     disk I was started again: check all its bytes
 *   live URI          check the backup at one epoch, all disks, while it runs
 *   still URI         the same, with a primary gone or all drained
 *   promoted DIR      check the images in DIR after vmrep promote
 *   equal I URI       disk I, drained: the primary's export must be as known
 *
 * THE MODEL
 *
 * Every write has a number, the moment it was sent, and fills its range with
 * bytes made of that number and their place.  Overlapping requests are never
 * in flight together, so the versions of each byte have one order.  History
 * is kept from `base`, the disk as the backup was last seen.
 *
 * A disk that was found is right if each byte holds one of its versions, not
 * older than the last one that is required there.  Required is a version
 *   - acknowledged before any version that is visible anywhere was sent: what
 *     depends on it cannot be there without it.  For the backup that holds
 *     across all disks of the VM;
 *   - covered by an acknowledged flush or FUA: at the primary always, at the
 *     backup with flush=remote;
 *   - of the backup, at epoch k: acknowledged when the counter stood at k or
 *     before.  And what was sent when it stood beyond k must not be there.
 *
 * What was found is then the new truth.  A primary that was started again
 * loses for good what it does not show; a backup never again shows less.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/stat.h>

#include <libnbd.h>

#include "epoch.h"
#include "format.h"

enum {
  DISKS_MAX = 4,
  CONNS = 2,
  SLOTS = 10,           /* requests in flight on each disk */
  OP_MAX = 256 << 10,   /* bytes of a write */
  ZERO_MAX = 2 << 20,   /* bytes of a zero or trim */
  CLOCK_AREA = 4096,    /* at the start of each disk, for the serial chain */
  READ_CHUNK = 1 << 20, /* bytes of a read when checking */
  STEP_MS = 2,
  PACE_MS = 50,         /* for so long the pace stays the same, */
  PACE_MAX = 150,       /* at most so many requests */
  STILL_TRIES = 20,
  TEARS_MAX = 6,        /* pieces one interval may be in */
};

#define NEVER UINT64_MAX

enum kind { OP_WRITE, OP_ZERO, OP_TRIM, OP_READ, OP_FLUSH };

/* One change, or what is left of it, in a disk's history. */
struct op {
  uint64_t id; /* when it was sent; also its contents */
  uint64_t acked;
  uint64_t offset, end;
  uint64_t epoch_min, epoch_max; /* of the counter: sent, acknowledged */
  enum kind kind;
  bool durable; /* acknowledged with FUA */
};

struct history {
  struct op *op;
  size_t count, allocated;
};

/* A request in flight. */
struct slot {
  bool busy, chained;
  enum kind kind;
  struct disk *disk;
  uint64_t id, offset, end;
  bool fua;
  uint8_t *buf;
  size_t buf_size;
  int error;
};

struct disk {
  const char *name;
  uint64_t size;
  uint8_t *base;
  struct history history;
  struct nbd_handle *nbd[CONNS]; /* NULL: not connected */
  struct slot slot[SLOTS];
  bool closing;
  uint64_t pace, pace_end, pace_sent;
  uint64_t flush_sent; /* of the last flush that was acknowledged */
};

static struct disk disks[DISKS_MAX];
static size_t disk_count;
static const char *vm;
static bool flush_remote;
static const char *epoch_path;
static struct vr_epoch *epoch;
static uint64_t now_id = 1; /* counts sends and acknowledgements */
static uint64_t random_state;
static uint64_t committed_seen; /* no backup may ever say less */
static bool loading;
static bool chain_busy;
static size_t chain_disk;
static uint64_t sent_count, acked_count, lost_count;

/* ---- Small things ------------------------------------------------------- */

static void __attribute__ ((noreturn, format (printf, 1, 2)))
bad (const char *fmt, ...)
{
  va_list args;

  printf ("BAD ");
  va_start (args, fmt);
  vprintf (fmt, args);
  va_end (args);
  printf ("\n");
  exit (1);
}

static void *
allocate (size_t n)
{
  void *p = calloc (1, n);

  if (p == NULL)
    bad ("out of memory");
  return p;
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

static uint64_t
now_ms (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * 1000 + (uint64_t) t.tv_nsec / 1000000;
}

/* The open epoch, or 0 as long as there is no counter. */
static uint64_t
epoch_now (void)
{
  if (epoch == NULL && vr_epoch_open_readonly (epoch_path, &epoch) < 0)
    return 0;
  return vr_epoch_current (epoch);
}

static const char *
kind_name (enum kind kind)
{
  static const char *const names[] = { [OP_WRITE] = "write",
                                       [OP_ZERO] = "zero",
                                       [OP_TRIM] = "trim",
                                       [OP_READ] = "read",
                                       [OP_FLUSH] = "flush" };
  return names[kind];
}

/* ---- Contents ----------------------------------------------------------- */

/* The 8 bytes that write id leaves in word w of the disk; the finalizer of
   splitmix64. */
static uint64_t
word_of (uint64_t id, uint64_t w)
{
  uint64_t x = id * UINT64_C (0x9e3779b97f4a7c15) + w;

  x = (x ^ (x >> 30)) * UINT64_C (0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C (0x94d049bb133111eb);
  return x ^ (x >> 31);
}

static void
fill (uint8_t *buf, uint64_t id, uint64_t offset, uint64_t end)
{
  while (offset < end) {
    uint64_t word = word_of (id, offset / 8);
    uint64_t skip = offset % 8;
    uint64_t n = 8 - skip < end - offset ? 8 - skip : end - offset;

    memcpy (buf, (uint8_t *) &word + skip, n);
    buf += n;
    offset += n;
  }
}

static size_t
same_bytes (const uint8_t *a, const uint8_t *b, size_t n)
{
  size_t i = 0;

  if (memcmp (a, b, n) == 0)
    return n;
  while (a[i] == b[i])
    i++;
  return i;
}

/* How many bytes of found, from offset on, are what op (NULL: the base)
   leaves there. */
static uint64_t
matches (const struct disk *d, const struct op *op, const uint8_t *found,
         uint64_t offset, uint64_t end)
{
  static uint8_t expect[OP_MAX];
  static const uint8_t zeros[OP_MAX];
  uint64_t done = 0, n = end - offset, step, same;

  for (; done < n; done += step) {
    const uint8_t *want = d->base + offset + done;

    step = n - done < OP_MAX ? n - done : OP_MAX;
    if (op && op->kind == OP_WRITE) {
      fill (expect, op->id, offset + done, offset + done + step);
      want = expect;
    } else if (op)
      want = zeros;
    same = same_bytes (found + done, want, step);
    if (same < step)
      return done + same;
  }
  return n;
}

/* ---- History ------------------------------------------------------------ */

static void
push (struct history *h, const struct op *op)
{
  if (h->count == h->allocated) {
    h->allocated = h->allocated ? 2 * h->allocated : 1024;
    h->op = realloc (h->op, h->allocated * sizeof *h->op);
    if (h->op == NULL)
      bad ("out of memory");
  }
  h->op[h->count++] = *op;
}

static int
by_id (const void *a, const void *b)
{
  const struct op *x = a, *y = b;

  if (x->id != y->id)
    return x->id < y->id ? -1 : 1;
  return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Every piece of op id was acknowledged. */
static void
acknowledge (struct history *h, uint64_t id, bool fua)
{
  uint64_t max = epoch_now ();

  for (size_t i = h->count; i > 0 && h->op[i - 1].id >= id; i--)
    if (h->op[i - 1].id == id) {
      h->op[i - 1].acked = now_id;
      h->op[i - 1].epoch_max = max ? max : NEVER;
      h->op[i - 1].durable = fua;
    }
}

/* ---- Check -------------------------------------------------------------- */

/* What a found disk is measured by. */
struct rules {
  bool backup;    /* else primary */
  uint64_t epoch; /* backup: exactly this one; 0: unknown */
  uint64_t since; /* what was acknowledged before this is required */
};

/* A piece of history put together again, while sweeping over the disk. */
struct run {
  uint64_t start, end;
};

struct sweep {
  struct disk *d;
  const uint8_t *found;
  const struct rules *rules;
  size_t *active; /* ops that cover the present interval, in order */
  size_t active_count;
  uint64_t newest;     /* id of the newest op seen: a lower bound */
  struct history *out; /* NULL: only look */
  struct run *run;     /* for each op */
};

struct edge {
  uint64_t at;
  size_t op;
  bool begins;
};

static int
by_place (const void *a, const void *b)
{
  const struct edge *x = a, *y = b;

  if (x->at != y->at)
    return x->at < y->at ? -1 : 1;
  return x->op < y->op ? -1 : x->op > y->op;
}

static bool
is_required (const struct disk *d, const struct op *op,
             const struct rules *r)
{
  bool synced = !r->backup || flush_remote;

  if (op->acked < r->since)
    return true;
  if (synced && (op->durable || op->acked < d->flush_sent))
    return true;
  return r->backup && r->epoch && op->epoch_max <= r->epoch;
}

static bool
is_forbidden (const struct op *op, const struct rules *r)
{
  return r->backup && r->epoch && op->epoch_min > r->epoch;
}

/* Where op would be in a message. */
static void
describe (char *buf, size_t size, const struct op *op)
{
  if (op == NULL)
    snprintf (buf, size, "what was there before");
  else
    snprintf (buf, size,
              "%s %" PRIu64 " of [%" PRIu64 ", %" PRIu64 ")%s, epochs %" PRIu64
              "..%" PRIu64 ", acknowledged %" PRIu64,
              kind_name (op->kind), op->id, op->offset, op->end,
              op->durable ? " with FUA" : "", op->epoch_min,
              op->epoch_max == NEVER ? 0 : op->epoch_max,
              op->acked == NEVER ? 0 : op->acked);
}

/* i counts the versions of an interval: 0 is the base. */
static const struct op *
version (const struct sweep *s, size_t i)
{
  return i == 0 ? NULL : &s->d->history.op[s->active[i - 1]];
}

static void __attribute__ ((noreturn))
wrong (const struct sweep *s, uint64_t offset, uint64_t end, size_t oldest,
       size_t newest)
{
  char want[200], got[200] = "no version of it";

  describe (want, sizeof want, version (s, oldest));
  for (size_t i = 0; i <= s->active_count; i++)
    if (matches (s->d, version (s, i), s->found + offset, offset, end)
        == end - offset)
      describe (got, sizeof got, version (s, i));
  bad ("%s of %s, epoch %" PRIu64 ", since %" PRIu64 ": bytes %" PRIu64
       "..%" PRIu64 " must be of versions %zu to %zu of %zu, from: %s; "
       "found: %s (%02x %02x %02x %02x)",
       s->rules->backup ? "backup" : "primary", s->d->name, s->rules->epoch,
       s->rules->since, offset, end, oldest, newest, s->active_count, want,
       got, s->found[offset], offset + 1 < end ? s->found[offset + 1] : 0,
       offset + 2 < end ? s->found[offset + 2] : 0,
       offset + 3 < end ? s->found[offset + 3] : 0);
}

/* Put [start, end) of op i into the new history. */
static void
keep (struct sweep *s, size_t i, uint64_t start, uint64_t end)
{
  struct run *r = &s->run[i];
  struct op op = s->d->history.op[i];

  if (r->end == start && r->end > r->start) {
    r->end = end;
    return;
  }
  if (r->end > r->start) {
    op.offset = r->start;
    op.end = r->end;
    push (s->out, &op);
  }
  *r = (struct run){ start, end };
}

/* The interval was found to be at version i. */
static void
settle (struct sweep *s, size_t i, uint64_t offset, uint64_t end)
{
  const struct op *op = version (s, i);
  size_t first = s->rules->backup ? i : 0;
  size_t last = s->rules->backup ? s->active_count : i;

  if (op && op->id > s->newest)
    s->newest = op->id;
  if (s->out == NULL)
    return;
  for (size_t k = first; k < last; k++)
    keep (s, s->active[k], offset, end);
  if (s->rules->backup)
    memcpy (s->d->base + offset, s->found + offset, end - offset);
}

/* [offset, end) has the same versions all over; but what was found may be
   torn between some of them. */
static void
check_interval (struct sweep *s, uint64_t offset, uint64_t end)
{
  size_t oldest = 0, newest = s->active_count;
  uint64_t at = offset;

  for (size_t i = 1; i <= s->active_count; i++)
    if (is_required (s->d, version (s, i), s->rules))
      oldest = i;
  for (size_t i = s->active_count; i > 0; i--)
    if (is_forbidden (version (s, i), s->rules))
      newest = i - 1;
  if (newest < oldest)
    bad ("observer: version %zu is required and %zu forbidden", oldest,
         newest + 1);
  for (unsigned tears = 0; at < end; tears++) {
    uint64_t best = 0;
    size_t best_i = 0;

    for (size_t i = oldest; i <= newest && best < end - at; i++) {
      uint64_t n = matches (s->d, version (s, i), s->found + at, at, end);

      if (n > best) {
        best = n;
        best_i = i;
      }
    }
    if (best == 0 || tears == TEARS_MAX)
      wrong (s, at, end, oldest, newest);
    settle (s, best_i, at, at + best);
    at += best;
  }
}

static void
change_active (struct sweep *s, const struct edge *e)
{
  size_t i = 0;

  while (i < s->active_count && s->active[i] < e->op)
    i++;
  if (e->begins) {
    memmove (&s->active[i + 1], &s->active[i],
             (s->active_count - i) * sizeof s->active[0]);
    s->active[i] = e->op;
    s->active_count++;
  } else {
    s->active_count--;
    memmove (&s->active[i], &s->active[i + 1],
             (s->active_count - i) * sizeof s->active[0]);
  }
}

/* Check all bytes of one disk.  With update the history becomes what is
   still open.  Returns the newest op that must have been seen. */
static uint64_t
sweep_disk (struct disk *d, const uint8_t *found, const struct rules *rules,
            bool update)
{
  struct history *h = &d->history, out = { 0 };
  size_t n = h->count;
  struct sweep s = { .d = d, .found = found, .rules = rules,
                     .out = update ? &out : NULL };
  struct edge *edges = allocate ((2 * n + 1) * sizeof *edges);
  uint64_t at = 0;

  s.active = allocate ((n + 1) * sizeof *s.active);
  s.run = allocate ((n + 1) * sizeof *s.run);
  for (size_t i = 0; i < n; i++) {
    edges[2 * i] = (struct edge){ h->op[i].offset, i, true };
    edges[2 * i + 1] = (struct edge){ h->op[i].end, i, false };
  }
  qsort (edges, 2 * n, sizeof *edges, by_place);
  for (size_t i = 0; i < 2 * n; i++) {
    if (edges[i].at > at)
      check_interval (&s, at, edges[i].at);
    at = edges[i].at;
    change_active (&s, &edges[i]);
  }
  if (at < d->size)
    check_interval (&s, at, d->size);
  if (update) {
    for (size_t i = 0; i < n; i++)
      keep (&s, i, 0, 0);
    if (out.count > 0)
      qsort (out.op, out.count, sizeof *out.op, by_id);
    free (h->op);
    *h = out;
  }
  free (edges);
  free (s.active);
  free (s.run);
  return s.newest;
}

/* ---- Reading whole disks ------------------------------------------------ */

static void
nbd_bad (const char *what)
{
  bad ("%s: %s", what, nbd_get_error ());
}

/* NULL if it cannot be had. */
static struct nbd_handle *
open_export (const char *uri, const char *export)
{
  struct nbd_handle *nbd = nbd_create ();

  if (nbd && nbd_set_opt_mode (nbd, true) == 0
      && nbd_connect_uri (nbd, uri) == 0
      && nbd_set_export_name (nbd, export) == 0 && nbd_opt_go (nbd) == 0)
    return nbd;
  nbd_close (nbd);
  return NULL;
}

/* 0, or -1 if the server would not. */
static int
read_whole (struct nbd_handle *nbd, uint8_t *buf, uint64_t size)
{
  if (nbd_get_size (nbd) != (int64_t) size)
    bad ("the export has %" PRIi64 " bytes, not %" PRIu64,
         nbd_get_size (nbd), size);
  for (uint64_t at = 0; at < size; at += READ_CHUNK) {
    uint64_t n = size - at < READ_CHUNK ? size - at : READ_CHUNK;

    if (nbd_pread (nbd, buf + at, n, at, 0) < 0)
      return -1;
  }
  return 0;
}

static void
read_status (const char *uri, const struct disk *d, struct vr_status *st)
{
  char name[2 * VR_NAME_SIZE + 2];
  struct nbd_handle *nbd;

  snprintf (name, sizeof name, "%s/%s", vm, d->name);
  nbd = open_export (uri, name);
  if (nbd == NULL || nbd_pread (nbd, st, sizeof *st, 0, 0) < 0)
    nbd_bad ("status of the backup");
  nbd_close (nbd);
  if (!vr_block_ok (st, VR_STATUS_MAGIC))
    bad ("status of the backup is damaged");
  if (st->refusal)
    bad ("status of the backup: %s", st->refusal_text);
}

/* Also that it never goes back, and is never behind what the primary says. */
static uint64_t
committed_at (const char *uri, bool *copying)
{
  struct vr_status st;
  uint64_t primary = epoch_now ()
                         ? atomic_load (
                             &vr_epoch_page (epoch)->committed_epoch)
                         : 0;

  *copying = false;
  for (size_t i = 0; i < disk_count; i++) {
    read_status (uri, &disks[i], &st);
    if ((st.flags & VR_LOG_COPYING) || st.disk_size == 0)
      *copying = true;
  }
  if (st.committed_epoch < committed_seen)
    bad ("the backup went back from epoch %" PRIu64 " to %" PRIu64,
         committed_seen, st.committed_epoch);
  if (st.committed_epoch < primary)
    bad ("the primary says %" PRIu64 " is committed, the backup has %" PRIu64,
         primary, st.committed_epoch);
  committed_seen = st.committed_epoch;
  return committed_seen;
}

/* ---- Checks of a backup and of a primary -------------------------------- */

/* All disks, each found as in found[i], at epoch k. */
static void
check_backup (uint8_t *const *found, uint64_t k)
{
  struct rules rules = { .backup = true, .epoch = k };

  /* What is visible requires what was acknowledged before it was sent. */
  for (size_t i = 0; i < disk_count; i++) {
    uint64_t newest = sweep_disk (&disks[i], found[i], &rules, false);

    if (newest > rules.since)
      rules.since = newest;
  }
  for (size_t i = 0; i < disk_count; i++)
    sweep_disk (&disks[i], found[i], &rules, true);
}

static void
free_all (uint8_t *const *found)
{
  for (size_t i = 0; i < disk_count; i++)
    free (found[i]);
}

/* Open VM/DISK@spec of every disk, then read them.  0, or -1 if it was too
   late for that epoch. */
static int
read_views (const char *uri, const char *spec, uint8_t **found)
{
  struct nbd_handle *nbd[DISKS_MAX] = { NULL };
  char name[2 * VR_NAME_SIZE + 32];
  int r = 0;

  for (size_t i = 0; i < disk_count && r == 0; i++) {
    snprintf (name, sizeof name, "%s/%s@%s", vm, disks[i].name, spec);
    nbd[i] = open_export (uri, name);
    r = nbd[i] ? 0 : -1;
  }
  for (size_t i = 0; i < disk_count && r == 0; i++)
    r = read_whole (nbd[i], found[i], disks[i].size);
  for (size_t i = 0; i < disk_count; i++)
    nbd_close (nbd[i]);
  return r;
}

static void pump (int timeout_ms, bool commands);
static void drain (void);

/* For whoever looks for the reason. */
static void
describe_members (void)
{
  struct vr_epoch_page *page = epoch_now () ? vr_epoch_page (epoch) : NULL;

  for (size_t i = 0; page && i < VR_EPOCH_MEMBERS; i++) {
    struct vr_member *m = &page->member[i];

    if (m->kind != VR_MEMBER_FREE)
      fprintf (stderr,
               "%s: state %u, copied %" PRIu64 " of %" PRIu64
               ", head %" PRIu64 ", shipped %" PRIu64 ", committed %" PRIu64
               ", applied %" PRIu64 ", reconnects %" PRIu64 "\n",
               m->name, m->state, m->copied_bytes, m->copy_bytes,
               m->head_lsn, m->shipped_lsn, m->committed_lsn, m->applied_lsn,
               m->reconnects);
  }
}

static void
live (const char *uri)
{
  uint8_t *found[DISKS_MAX];
  unsigned tries = 0;
  uint64_t k = 0;
  bool copying, was_loading = loading;
  int r = -1;

  for (size_t i = 0; i < disk_count; i++)
    found[i] = allocate (disks[i].size);
  for (; r < 0 && tries < 200; tries++) {
    char spec[24];

    k = committed_at (uri, &copying) + 2;
    if (copying) {
      pump (50, false);
      continue;
    }
    snprintf (spec, sizeof spec, "%" PRIu64, k);
    r = read_views (uri, spec, found);
    /* A journal that fills gives views up: a little quiet then. */
    if (r < 0 && tries > 2)
      drain ();
  }
  loading = was_loading;
  if (r < 0)
    describe_members ();
  if (r < 0)
    bad ("no view of the backup to be had: %s",
         copying ? "copying without end" : nbd_get_error ());
  check_backup (found, k);
  if (k > committed_seen)
    committed_seen = k;
  free_all (found);
  printf ("ok backup at epoch %" PRIu64 "\n", k);
}

static void
still (const char *uri)
{
  uint8_t *found[DISKS_MAX];
  bool copying;
  uint64_t k = committed_at (uri, &copying), before;
  unsigned tries = 0;

  if (copying) {
    printf ("ok copying\n");
    return;
  }
  for (size_t i = 0; i < disk_count; i++)
    found[i] = allocate (disks[i].size);
  /* What was under way when the primary died may commit yet. */
  do {
    if (tries++ == STILL_TRIES)
      bad ("the backup goes on to commit, though a primary is gone");
    before = k;
    if (read_views (uri, "committed", found) < 0)
      nbd_bad ("@committed");
    k = committed_at (uri, &copying);
  } while (k != before);
  check_backup (found, k);
  free_all (found);
  printf ("ok backup at epoch %" PRIu64 "\n", k);
}

static void
read_file (const char *path, uint8_t *buf, uint64_t size)
{
  int fd = open (path, O_RDONLY | O_CLOEXEC);
  struct stat st;

  if (fd < 0 || fstat (fd, &st) < 0)
    bad ("%s: %s", path, strerror (errno));
  if ((uint64_t) st.st_size != size)
    bad ("%s has %lld bytes, not %" PRIu64, path, (long long) st.st_size,
         size);
  for (uint64_t at = 0; at < size;) {
    ssize_t n = pread (fd, buf + at, size - at, (off_t) at);

    if (n <= 0)
      bad ("%s: %s", path, n ? strerror (errno) : "short");
    at += (uint64_t) n;
  }
  close (fd);
}

static void
promoted (const char *dir)
{
  uint8_t *found[DISKS_MAX];
  struct vr_epoch *page;
  char path[512];
  uint64_t k;

  snprintf (path, sizeof path, "%s/epoch", dir);
  if (vr_epoch_open_readonly (path, &page) < 0)
    bad ("%s: cannot be read", path);
  k = atomic_load (&vr_epoch_page (page)->committed_epoch);
  vr_epoch_close (page);
  if (k < committed_seen)
    bad ("promoted at epoch %" PRIu64 ", %" PRIu64 " was committed", k,
         committed_seen);
  for (size_t i = 0; i < disk_count; i++) {
    found[i] = allocate (disks[i].size);
    snprintf (path, sizeof path, "%s/%s.img", dir, disks[i].name);
    read_file (path, found[i], disks[i].size);
  }
  check_backup (found, k);
  committed_seen = k;
  free_all (found);
  printf ("ok promoted at epoch %" PRIu64 "\n", k);
}

/* Whoever is still in the history has survived, whether it was acknowledged
   or not. */
static void
adopt (struct disk *d)
{
  uint64_t max = epoch_now ();

  now_id++;
  for (size_t i = 0; i < d->history.count; i++) {
    struct op *op = &d->history.op[i];

    if (op->acked == NEVER) {
      op->acked = now_id;
      op->epoch_max = max ? max : NEVER;
    }
  }
  now_id++;
}

static uint64_t
history_bytes (const struct disk *d)
{
  uint64_t n = 0;

  for (size_t i = 0; i < d->history.count; i++)
    n += d->history.op[i].end - d->history.op[i].offset;
  return n;
}

static void
primary (struct disk *d, const char *uri)
{
  uint8_t *found = allocate (d->size);
  struct nbd_handle *nbd = open_export (uri, d->name);
  struct rules rules = { .backup = false };
  uint64_t before = history_bytes (d);

  if (nbd == NULL || read_whole (nbd, found, d->size) < 0)
    nbd_bad ("reading the primary");
  nbd_close (nbd);
  rules.since = sweep_disk (d, found, &rules, false);
  sweep_disk (d, found, &rules, true);
  adopt (d);
  free (found);
  lost_count += before - history_bytes (d);
  printf ("ok primary %s: %" PRIu64 " bytes lost\n", d->name,
          before - history_bytes (d));
}

/* Of what is acknowledged nothing may be missing. */
static void
equal (struct disk *d, const char *uri)
{
  uint8_t *found = allocate (d->size);
  struct nbd_handle *nbd = open_export (uri, d->name);
  struct rules rules = { .since = NEVER };

  if (nbd == NULL || read_whole (nbd, found, d->size) < 0)
    nbd_bad ("reading the primary");
  nbd_close (nbd);
  sweep_disk (d, found, &rules, false);
  free (found);
  printf ("ok equal\n");
}

/* ---- Load --------------------------------------------------------------- */

static bool
is_connected (const struct disk *d)
{
  return d->nbd[0] != NULL;
}

/* Compare what was read with all that is known of the range. */
static void
check_read (const struct slot *s)
{
  const struct disk *d = s->disk;
  uint8_t *want = allocate (s->end - s->offset);

  memcpy (want, d->base + s->offset, s->end - s->offset);
  for (size_t i = 0; i < d->history.count; i++) {
    const struct op *op = &d->history.op[i];
    uint64_t from = op->offset > s->offset ? op->offset : s->offset;
    uint64_t to = op->end < s->end ? op->end : s->end;

    if (from >= to)
      continue;
    if (op->kind == OP_WRITE)
      fill (want + (from - s->offset), op->id, from, to);
    else
      memset (want + (from - s->offset), 0, to - from);
  }
  if (memcmp (want, s->buf, s->end - s->offset) != 0)
    bad ("%s: a read of [%" PRIu64 ", %" PRIu64 ") is wrong at %" PRIu64,
         d->name, s->offset, s->end,
         s->offset + same_bytes (want, s->buf, s->end - s->offset));
  free (want);
}

/* libnbd's callback: nothing may be called from here. */
static int
on_answer (void *opaque, int *error)
{
  struct slot *s = opaque;

  now_id++;
  s->error = *error;
  if (*error == 0 && s->kind == OP_READ)
    check_read (s);
  else if (*error == 0 && s->kind == OP_FLUSH) {
    if (s->id > s->disk->flush_sent)
      s->disk->flush_sent = s->id;
  } else if (*error == 0)
    acknowledge (&s->disk->history, s->id, s->fua);
  if (*error == 0)
    acked_count++;
  if (s->chained)
    chain_busy = false;
  s->busy = false;
  return 1;
}

static void
give_up (struct disk *d)
{
  for (size_t c = 0; c < CONNS; c++) {
    nbd_close (d->nbd[c]); /* answers what is in flight with an error */
    d->nbd[c] = NULL;
  }
  for (size_t i = 0; i < SLOTS; i++) {
    d->slot[i].busy = false;
    d->slot[i].error = 0;
  }
  d->closing = false;
}

static bool
overlaps_flight (const struct disk *d, uint64_t offset, uint64_t end)
{
  for (size_t i = 0; i < SLOTS; i++)
    if (d->slot[i].busy && d->slot[i].kind != OP_FLUSH
        && d->slot[i].offset < end && offset < d->slot[i].end)
      return true;
  return false;
}

/* 1 byte to OP_MAX; mostly small, as a guest's. */
static uint64_t
draw_length (enum kind kind)
{
  uint64_t p = draw (100);

  if (kind == OP_ZERO || kind == OP_TRIM)
    return 1 + draw (p < 5 ? ZERO_MAX : p < 60 ? 65536 : 4096);
  return p < 30   ? 1 + draw (4096)
         : p < 70 ? 4096 * (1 + draw (4))
         : p < 96 ? 1 + draw (65536)
                  : 1 + draw (OP_MAX);
}

static enum kind
draw_kind (void)
{
  uint64_t p = draw (100);

  return p < 72   ? OP_WRITE
         : p < 79 ? OP_ZERO
         : p < 86 ? OP_TRIM
         : p < 95 ? OP_READ
                  : OP_FLUSH;
}

static void
send_op (struct slot *s)
{
  struct nbd_handle *nbd = s->disk->nbd[draw (CONNS)];
  nbd_completion_callback done = { .callback = on_answer, .user_data = s };
  uint64_t n = s->end - s->offset;
  uint32_t fua = s->fua ? LIBNBD_CMD_FLAG_FUA : 0;

  s->id = ++now_id;
  s->busy = true;
  s->error = 0;
  sent_count++;
  if (s->kind == OP_WRITE || s->kind == OP_ZERO || s->kind == OP_TRIM) {
    struct op op = { .id = s->id, .acked = NEVER, .offset = s->offset,
                     .end = s->end, .epoch_min = epoch_now (),
                     .epoch_max = NEVER, .kind = s->kind };

    push (&s->disk->history, &op);
  }
  if (s->buf_size < n && (s->kind == OP_WRITE || s->kind == OP_READ)) {
    free (s->buf);
    s->buf = allocate (n);
    s->buf_size = n;
  }
  switch (s->kind) {
  case OP_WRITE:
    fill (s->buf, s->id, s->offset, s->end);
    nbd_aio_pwrite (nbd, s->buf, n, s->offset, done, fua);
    break;
  case OP_ZERO:
    nbd_aio_zero (nbd, n, s->offset, done,
                  fua
                      | (draw (2) ? LIBNBD_CMD_FLAG_NO_HOLE : 0)
                      | (draw (2) ? LIBNBD_CMD_FLAG_FAST_ZERO : 0));
    break;
  case OP_TRIM:
    nbd_aio_trim (nbd, n, s->offset, done, fua);
    break;
  case OP_READ:
    nbd_aio_pread (nbd, s->buf, n, s->offset, done, 0);
    break;
  case OP_FLUSH:
    nbd_aio_flush (nbd, done, 0);
    break;
  }
  /* A failure to send is a dead connection, which the next poll sees. */
}

static void
start_op (struct disk *d, struct slot *s)
{
  s->disk = d;
  s->chained = false;
  s->kind = draw_kind ();
  s->fua = s->kind != OP_READ && s->kind != OP_FLUSH && draw (40) == 0;
  s->offset = s->end = 0;
  if (s->kind != OP_FLUSH) {
    uint64_t n = draw_length (s->kind);

    s->offset = CLOCK_AREA + draw (d->size - CLOCK_AREA - n);
    if (draw (2) && s->offset >= 4096 + CLOCK_AREA)
      s->offset -= s->offset % 4096;
    if (draw (50) == 0)
      s->offset = d->size - n; /* the last byte too */
    s->end = s->offset + n;
    if (overlaps_flight (d, s->offset, s->end))
      return;
  }
  send_op (s);
}

/* Small writes that go round the disks, one after the other was
   acknowledged: the finest order there is. */
static void
start_chained (struct disk *d, struct slot *s)
{
  s->disk = d;
  s->chained = true;
  s->kind = OP_WRITE;
  s->fua = false;
  s->offset = 0;
  s->end = 64;
  chain_busy = true;
  chain_disk = (chain_disk + 1) % disk_count;
  send_op (s);
}

/* May one more request go out?  The pace differs from time to time: with a
   slow one the open epoch holds a single write, with a fast one the journal
   fills. */
static bool
in_pace (struct disk *d)
{
  uint64_t now = now_ms ();

  if (now >= d->pace_end) {
    d->pace = 1 + draw (PACE_MAX);
    d->pace_end = now + PACE_MS;
    d->pace_sent = 0;
  }
  if (d->pace_sent > d->pace * (PACE_MS - (d->pace_end - now)) / PACE_MS)
    return false;
  d->pace_sent++;
  return true;
}

static void
start_some (struct disk *d)
{
  for (size_t i = 0; i < SLOTS; i++)
    if (!d->slot[i].busy && d->nbd[0] && in_pace (d)) {
      if (!chain_busy && &disks[chain_disk] == d)
        start_chained (d, &d->slot[i]);
      else
        start_op (d, &d->slot[i]);
    }
  if (!chain_busy && !is_connected (&disks[chain_disk]))
    chain_disk = (chain_disk + 1) % disk_count;
}

/* A dead connection means that the server was killed; any other error is
   one. */
static void
look_for_errors (struct disk *d)
{
  bool dead = false;

  for (size_t c = 0; c < CONNS; c++)
    if (nbd_aio_is_dead (d->nbd[c]) > 0 || nbd_aio_is_closed (d->nbd[c]) > 0)
      dead = true;
  for (size_t i = 0; i < SLOTS && !dead; i++)
    if (!d->slot[i].busy && d->slot[i].error
        && !(d->closing && d->slot[i].error == ESHUTDOWN))
      bad ("%s: %s of [%" PRIu64 ", %" PRIu64 ") failed: %s", d->name,
           kind_name (d->slot[i].kind), d->slot[i].offset, d->slot[i].end,
           strerror (d->slot[i].error));
  if (dead)
    give_up (d);
}

static bool command_waits;

/* Move bytes for at most timeout_ms, or until there is a command. */
static void
pump_once (int timeout_ms, bool commands)
{
  struct pollfd fds[1 + DISKS_MAX * CONNS];
  struct nbd_handle *of[1 + DISKS_MAX * CONNS];
  nfds_t n = 1;

  fds[0] = (struct pollfd){ .fd = commands ? STDIN_FILENO : -1,
                            .events = POLLIN };
  for (size_t i = 0; i < disk_count; i++) {
    if (is_connected (&disks[i]))
      look_for_errors (&disks[i]);
    if (loading && is_connected (&disks[i]) && !disks[i].closing)
      start_some (&disks[i]);
    for (size_t c = 0; c < CONNS && is_connected (&disks[i]); c++) {
      unsigned dir = nbd_aio_get_direction (disks[i].nbd[c]);

      of[n] = disks[i].nbd[c];
      fds[n] = (struct pollfd){ .fd = nbd_aio_get_fd (of[n]) };
      if (dir & LIBNBD_AIO_DIRECTION_READ)
        fds[n].events |= POLLIN;
      if (dir & LIBNBD_AIO_DIRECTION_WRITE)
        fds[n].events |= POLLOUT;
      n++;
    }
  }
  if (poll (fds, n, timeout_ms) < 0 && errno != EINTR)
    bad ("poll: %s", strerror (errno));
  command_waits = commands && (fds[0].revents & (POLLIN | POLLHUP));
  for (nfds_t i = 1; i < n; i++) {
    unsigned dir = nbd_aio_get_direction (of[i]);
    short got = fds[i].revents;

    if ((dir & LIBNBD_AIO_DIRECTION_READ)
        && (got & (POLLIN | POLLHUP | POLLERR)))
      nbd_aio_notify_read (of[i]);
    else if ((dir & LIBNBD_AIO_DIRECTION_WRITE)
             && (got & (POLLOUT | POLLHUP | POLLERR)))
      nbd_aio_notify_write (of[i]);
  }
}

static void
pump (int timeout_ms, bool commands)
{
  uint64_t end = now_ms () + (uint64_t) timeout_ms, now;

  command_waits = false;
  while (!command_waits && (now = now_ms ()) < end)
    pump_once ((int) (end - now < STEP_MS ? end - now : STEP_MS), commands);
}

static bool
anything_busy (void)
{
  for (size_t i = 0; i < disk_count; i++)
    for (size_t k = 0; k < SLOTS; k++)
      if (disks[i].slot[k].busy)
        return true;
  return false;
}

static void
drain (void)
{
  uint64_t end = now_ms () + 60000;

  loading = false;
  while (anything_busy ()) {
    if (now_ms () > end)
      bad ("requests were not answered for a minute");
    pump_once (20, false);
  }
  pump_once (0, false);
}

static void
flush_all (void)
{
  drain ();
  for (size_t i = 0; i < disk_count; i++) {
    struct slot *s = &disks[i].slot[0];

    if (!is_connected (&disks[i]))
      bad ("%s is not connected", disks[i].name);
    *s = (struct slot){ .disk = &disks[i], .kind = OP_FLUSH, .buf = s->buf,
                        .buf_size = s->buf_size };
    send_op (s);
  }
  drain ();
}

static void
load (struct disk *d, const char *uri)
{
  give_up (d);
  for (size_t c = 0; c < CONNS; c++) {
    /* A server that was killed the moment before is not our subject. */
    d->nbd[c] = open_export (uri, d->name);
    if (d->nbd[c] == NULL) {
      give_up (d);
      printf ("ok, but it is gone\n");
      return;
    }
    nbd_set_strict_mode (d->nbd[c], 0);
  }
  if (nbd_can_multi_conn (d->nbd[0]) <= 0)
    bad ("no multi-conn");
  loading = true;
  printf ("ok loading\n");
}

/* ---- Commands ----------------------------------------------------------- */

static struct disk *
disk_arg (unsigned long i)
{
  if (i >= disk_count)
    bad ("there is no disk %lu", i);
  return &disks[i];
}

static void
obey (const char *line)
{
  char verb[32] = "", word[400] = "", uri[400] = "";
  unsigned long n;

  sscanf (line, "%31s %399s %399s", verb, word, uri);
  n = strtoul (word, NULL, 10);
  if (strcmp (verb, "load") == 0)
    load (disk_arg (n), uri);
  else if (strcmp (verb, "gone") == 0) {
    give_up (disk_arg (n));
    printf ("ok\n");
  } else if (strcmp (verb, "closing") == 0) {
    disk_arg (n)->closing = true;
    printf ("ok\n");
  } else if (strcmp (verb, "wait") == 0) {
    pump ((int) n, false);
    printf ("ok\n");
  } else if (strcmp (verb, "drain") == 0) {
    drain ();
    printf ("ok\n");
  } else if (strcmp (verb, "flush") == 0) {
    flush_all ();
    printf ("ok\n");
  } else if (strcmp (verb, "primary") == 0)
    primary (disk_arg (n), uri);
  else if (strcmp (verb, "equal") == 0)
    equal (disk_arg (n), uri);
  else if (strcmp (verb, "live") == 0)
    live (word);
  else if (strcmp (verb, "still") == 0)
    still (word);
  else if (strcmp (verb, "promoted") == 0)
    promoted (word);
  else if (strcmp (verb, "count") == 0)
    printf ("ok %" PRIu64 " requests sent, %" PRIu64 " acknowledged, %" PRIu64
            " bytes lost unflushed\n",
            sent_count, acked_count, lost_count);
  else
    bad ("unknown command: %s", line);
}

static void
add_disk (char *arg)
{
  struct disk *d = &disks[disk_count++];
  char *image = strchr (arg, '=');
  struct stat st;

  if (image == NULL || disk_count > DISKS_MAX)
    bad ("%s: expected DISK=IMAGE", arg);
  *image++ = 0;
  d->name = arg;
  if (stat (image, &st) < 0)
    bad ("%s: %s", image, strerror (errno));
  d->size = (uint64_t) st.st_size;
  if (d->size < CLOCK_AREA + ZERO_MAX + 1)
    bad ("%s: too small", image);
  d->base = allocate (d->size);
  read_file (image, d->base, d->size);
}

int
main (int argc, char *argv[])
{
  char line[1024];

  setvbuf (stdout, NULL, _IOLBF, 0);
  setvbuf (stdin, NULL, _IONBF, 0);
  if (argc < 6)
    bad ("usage: observer SEED EPOCH-FILE flush=local|remote VM DISK=IMAGE…");
  random_state = strtoull (argv[1], NULL, 10) * 2 + 1;
  epoch_path = argv[2];
  flush_remote = strcmp (argv[3], "flush=remote") == 0;
  vm = argv[4];
  for (int i = 5; i < argc; i++)
    add_disk (argv[i]);
  for (;;) {
    pump (1000, true);
    if (!command_waits)
      continue;
    if (fgets (line, sizeof line, stdin) == NULL)
      return 0;
    obey (line);
  }
}
