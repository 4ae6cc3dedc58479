/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep inspect of a journal: superblocks, what recovery says, segments,
 * records, damage.
 *
 * Recovery is the library's own (vr_log_open), so its verdict is the one a
 * server would reach.  It stops at the first damage; the segments are listed
 * from the file as it is, so what lies behind is shown too.
 */
#include "inspect.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "journal.h"
#include "output.h"

struct inspection {
  const struct cli_args *args;
  const char *path;
  struct journal_supers supers;
  const struct vr_super *super; /* the one believed */
  uint64_t head; /* where recovery ended; 0: it failed */
  uint64_t blank;
  struct journal_segment *segment; /* with a valid header, by number */
  size_t count;
  json_t *records; /* array, with --records */
};

/* ---- Superblocks -------------------------------------------------------- */

static const char *
super_problem (int err)
{
  switch (err) {
  case -EBADMSG:
    return "checksum or magic does not match";
  case -EPROTO:
    return "of a newer format, or with features unknown here";
  case -EUCLEAN:
    return "impossible contents";
  case -ENODATA:
    return "beyond the end of the file";
  default:
    return strerror (-err);
  }
}

static json_t *
flag_names (uint32_t flags)
{
  static const char *const names[]
      = { "backup", "copying", "clean", "promoted" };
  json_t *a = must (json_array ());

  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (flags & (1U << i))
      append_json (a, json_string (names[i]));
  return a;
}

static json_t *
describe_super (const struct journal_supers *s, size_t i)
{
  const struct vr_super *b = &s->super[i];
  json_t *o = must (json_object ());

  set_text (o, "name", i == 0 ? "A" : "B");
  set_count (o, "file_offset", i == 0 ? VR_SUPER_A : VR_SUPER_B);
  set_bool (o, "valid", s->err[i] == 0);
  if (s->err[i] < 0) {
    set_text (o, "problem", super_problem (s->err[i]));
    return o;
  }
  set_bool (o, "newest", s->newest == b);
  set_count (o, "version", b->version);
  set_json (o, "flags", flag_names (b->flags));
  set_count (o, "sequence", b->sequence);
  set_count (o, "committed_epoch", b->committed_epoch);
  set_count (o, "committed_lsn", b->committed_lsn);
  set_count (o, "applied_epoch", b->applied_epoch);
  set_count (o, "applied_lsn", b->applied_lsn);
  set_count (o, "epoch_limit", b->epoch_limit);
  return o;
}

static json_t *
describe_supers (const struct journal_supers *s)
{
  json_t *a = must (json_array ());

  append_json (a, describe_super (s, 0));
  append_json (a, describe_super (s, 1));
  return a;
}

static void
set_identity (json_t *o, const struct vr_super *s)
{
  set_text (o, "vm", s->vm);
  set_text (o, "disk", s->disk);
  set_hex (o, "vm_id", s->vm_id, sizeof s->vm_id);
  set_hex (o, "log_id", s->log_id, sizeof s->log_id);
  set_text (o, "role", s->flags & VR_LOG_BACKUP ? "backup" : "primary");
  set_json (o, "flags", flag_names (s->flags));
  set_count (o, "generation", s->generation);
  set_count (o, "disk_size", s->disk_size);
  set_count (o, "segment_size", s->segment_size);
  set_count (o, "segment_count", s->segment_count);
}

/* ---- Recovery ----------------------------------------------------------- */

static json_t *
describe_recovery (struct inspection *x)
{
  static const struct vr_log_open_options options
      = { .cache_segments = 2, .read_only = true };
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  struct vr_log_info info;
  struct vr_log *log;
  json_t *o = must (json_object ());
  int err = vr_log_open (vr_io_real (), x->path, &options, &log, &problem,
                         &owner);

  set_bool (o, "ok", err == 0);
  if (err < 0) {
    set_text (o, "problem", problem.text[0] ? problem.text : strerror (-err));
    set_count (o, "file_offset", problem.file_offset);
    return o;
  }
  vr_log_info (log, &info);
  x->head = info.head;
  set_count (o, "head_lsn", info.head);
  set_count (o, "committed_epoch", info.committed_epoch);
  set_count (o, "committed_lsn", info.committed);
  set_count (o, "applied_lsn", info.applied);
  set_count (o, "sealed_epoch", info.sealed_epoch);
  set_count (o, "redo_bytes", info.committed - info.applied);
  set_count (o, "tail_bytes", info.head - info.committed);
  set_count (o, "used_bytes", info.used);
  set_count (o, "capacity", info.capacity);
  vr_log_close (log);
  return o;
}

/* ---- Segments ----------------------------------------------------------- */

static int
by_number (const void *a, const void *b)
{
  const struct journal_segment *x = a, *y = b;

  return x->number < y->number ? -1 : x->number > y->number;
}

/* Is the segment part of what recovery reads? */
static bool
is_needed (const struct inspection *x, uint64_t number)
{
  const struct vr_super *s = x->super;

  return number >= s->applied_lsn / s->segment_size
         && number < (s->committed_lsn + s->segment_size - 1)
                         / s->segment_size;
}

static const char *
segment_state (const struct inspection *x, const struct journal_segment *g)
{
  const struct vr_super *s = x->super;

  if (is_needed (x, g->number))
    return "committed";
  if (g->header.lsn < s->applied_lsn)
    return "free";
  return x->head && g->header.lsn >= x->head ? "stale" : "tail";
}

static void
add_record (void *opaque, const struct vr_record *r, bool payload_ok)
{
  struct inspection *x = opaque;
  json_t *o = must (json_object ());

  set_count (o, "lsn", r->lsn);
  set_count (o, "file_offset", journal_file_offset (x->super, r->lsn));
  set_text (o, "kind", vr_kind_name (r->kind));
  set_count (o, "epoch", r->epoch);
  set_count (o, "generation", r->generation);
  if (r->kind != VR_PAD) {
    set_count (o, r->kind == VR_SEAL ? "time_ns" : "offset", r->offset);
    set_count (o, "length", r->length);
  }
  if (r->flags & VR_RECORD_COPY)
    set_bool (o, "copy", true);
  if (!payload_ok)
    set_bool (o, "damaged", true);
  append_json (x->records, o);
}

/* In order of their numbers, which in the file go around a circle. */
static int
read_segments (struct inspection *x, struct vr_file *f, void *buf)
{
  int err = 0;

  for (uint64_t i = 0; i < x->super->segment_count && err == 0; i++) {
    struct journal_segment *g = &x->segment[x->count];

    err = journal_read_segment (f, x->super, i, buf, NULL, NULL, g);
    if (err == 0 && g->valid)
      x->count++;
    else if (err == 0 && g->blank)
      x->blank++;
  }
  qsort (x->segment, x->count, sizeof *x->segment, by_number);
  for (size_t i = 0; i < x->count && x->records && err == 0; i++) {
    struct journal_segment again;

    err = journal_read_segment (f, x->super, x->segment[i].slot, buf,
                                add_record, x, &again);
  }
  return err;
}

static int
load_segments (struct inspection *x)
{
  struct vr_io *io = vr_io_real ();
  void *buf = must (malloc (x->super->segment_size));
  struct vr_file *f;
  int err = io->ops->open (io, x->path, VR_OPEN_READ_ONLY, &f);

  x->segment = must (calloc (x->super->segment_count, sizeof *x->segment));
  if (err == 0) {
    err = read_segments (x, f, buf);
    vr_close (f);
  }
  free (buf);
  return err;
}

static json_t *
describe_segment (const struct inspection *x, const struct journal_segment *g)
{
  json_t *o = must (json_object ());

  set_count (o, "number", g->number);
  set_count (o, "slot", g->slot);
  set_count (o, "file_offset", g->file_offset);
  set_text (o, "state", segment_state (x, g));
  set_count (o, "first_lsn", g->header.lsn);
  set_count (o, "end_lsn", g->end_lsn);
  set_count (o, "records", g->records);
  set_count (o, "first_epoch", g->first_epoch);
  set_count (o, "last_epoch", g->last_epoch);
  set_hex (o, "salt", g->header.salt, sizeof g->header.salt);
  return o;
}

static json_t *
describe_segments (const struct inspection *x)
{
  json_t *a = must (json_array ());

  for (size_t i = 0; i < x->count; i++)
    append_json (a, describe_segment (x, &x->segment[i]));
  return a;
}

/* ---- Damage ------------------------------------------------------------- */

static void
add_damage (json_t *list, uint64_t file_offset, uint64_t lsn,
            const char *problem)
{
  json_t *o = must (json_object ());

  set_count (o, "file_offset", file_offset);
  set_count (o, "lsn", lsn);
  set_text (o, "problem", problem);
  append_json (list, o);
}

static const struct journal_segment *
find_segment (const struct inspection *x, uint64_t number)
{
  struct journal_segment key = { .number = number };

  return bsearch (&key, x->segment, x->count, sizeof key, by_number);
}

/* Does the log go on from the end of g as it must? */
static void
check_segment (const struct inspection *x, const struct journal_segment *g,
               json_t *list)
{
  const struct vr_super *s = x->super;
  const struct journal_segment *next = find_segment (x, g->number + 1);

  if (g->damaged_payloads && g->damaged_lsn < s->committed_lsn
      && g->damaged_lsn >= s->applied_lsn)
    add_damage (list, journal_file_offset (s, g->damaged_lsn),
                g->damaged_lsn, "payload hash does not match");
  if (g->end_lsn >= s->committed_lsn
      || (next && next->header.prev_chain == g->end_chain))
    return;
  add_damage (list, journal_file_offset (s, g->end_lsn), g->end_lsn,
              g->problem ? g->problem : "the next segment does not follow");
}

/* All between the applied and the committed position must be there. */
static json_t *
describe_damage (const struct inspection *x)
{
  const struct vr_super *s = x->super;
  json_t *list = must (json_array ());

  for (uint64_t n = s->applied_lsn / s->segment_size; is_needed (x, n); n++) {
    const struct journal_segment *g = find_segment (x, n);

    if (g)
      check_segment (x, g, list);
    else
      add_damage (list, journal_file_offset (s, n * s->segment_size),
                  n * s->segment_size, "no valid segment header");
  }
  return list;
}

/* ---- For people --------------------------------------------------------- */

static void
print_supers (const json_t *supers)
{
  json_t *o;
  size_t i;

  json_array_foreach ((json_t *) supers, i, o)
    if (get_bool (o, "valid"))
      printf ("  superblock %s: valid%s, sequence %llu, committed epoch %llu "
              "(LSN %llu), applied LSN %llu\n",
              get_text (o, "name"), get_bool (o, "newest") ? ", newest" : "",
              LLU (o, "sequence"), LLU (o, "committed_epoch"),
              LLU (o, "committed_lsn"), LLU (o, "applied_lsn"));
    else
      printf ("  superblock %s (byte %llu): NOT VALID: %s\n",
              get_text (o, "name"), LLU (o, "file_offset"),
              get_text (o, "problem"));
}

static void
print_identity (const json_t *o)
{
  const json_t *flag;
  size_t i;

  if (!has_value (o, "vm"))
    return;
  printf ("  %s/%s, of a %s, generation %llu, disk of %s",
          get_text (o, "vm"), get_text (o, "disk"), get_text (o, "role"),
          LLU (o, "generation"), bytes_text (get_count (o, "disk_size")));
  json_array_foreach (json_object_get (o, "flags"), i, flag)
    if (strcmp (json_string_value (flag), "backup") != 0)
      printf (", %s", json_string_value (flag));
  printf ("\n  VM id %s, log id %s\n", get_text (o, "vm_id"),
          get_text (o, "log_id"));
}

static void
print_recovery (const json_t *r)
{
  if (get_bool (r, "ok"))
    printf ("  recovery: good; %s to redo, committed epoch %llu, then %s of "
            "tail up to LSN %llu, last seal %llu\n",
            bytes_text (get_count (r, "redo_bytes")),
            LLU (r, "committed_epoch"),
            bytes_text (get_count (r, "tail_bytes")), LLU (r, "head_lsn"),
            LLU (r, "sealed_epoch"));
  else
    printf ("  recovery: REFUSED at byte %llu: %s\n", LLU (r, "file_offset"),
            get_text (r, "problem"));
}

/* Free ones are only of interest with their records. */
static void
print_segments (const json_t *o, bool all)
{
  const json_t *segments = json_object_get (o, "segments");
  static const char *const head[]
      = { "SEGMENT", "BYTE", "STATE", "LSN", "UP TO", "RECORDS", "EPOCHS",
          "SALT" };
  struct table t = { .columns = 8 };
  json_t *s;
  size_t i;

  printf ("  %llu segments of %s, %llu never used%s\n",
          LLU (o, "segment_count"),
          bytes_text (get_count (o, "segment_size")),
          LLU (o, "blank_segments"),
          all ? "" : "; those that are not free:");
  for (i = 0; i < t.columns; i++)
    table_cell (&t, "%s", head[i]);
  json_array_foreach ((json_t *) segments, i, s) {
    if (!all && strcmp (get_text (s, "state"), "free") == 0)
      continue;
    table_cell (&t, "%llu", LLU (s, "number"));
    table_cell (&t, "%llu", LLU (s, "file_offset"));
    table_cell (&t, "%s", get_text (s, "state"));
    table_cell (&t, "%llu", LLU (s, "first_lsn"));
    table_cell (&t, "%llu", LLU (s, "end_lsn"));
    table_cell (&t, "%llu", LLU (s, "records"));
    table_cell (&t, "%llu-%llu", LLU (s, "first_epoch"),
                LLU (s, "last_epoch"));
    table_cell (&t, "%.16s", get_text (s, "salt"));
  }
  table_print (&t, 2);
}

static void
print_records (const json_t *records)
{
  static const char *const head[]
      = { "LSN", "BYTE", "KIND", "EPOCH", "OFFSET", "LENGTH", "" };
  struct table t = { .columns = 7 };
  json_t *r;
  size_t i;

  for (i = 0; i < t.columns; i++)
    table_cell (&t, "%s", head[i]);
  json_array_foreach ((json_t *) records, i, r) {
    bool on_disk = has_value (r, "offset");

    table_cell (&t, "%llu", LLU (r, "lsn"));
    table_cell (&t, "%llu", LLU (r, "file_offset"));
    table_cell (&t, "%s", get_text (r, "kind"));
    table_cell (&t, "%llu", LLU (r, "epoch"));
    if (on_disk) {
      table_cell (&t, "%llu", LLU (r, "offset"));
      table_cell (&t, "%llu", LLU (r, "length"));
    } else {
      table_cell (&t, "-");
      table_cell (&t, "-");
    }
    table_cell (&t, "%s%s", get_bool (r, "copy") ? "copy " : "",
                get_bool (r, "damaged") ? "DAMAGED" : "");
  }
  table_print (&t, 2);
}

static void
print_damage (const json_t *list)
{
  json_t *o;
  size_t i;

  json_array_foreach ((json_t *) list, i, o)
    printf ("  DAMAGE at byte %llu (LSN %llu): %s\n", LLU (o, "file_offset"),
            LLU (o, "lsn"), get_text (o, "problem"));
}

static void
print_journal (const json_t *o)
{
  printf ("%s: journal\n", get_text (o, "file"));
  print_identity (o);
  print_supers (json_object_get (o, "superblocks"));
  print_recovery (json_object_get (o, "recovery"));
  print_damage (json_object_get (o, "damage"));
  if (has_value (o, "segments"))
    print_segments (o, has_value (o, "records"));
  if (has_value (o, "records"))
    print_records (json_object_get (o, "records"));
  if (has_value (o, "error"))
    printf ("  reading the segments: %s\n", get_text (o, "error"));
}

/* ---- All of it ---------------------------------------------------------- */

static void
describe_journal (struct inspection *x, json_t *o)
{
  int err;

  set_text (o, "file", x->path);
  set_text (o, "type", "journal");
  set_json (o, "superblocks", describe_supers (&x->supers));
  set_json (o, "recovery", describe_recovery (x));
  x->super = x->supers.newest;
  if (x->super == NULL)
    return;
  set_identity (o, x->super);
  if (x->args->records)
    x->records = must (json_array ());
  err = load_segments (x);
  if (err < 0)
    set_text (o, "error", strerror (-err));
  set_count (o, "blank_segments", x->blank);
  set_json (o, "segments", describe_segments (x));
  set_json (o, "damage", describe_damage (x));
  if (x->records)
    set_json (o, "records", x->records);
}

int
inspect_journal (const struct cli_args *args, const char *path)
{
  struct inspection x = { .args = args, .path = path };
  json_t *o = must (json_object ());
  int err = journal_read_supers (path, &x.supers);
  bool good;

  if (err < 0) {
    complain ("%s: %s", path, strerror (-err));
    json_decref (o);
    return VMREP_FAILED;
  }
  describe_journal (&x, o);
  good = get_bool (json_object_get (o, "recovery"), "ok");
  if (args->json)
    print_json (o, false);
  else
    print_journal (o);
  free (x.segment);
  json_decref (o);
  return good ? VMREP_OK : VMREP_FOUND;
}
