/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep status: find out what each target is, sample it, print it. */
#include "status.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/stat.h>

#include "io.h"
#include "vmrep.h"

/* ---- Sampling ----------------------------------------------------------- */

/* DIR/VM/epoch names the same as DIR/VM. */
static int
collect_file (const char *path, json_t *vms, char *why, size_t why_size)
{
  const char *slash = strrchr (path, '/');
  char *dir = slash ? text_of ("%.*s", (int) (slash - path), path)
                    : text_of (".");
  char *lock = text_of ("%s/lock", dir);
  int err;

  if (strcmp (slash ? slash + 1 : path, "epoch") == 0
      && access (lock, F_OK) == 0)
    err = collect_folder (dir, vms, why, why_size);
  else
    err = collect_primary (path, vms, why, why_size);
  free (lock);
  free (dir);
  return err;
}

static int
collect (const char *target, json_t *vms, char *why, size_t why_size)
{
  struct stat st;

  if (strstr (target, "://"))
    return collect_backup (target, vms, why, why_size);
  if (stat (target, &st) == 0 && S_ISDIR (st.st_mode))
    return collect_folder (target, vms, why, why_size);
  return collect_file (target, vms, why, why_size);
}

static void
set_time (json_t *sample)
{
  struct timespec t;
  struct tm tm;
  char text[40];

  clock_gettime (CLOCK_REALTIME, &t);
  gmtime_r (&t.tv_sec, &tm);
  strftime (text, sizeof text, "%Y-%m-%dT%H:%M:%S", &tm);
  snprintf (text + strlen (text), sizeof text - strlen (text), ".%03ldZ",
            t.tv_nsec / 1000000);
  set_text (sample, "time", text);
}

/* One look at all targets. */
static json_t *
take_sample (const struct cli_args *args)
{
  json_t *sample = must (json_object ());
  json_t *vms = must (json_array ()), *errors = must (json_array ());

  set_time (sample);
  for (size_t i = 0; i < args->count; i++) {
    char why[700] = "";

    if (collect (args->operand[i], vms, why, sizeof why) < 0) {
      json_t *e = must (json_object ());

      set_text (e, "target", args->operand[i]);
      set_text (e, "error", why);
      append_json (errors, e);
    }
  }
  set_json (sample, "vms", vms);
  set_json (sample, "errors", errors);
  return sample;
}

/* ---- Rates -------------------------------------------------------------- */

/* Per second; nothing if the counter began anew in between. */
static void
set_rate (json_t *now, const json_t *before, const char *counter,
          const char *rate, double seconds)
{
  uint64_t a = get_count (before, counter), b = get_count (now, counter);

  if (has_value (now, counter) && has_value (before, counter) && b >= a)
    set_real (now, rate, (double) (b - a) / seconds);
}

/* The object in array whose keys a and b say the same as in like. */
static const json_t *
find_like (const json_t *array, const json_t *like, const char *a,
           const char *b)
{
  json_t *o;
  size_t i;

  json_array_foreach ((json_t *) array, i, o)
    if (strcmp (get_text (o, a), get_text (like, a)) == 0
        && strcmp (get_text (o, b), get_text (like, b)) == 0)
      return o;
  return NULL;
}

static void
add_rates (json_t *now, const json_t *before, double seconds)
{
  json_t *vm, *disk;
  size_t i, k;

  json_array_foreach (json_object_get (now, "vms"), i, vm) {
    const json_t *was
        = find_like (json_object_get (before, "vms"), vm, "target", "vm");

    json_array_foreach (json_object_get (vm, "disks"), k, disk) {
      const json_t *old = find_like (json_object_get (was, "disks"), disk,
                                     "disk", "disk");

      set_rate (disk, old, "commits", "commits_per_second", seconds);
      set_rate (disk, old, "written_bytes", "bytes_per_second", seconds);
      set_rate (disk, old, "next_lsn", "log_bytes_per_second", seconds);
    }
  }
}

/* ---- For people --------------------------------------------------------- */

static void
print_rates (struct table *t, const json_t *disk, const char *bytes)
{
  if (has_value (disk, "commits_per_second"))
    table_cell (t, "%.1f", get_real (disk, "commits_per_second"));
  else if (t->columns > 8)
    table_cell (t, "-");
  if (has_value (disk, bytes))
    table_cell (t, "%s/s", bytes_text ((uint64_t) get_real (disk, bytes)));
  else
    table_cell (t, "-");
}

static void
cell_of_bytes (struct table *t, const json_t *o, const char *key)
{
  table_cell (t, "%s",
              has_value (o, key) ? bytes_text (get_count (o, key)) : "-");
}

static void
cell_of_count (struct table *t, const json_t *o, const char *key)
{
  if (has_value (o, key))
    table_cell (t, "%llu", (unsigned long long) get_count (o, key));
  else
    table_cell (t, "-");
}

static void
cell_of_fill (struct table *t, const json_t *disk)
{
  double of = get_real (disk, "journal_bytes");

  if (of > 0)
    table_cell (t, "%.0f%%",
                100 * get_real (disk, "journal_used_bytes") / of);
  else
    table_cell (t, "-");
}

static void
cell_of_state (struct table *t, const json_t *disk)
{
  uint64_t of = get_count (disk, "copy_bytes");

  if (of)
    table_cell (t, "%s %.0f%%", get_text (disk, "state"),
                100 * get_real (disk, "copied_bytes") / (double) of);
  else
    table_cell (t, "%s", get_text (disk, "state"));
}

static void
print_primary_disks (const json_t *disks, bool rates)
{
  static const char *const head[]
      = { "DISK", "STATE", "LAG", "TO COMMIT", "JOURNAL", "COMMIT TAKES",
          "WRITTEN", "COMMITS/S", "RATE" };
  struct table t = { .columns = rates ? 9 : 7 };
  json_t *d;
  size_t i;

  for (i = 0; i < t.columns; i++)
    table_cell (&t, "%s", head[i]);
  json_array_foreach ((json_t *) disks, i, d) {
    bool live = has_value (d, "lag_seconds");

    table_cell (&t, "%s", get_text (d, "disk"));
    cell_of_state (&t, d);
    table_cell (&t, "%s",
                live ? seconds_text (get_real (d, "lag_seconds"))
                     : "unknown");
    cell_of_bytes (&t, d, "lag_bytes");
    cell_of_fill (&t, d);
    table_cell (&t, "%s",
                get_real (d, "commit_seconds") > 0
                    ? seconds_text (get_real (d, "commit_seconds"))
                    : "-");
    cell_of_bytes (&t, d, "written_bytes");
    if (rates)
      print_rates (&t, d, "bytes_per_second");
  }
  table_print (&t, 2);
}

static void
print_primary (const json_t *vm, bool rates)
{
  const json_t *clock = json_object_get (vm, "clock");

  printf ("%s: primary, %s\n", get_text (vm, "vm"),
          get_bool (vm, "protected") ? "protected" : "NOT PROTECTED");
  printf ("  epoch %llu open, %llu committed",
          LLU (vm, "open_epoch"),
          LLU (vm, "committed_epoch"));
  if (has_value (vm, "lag_epochs"))
    printf (", %llu on the way",
            LLU (vm, "lag_epochs"));
  if (get_bool (clock, "alive"))
    printf ("; clock: pid %llu, last cut %s ago\n",
            LLU (clock, "pid"),
            seconds_text (get_real (clock, "last_cut_seconds")));
  else
    printf ("; no clock runs\n");
  print_primary_disks (json_object_get (vm, "disks"), rates);
}

static void
print_backup_disks (const json_t *disks, bool rates)
{
  static const char *const head[]
      = { "DISK", "STATE", "SIZE", "SEALED", "TO COMMIT", "TO APPLY",
          "WRITER", "RATE" };
  struct table t = { .columns = rates ? 8 : 7 };
  json_t *d;
  size_t i;

  for (i = 0; i < t.columns; i++)
    table_cell (&t, "%s", head[i]);
  json_array_foreach ((json_t *) disks, i, d) {
    table_cell (&t, "%s", get_text (d, "disk"));
    table_cell (&t, "%s", get_text (d, "state"));
    cell_of_bytes (&t, d, "size");
    cell_of_count (&t, d, "sealed_epoch");
    cell_of_bytes (&t, d, "lag_bytes");
    cell_of_bytes (&t, d, "apply_bytes");
    table_cell (&t, "%s", get_bool (d, "writer") ? "connected" : "-");
    if (rates)
      print_rates (&t, d, "log_bytes_per_second");
  }
  table_print (&t, 2);
}

static void
print_problems (const json_t *vm)
{
  json_t *d;
  size_t i;

  if (has_value (vm, "problem"))
    printf ("  %s\n", get_text (vm, "problem"));
  json_array_foreach (json_object_get (vm, "disks"), i, d)
    if (has_value (d, "problem"))
      printf ("  %s: %s\n", get_text (d, "disk"), get_text (d, "problem"));
  if (has_value (vm, "waiting_for"))
    printf ("  the next commit waits for disk %s\n",
            get_text (vm, "waiting_for"));
  if (get_bool (vm, "in_use"))
    printf ("  a server has it open, and knows more: ask it by its NBD "
            "URI\n");
}

static void
print_backup (const json_t *vm, bool rates)
{
  printf ("%s: %s, epoch %llu committed, generation %llu\n",
          get_text (vm, "vm"), get_text (vm, "role"),
          LLU (vm, "committed_epoch"),
          LLU (vm, "generation"));
  print_backup_disks (json_object_get (vm, "disks"), rates);
  print_problems (vm);
}

static void
print_sample (const json_t *sample, bool rates)
{
  json_t *o;
  size_t i;

  /* On a terminal the picture stands still. */
  if (rates)
    printf ("%s%s\n", isatty (STDOUT_FILENO) ? "\033[H\033[J" : "",
            get_text (sample, "time"));
  json_array_foreach (json_object_get (sample, "vms"), i, o)
    if (strcmp (get_text (o, "role"), "primary") == 0)
      print_primary (o, rates);
    else
      print_backup (o, rates);
  json_array_foreach (json_object_get (sample, "errors"), i, o)
    complain ("%s", get_text (o, "error"));
  fflush (stdout);
}

/* ---- The verb ----------------------------------------------------------- */

static void
print (const struct cli_args *args, const json_t *sample)
{
  if (args->json)
    print_json (sample, args->watch_ns != 0);
  else
    print_sample (sample, args->watch_ns != 0);
}

static uint64_t
now_ns (void)
{
  return vr_now_ns (vr_io_real ());
}

/* Until somebody ends it, or nobody reads it. */
static int
watch (const struct cli_args *args, json_t *before, uint64_t taken_ns)
{
  uint64_t next_ns = taken_ns;

  while (!ferror (stdout)) {
    uint64_t now;
    json_t *sample;

    next_ns += args->watch_ns;
    now = now_ns ();
    if (next_ns > now)
      nanosleep (&(struct timespec){
                     .tv_sec = (time_t) ((next_ns - now) / 1000000000),
                     .tv_nsec = (long) ((next_ns - now) % 1000000000) },
                 NULL);
    else
      next_ns = now;
    now = now_ns ();
    sample = take_sample (args);
    add_rates (sample, before, (double) (now - taken_ns) / 1e9);
    print (args, sample);
    json_decref (before);
    before = sample;
    taken_ns = now;
  }
  json_decref (before);
  return VMREP_FAILED;
}

int
run_status (const struct cli_args *args)
{
  uint64_t taken_ns = now_ns ();
  json_t *sample = take_sample (args);
  int r = json_array_size (json_object_get (sample, "errors"))
              ? VMREP_FAILED
              : VMREP_OK;

  print (args, sample);
  if (args->watch_ns)
    return watch (args, sample, taken_ns);
  json_decref (sample);
  return r;
}
