/* SPDX-License-Identifier: BSD-3-Clause */
/* Watches one disk's slot in an epoch file, for bench/run.
 *
 *   epoch-watch protected FILE SECONDS   wait for the initial copy
 *   epoch-watch drained FILE SECONDS     wait until all is committed, applied
 *   epoch-watch commits FILE             until SIGTERM; then one JSON object
 *
 * Exit status 1: time is up, or the file cannot be read.
 *
 * `commits` looks every millisecond whether there was a commit, and takes of
 * each one that it sees
 *   commit   from the cut of the epoch to its commit
 *   age      from the cut before, when the epoch's oldest possible write was
 *            made, to its commit.  Not for the first, nor after one missed.
 * Commits that came between two looks are counted as missed.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "journal/epoch.h"

#define SAMPLES_MAX 1000000
#define POLL_NS 1000000
#define WAIT_NS 20000000

/* What an idle primary seals between two looks is not worth waiting for. */
#define DRAINED_BYTES (UINT64_C (128) << 10)
#define DRAINED_LOOKS 10

struct samples {
  size_t n;
  uint64_t ns[SAMPLES_MAX];
};

static struct samples commit_samples, age_samples;
static volatile sig_atomic_t stop;

static void
on_signal (int sig)
{
  (void) sig;
  stop = 1;
}

static void
sleep_until (struct timespec *t, long step_ns)
{
  t->tv_nsec += step_ns;
  if (t->tv_nsec >= 1000000000) {
    t->tv_nsec -= 1000000000;
    t->tv_sec++;
  }
  clock_nanosleep (CLOCK_MONOTONIC, TIMER_ABSTIME, t, NULL);
}

static struct vr_member *
find_disk (struct vr_epoch *e)
{
  struct vr_epoch_page *page = vr_epoch_page (e);

  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++)
    if (atomic_load (&page->member[i].kind) == VR_MEMBER_DISK)
      return &page->member[i];
  return NULL;
}

/* ---- Waiting ------------------------------------------------------------ */

static bool
is_protected (struct vr_member *m)
{
  return atomic_load (&m->state) == VR_STATE_PROTECTED;
}

static bool
is_drained (struct vr_member *m)
{
  uint64_t applied = atomic_load (&m->applied_lsn);
  uint64_t head = atomic_load (&m->head_lsn);

  return is_protected (m) && head - applied < DRAINED_BYTES;
}

/* The slot is brought up to date at each cut only: believe nothing before it
   was true for a while. */
static int
wait_for (struct vr_member *m, bool (*done) (struct vr_member *),
          unsigned looks, double seconds)
{
  struct timespec t;
  unsigned in_a_row = 0;

  clock_gettime (CLOCK_MONOTONIC, &t);
  for (double left = seconds; left > 0; left -= WAIT_NS / 1e9) {
    in_a_row = done (m) ? in_a_row + 1 : 0;
    if (in_a_row >= looks)
      return 0;
    sleep_until (&t, WAIT_NS);
  }
  fprintf (stderr, "epoch-watch: after %g s: state %u, %llu bytes copied of "
           "%llu, %llu bytes not applied\n", seconds, atomic_load (&m->state),
           (unsigned long long) atomic_load (&m->copied_bytes),
           (unsigned long long) atomic_load (&m->copy_bytes),
           (unsigned long long) (atomic_load (&m->head_lsn)
                                 - atomic_load (&m->applied_lsn)));
  return 1;
}

/* ---- Sampling commits --------------------------------------------------- */

static void
add (struct samples *s, uint64_t ns)
{
  if (s->n < SAMPLES_MAX)
    s->ns[s->n++] = ns;
}

static int
compare (const void *a, const void *b)
{
  uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;

  return x < y ? -1 : x > y;
}

static double
quantile_ms (const struct samples *s, double q)
{
  if (s->n == 0)
    return 0;
  return (double) s->ns[(size_t) (q * (double) (s->n - 1) + 0.5)] / 1e6;
}

static void
print_samples (const char *name, struct samples *s)
{
  qsort (s->ns, s->n, sizeof s->ns[0], compare);
  printf ("\"%s_ms\":{\"p50\":%.3f,\"p99\":%.3f,\"max\":%.3f}", name,
          quantile_ms (s, 0.5), quantile_ms (s, 0.99), quantile_ms (s, 1));
}

static int
sample_commits (struct vr_member *m)
{
  uint64_t seen = atomic_load (&m->commits), first = seen, missed = 0;
  uint64_t seen_time = atomic_load (&m->commit_time_ns), cut = 0;
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  while (!stop) {
    uint64_t time, commits, ns;

    sleep_until (&t, POLL_NS);
    /* The primary writes commit_time_ns last. */
    time = atomic_load (&m->commit_time_ns);
    if (time == seen_time)
      continue;
    ns = atomic_load (&m->commit_ns);
    commits = atomic_load (&m->commits);
    add (&commit_samples, ns);
    if (cut && commits == seen + 1)
      add (&age_samples, time - cut);
    missed += commits > seen ? commits - seen - 1 : 0;
    cut = time - ns;
    seen = commits;
    seen_time = time;
  }
  printf ("{\"commits\":%llu,\"missed\":%llu,",
          (unsigned long long) (seen - first), (unsigned long long) missed);
  print_samples ("commit", &commit_samples);
  printf (",");
  print_samples ("age", &age_samples);
  printf ("}\n");
  return 0;
}

/* ---- Command line ------------------------------------------------------- */

static int
usage (void)
{
  fprintf (stderr, "usage: epoch-watch protected|drained FILE SECONDS\n"
                   "       epoch-watch commits FILE\n");
  return 2;
}

int
main (int argc, char **argv)
{
  struct sigaction sa = { .sa_handler = on_signal };
  struct vr_epoch *e;
  struct vr_member *m;
  int err;

  if (argc < 3)
    return usage ();
  sigaction (SIGTERM, &sa, NULL);
  sigaction (SIGINT, &sa, NULL);
  err = vr_epoch_open_readonly (argv[2], &e);
  if (err < 0) {
    fprintf (stderr, "epoch-watch: %s: %s\n", argv[2], strerror (-err));
    return 1;
  }
  m = find_disk (e);
  if (m == NULL) {
    fprintf (stderr, "epoch-watch: %s: has no disk\n", argv[2]);
    return 1;
  }
  if (strcmp (argv[1], "commits") == 0 && argc == 3)
    return sample_commits (m);
  if (strcmp (argv[1], "protected") == 0 && argc == 4)
    return wait_for (m, is_protected, 1, atof (argv[3]));
  if (strcmp (argv[1], "drained") == 0 && argc == 4)
    return wait_for (m, is_drained, DRAINED_LOOKS, atof (argv[3]));
  return usage ();
}
