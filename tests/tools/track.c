/* SPDX-License-Identifier: BSD-3-Clause */
/* memsync's tracking against the truth, on a running QEMU.
 *
 *   track list PID QMP
 *     Prints the RAM blocks: name, size, address, shared or private.
 *   track check PID QMP ROUNDS MS [runs]
 *     Attaches, copies the RAM, and after each MS milliseconds of the guest's
 *     running takes the pages that the tracker reports through the page
 *     coding into the copy: the copy must then be the guest's RAM.
 *   track die PID QMP CONSOLE COUNT
 *     COUNT times: attaches and tracks in a process that is killed at some
 *     moment; no thread of QEMU may stay stopped, and CONSOLE must grow,
 *     within 100 ms in the median.
 *   track probe
 *     Can this kernel, and may we, track a process?
 *   track refuse PID QMP
 *     Prints why this QEMU is refused; fails if it is not.
 *
 * VMREP_SEED=n chooses the moments.  Exit status: 0 well, 1 not.
 */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "memsync/attach.h"
#include "memsync/delta.h"
#include "memsync/ram.h"
#include "memsync/track.h"

#define TIMEOUT_MS 10000
#define CHUNK (UINT64_C (1) << 20)

struct guest {
  pid_t pid;
  struct vr_qmp *qmp;
  struct vr_ram ram;
  uint64_t *pages;  /* of each block; 0 for a ROM that was not found */
  uint8_t **image;  /* the copy, by block */
  struct vr_encoder *encoder;
  struct vr_tracker *tracker;
};

static void __attribute__ ((noreturn, format (printf, 1, 2)))
die (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  fputs ("track: ", stderr);
  vfprintf (stderr, format, args);
  fputc ('\n', stderr);
  va_end (args);
  exit (1);
}

static uint64_t
now_us (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * 1000000 + (uint64_t) t.tv_nsec / 1000;
}

/* ---- QEMU --------------------------------------------------------------- */

static void
command (const struct guest *g, const char *name)
{
  struct vr_qmp_error error;

  if (vr_qmp_command (g->qmp, name, NULL, TIMEOUT_MS, NULL, &error) < 0)
    die ("%s", error.text);
}

static void
open_guest (struct guest *g, const char *pid, const char *qmp)
{
  struct vr_qmp_error error;

  memset (g, 0, sizeof *g);
  g->pid = (pid_t) strtol (pid, NULL, 10);
  if (vr_qmp_connect (qmp, TIMEOUT_MS, &g->qmp, &error) < 0)
    die ("%s", error.text);
}

static void
close_guest (struct guest *g)
{
  for (unsigned i = 0; i < g->ram.count && g->image; i++)
    free (g->image[i]);
  free (g->image);
  free (g->pages);
  vr_encoder_free (g->encoder);
  vr_ram_free (&g->ram);
  vr_qmp_close (g->qmp);
}

static void
find_ram (struct guest *g)
{
  struct vr_problem problem;

  if (vr_ram_check (g->qmp, &problem) < 0
      || vr_ram_find (g->qmp, g->pid, &g->ram, &problem) < 0)
    die ("%s", problem.text);
}

static int
list (const struct guest *g)
{
  for (unsigned i = 0; i < g->ram.count; i++) {
    const struct vr_ram_block *b = &g->ram.blocks[i];

    printf ("block %s %" PRIu64 " 0x%" PRIx64 " %s\n", b->name, b->size,
            b->address, b->address == 0 ? "rom" : b->shared ? "shared"
                                                            : "private");
  }
  return 0;
}

static void
read_ram (const struct guest *g, uint32_t block, uint64_t offset,
          uint64_t length, uint8_t *to)
{
  struct iovec here = { to, length };
  struct iovec there = {
    (void *) (uintptr_t) (g->ram.blocks[block].address + offset), length };

  if (process_vm_readv (g->pid, &here, 1, &there, 1, 0) != (ssize_t) length)
    die ("reading %s: %s", g->ram.blocks[block].name, strerror (errno));
}

/* ---- The tracker -------------------------------------------------------- */

static struct vr_tracker *
start_tracker (const struct guest *g, bool runs, uint64_t *ret_stopped_ns)
{
  struct vr_attach_times times = { 0 };
  struct vr_problem problem;
  struct vr_tracker *t;
  int uffd;

  if (vr_attach_qemu (g->pid, g->qmp, &uffd, &times, &problem) < 0
      || vr_tracker_uffd (g->pid, uffd, &g->ram, runs, &t, &problem) < 0
      || t->ops->begin (t, &problem) < 0)
    die ("%s", problem.text);
  *ret_stopped_ns = times.stopped_ns;
  return t;
}

/* ---- Check -------------------------------------------------------------- */

static int
apply (void *opaque, const void *payload, uint32_t size)
{
  static uint8_t scratch[VR_DELTA_BODY_MAX];
  const struct guest *g = opaque;
  const struct vr_ram_layout layout = { g->ram.count, g->pages };
  const struct vr_delta_apply a
    = { vr_delta_write_mapped, vr_delta_zero_mapped, g->image };

  return vr_delta_decode (payload, size, &layout, scratch, &a);
}

static void
open_image (struct guest *g)
{
  const struct vr_delta_config config = { VR_SHADOW_FULL, true, apply, g };
  struct vr_ram_layout layout = { g->ram.count, NULL };

  g->pages = calloc (g->ram.count, sizeof *g->pages);
  g->image = calloc (g->ram.count, sizeof *g->image);
  if (!g->pages || !g->image)
    die ("out of memory");
  for (unsigned i = 0; i < g->ram.count; i++)
    if (g->ram.blocks[i].address != 0) {
      g->pages[i] = g->ram.blocks[i].size / VR_PAGE_SIZE;
      g->image[i] = malloc (g->ram.blocks[i].size);
      if (!g->image[i])
        die ("out of memory");
    }
  layout.pages = g->pages;
  if (vr_encoder_new (&layout, &config, &g->encoder) < 0)
    die ("out of memory");
}

static void
send_run (const struct guest *g, const struct vr_run *run)
{
  static uint8_t buffer[CHUNK];

  for (uint64_t i = 0; i < run->pages; i += CHUNK / VR_PAGE_SIZE) {
    const uint64_t left = run->pages - i;
    const uint64_t n
      = left < CHUNK / VR_PAGE_SIZE ? left : CHUNK / VR_PAGE_SIZE;

    read_ram (g, run->block, (run->page + i) * VR_PAGE_SIZE,
              n * VR_PAGE_SIZE, buffer);
    if (vr_encoder_pages (g->encoder, run->block, run->page + i, n, buffer)
        < 0)
      die ("encoding failed");
  }
}

static void
send_all (const struct guest *g)
{
  for (uint32_t i = 0; i < g->ram.count; i++) {
    const struct vr_run all = { i, 0, g->pages[i] };

    send_run (g, &all);
  }
}

/* Pages of the image that are not the guest's. */
static uint64_t
count_wrong (const struct guest *g)
{
  static uint8_t buffer[CHUNK];
  uint64_t wrong = 0;

  for (uint32_t i = 0; i < g->ram.count; i++)
    for (uint64_t at = 0; at < g->pages[i] * VR_PAGE_SIZE; at += CHUNK) {
      const uint64_t left = g->pages[i] * VR_PAGE_SIZE - at;
      const uint64_t n = left < CHUNK ? left : CHUNK;

      read_ram (g, i, at, n, buffer);
      for (uint64_t k = 0; k < n; k += VR_PAGE_SIZE)
        if (memcmp (buffer + k, g->image[i] + at + k, VR_PAGE_SIZE) != 0) {
          printf ("missed: %s page %" PRIu64 "\n", g->ram.blocks[i].name,
                  (at + k) / VR_PAGE_SIZE);
          wrong++;
        }
    }
  return wrong;
}

static uint64_t
play_round (const struct guest *g, unsigned ms, struct vr_dirty *dirty,
            uint64_t *ret_changed)
{
  struct vr_delta_stats before, after;
  uint64_t begin, collect_us, wrong;

  command (g, "cont");
  usleep (ms * 1000);
  command (g, "stop");
  begin = now_us ();
  if (g->tracker->ops->collect (g->tracker, dirty) < 0)
    die ("collecting failed");
  collect_us = now_us () - begin;
  vr_encoder_stats (g->encoder, &before);
  for (size_t i = 0; i < dirty->count; i++)
    send_run (g, &dirty->runs[i]);
  if (vr_encoder_flush (g->encoder) < 0)
    die ("encoding failed");
  vr_encoder_stats (g->encoder, &after);
  wrong = count_wrong (g);
  *ret_changed = dirty->pages - (after.unchanged - before.unchanged);
  printf ("round: reported %" PRIu64 " in %zu runs, changed %" PRIu64
          ", sent %" PRIu64 " bytes, missed %" PRIu64 ", collect %" PRIu64
          " us\n",
          dirty->pages, dirty->count, *ret_changed,
          after.payload_bytes - before.payload_bytes, wrong, collect_us);
  return wrong;
}

static int
check (struct guest *g, unsigned rounds, unsigned ms, bool runs)
{
  uint64_t wrong = 0, changed, all_changed = 0, stopped_ns;
  struct vr_dirty dirty = { 0 };

  open_image (g);
  command (g, "stop");
  g->tracker = start_tracker (g, runs, &stopped_ns);
  printf ("attached: a thread was stopped for %" PRIu64 " us\n",
          stopped_ns / 1000);
  send_all (g);
  for (unsigned i = 0; i < rounds; i++) {
    wrong += play_round (g, ms, &dirty, &changed);
    all_changed += changed;
  }
  g->tracker->ops->end (g->tracker);
  command (g, "cont");
  vr_dirty_free (&dirty);
  if (wrong > 0 || all_changed == 0)
    die ("%" PRIu64 " pages missed, %" PRIu64 " seen", wrong, all_changed);
  return 0;
}

/* ---- Die ---------------------------------------------------------------- */

/* Does any thread stand in a trace stop? */
static bool
is_any_stopped (pid_t pid)
{
  char path[64], line[256];
  bool stopped = false;
  struct dirent *e;
  DIR *d;
  FILE *f;

  snprintf (path, sizeof path, "/proc/%d/task", (int) pid);
  d = opendir (path);
  if (!d)
    die ("QEMU is gone");
  while ((e = readdir (d))) {
    snprintf (path, sizeof path, "/proc/%d/task/%.20s/stat", (int) pid,
              e->d_name);
    f = e->d_name[0] == '.' ? NULL : fopen (path, "r");
    if (!f)
      continue;
    if (fgets (line, sizeof line, f)) {
      const char *state = strrchr (line, ')');

      stopped |= state && (state[2] == 't' || state[2] == 'T');
    }
    fclose (f);
  }
  closedir (d);
  return stopped;
}

static off_t
size_of (const char *path)
{
  struct stat s;

  if (stat (path, &s) == -1)
    die ("%s: %s", path, strerror (errno));
  return s.st_size;
}

/* How long until the console grows, in us; at most 5 s. */
static uint64_t
time_to_tick (pid_t pid, const char *console)
{
  const uint64_t begin = now_us ();
  const off_t size = size_of (console);

  while (size_of (console) <= size) {
    if (now_us () - begin > 100000 && is_any_stopped (pid))
      die ("a thread of QEMU was left stopped");
    if (now_us () - begin > 5000000)
      die ("the guest does not go on");
    usleep (500);
  }
  return now_us () - begin;
}

static void __attribute__ ((noreturn))
track_forever (const struct guest *g)
{
  struct vr_dirty dirty = { 0 };
  struct vr_tracker *t;
  uint64_t stopped_ns;

  for (;;) {
    t = start_tracker (g, false, &stopped_ns);
    t->ops->collect (t, &dirty);
    t->ops->end (t);
  }
}

static int
compare (const void *a, const void *b)
{
  const uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;

  return x < y ? -1 : x > y;
}

static int
die_often (struct guest *g, const char *console, unsigned count)
{
  const char *seed = getenv ("VMREP_SEED");
  uint64_t *times = calloc (count + 1, sizeof *times);

  if (!times)
    die ("out of memory");
  srandom (seed ? (unsigned) strtoul (seed, NULL, 10) : 1);
  for (unsigned i = 0; i < count; i++) {
    const pid_t pid = fork ();
    int status;

    if (pid == 0)
      track_forever (g);
    usleep ((useconds_t) random () % 4000);
    kill (pid, SIGKILL);
    waitpid (pid, &status, 0);
    if (WIFEXITED (status))
      die ("attaching failed");
    times[i] = time_to_tick (g->pid, console);
  }
  qsort (times, count, sizeof *times, compare);
  printf ("next tick after %" PRIu64 " us (median), %" PRIu64 " us (last)\n",
          times[count / 2], times[count - 1]);
  /* The median, as others use this machine too. */
  if (times[count / 2] > 100000)
    die ("the guest takes too long to go on");
  free (times);
  return 0;
}

/* Track a child, of which nothing is said to be RAM. */
static int
probe (void)
{
  const struct vr_ram none = { 0 };
  struct vr_problem problem = { "" };
  struct vr_tracker *t;
  const pid_t pid = fork ();
  int uffd, err;

  if (pid == 0) {
    pause ();
    _exit (0);
  }
  err = vr_attach (pid, &uffd, NULL, &problem);
  if (err == 0)
    err = vr_tracker_uffd (pid, uffd, &none, false, &t, &problem);
  if (err == 0) {
    err = t->ops->begin (t, &problem);
    t->ops->end (t);
  }
  kill (pid, SIGKILL);
  waitpid (pid, NULL, 0);
  if (err < 0)
    die ("%s", problem.text);
  return 0;
}

/* ---- Main --------------------------------------------------------------- */

static int
refuse (const struct guest *g)
{
  struct vr_problem problem;

  if (vr_ram_check (g->qmp, &problem) == 0)
    die ("not refused");
  puts (problem.text);
  return 0;
}

static int
run (struct guest *g, const char *what, int argc, char *argv[])
{
  if (strcmp (what, "refuse") == 0)
    return refuse (g);
  find_ram (g);
  if (strcmp (what, "list") == 0)
    return list (g);
  if (strcmp (what, "check") == 0 && argc > 5)
    return check (g, (unsigned) atoi (argv[4]), (unsigned) atoi (argv[5]),
                  argc > 6);
  if (strcmp (what, "die") == 0 && argc > 5)
    return die_often (g, argv[4], (unsigned) atoi (argv[5]));
  die ("see the head of tests/tools/track.c");
}

int
main (int argc, char *argv[])
{
  struct guest g;
  int status;

  setvbuf (stdout, NULL, _IOLBF, 0);
  if (argc > 1 && strcmp (argv[1], "probe") == 0)
    return probe ();
  if (argc <= 3)
    die ("see the head of tests/tools/track.c");
  open_guest (&g, argv[2], argv[3]);
  status = run (&g, argv[1], argc, argv);
  close_guest (&g);
  return status;
}
