/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep status of a primary: its epoch file, which every process of the VM on
 * this host maps.  See status.h. */
#include "status.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "io.h"

/* The open epoch is cut at least four times a second; a clock silent for
   longer is stopped or stuck, and what is written meanwhile is not safe. */
#define CLOCK_SILENT_NS UINT64_C (1000000000)

static const char *
state_name (uint32_t state)
{
  static const char *const names[]
      = { [VR_STATE_OFFLINE] = "offline",
          [VR_STATE_ALONE] = "alone",
          [VR_STATE_CONNECTING] = "connecting",
          [VR_STATE_COPYING] = "copying",
          [VR_STATE_PROTECTED] = "protected",
          [VR_STATE_FENCED] = "fenced",
          [VR_STATE_FAILED] = "failed" };

  return state < sizeof names / sizeof names[0] ? names[state] : "unknown";
}

static uint64_t
since (uint64_t now, uint64_t then)
{
  return now > then ? now - then : 0;
}

/* How long the oldest epoch that the backup lacks has been waiting. */
static double
lag_seconds (const struct vr_epoch_page *page, const struct vr_member *m,
             uint64_t now)
{
  uint64_t oldest = atomic_load (&m->oldest_open_ns);
  uint64_t silent = since (now, atomic_load (&page->cut_time_ns));
  uint64_t lag = oldest ? since (now, oldest) : 0;

  if (atomic_load (&page->dirty) && silent > CLOCK_SILENT_NS && silent > lag)
    lag = silent;
  return (double) lag / 1e9;
}

/* The owner stores the end before the start, so reading them the other way
   round never gives less than nothing. */
static uint64_t
bytes_between (const _Atomic uint64_t *start, const _Atomic uint64_t *end)
{
  uint64_t from = atomic_load (start), to = atomic_load (end);

  return to > from ? to - from : 0;
}

/* What is only true while the owner lives. */
static void
set_live_figures (json_t *o, const struct vr_epoch_page *page,
                  const struct vr_member *m, uint64_t now)
{
  set_count (o, "pid", atomic_load (&m->pid));
  set_count (o, "lag_epochs", atomic_load (&m->uncommitted));
  set_count (o, "lag_bytes", bytes_between (&m->committed_lsn, &m->head_lsn));
  set_real (o, "lag_seconds", lag_seconds (page, m, now));
  set_real (o, "commit_seconds",
            (double) atomic_load (&m->commit_ns) / 1e9);
}

static json_t *
collect_disk (struct vr_epoch *e, unsigned i, uint64_t now)
{
  const struct vr_epoch_page *page = vr_epoch_page (e);
  const struct vr_member *m = &page->member[i];
  bool alive = vr_epoch_member_alive (e, i);
  uint64_t copy_bytes = atomic_load (&m->copy_bytes);
  json_t *o = must (json_object ());
  char name[VR_NAME_SIZE];

  snprintf (name, sizeof name, "%.*s", VR_NAME_SIZE - 1, m->name);
  set_text (o, "disk", name);
  set_text (o, "state",
            alive ? state_name (atomic_load (&m->state)) : "offline");
  if (alive)
    set_live_figures (o, page, m, now);
  set_count (o, "sealed_epoch", atomic_load (&m->sealed_epoch));
  set_count (o, "committed_epoch", atomic_load (&m->committed_epoch));
  set_count (o, "journal_used_bytes", atomic_load (&m->used_bytes));
  set_count (o, "journal_bytes", atomic_load (&m->capacity));
  set_count (o, "written_bytes", atomic_load (&m->written_bytes));
  set_count (o, "shipped_lsn", atomic_load (&m->shipped_lsn));
  set_count (o, "commits", atomic_load (&m->commits));
  set_count (o, "reconnects", atomic_load (&m->reconnects));
  if (copy_bytes && atomic_load (&m->state) == VR_STATE_COPYING) {
    set_count (o, "copied_bytes", atomic_load (&m->copied_bytes));
    set_count (o, "copy_bytes", copy_bytes);
  }
  return o;
}

static json_t *
collect_clock (struct vr_epoch *e, uint64_t now)
{
  const struct vr_epoch_page *page = vr_epoch_page (e);
  json_t *o = must (json_object ());

  set_bool (o, "alive", vr_epoch_clock_alive (e));
  set_count (o, "pid", atomic_load (&page->clock_pid));
  set_real (o, "last_cut_seconds",
            (double) since (now, atomic_load (&page->cut_time_ns)) / 1e9);
  return o;
}

/* The VM is as far behind as its last disk, and what nobody vouches for is
   not said. */
static void
sum_up (json_t *vm, const json_t *disks)
{
  uint64_t epochs = 0, bytes = 0;
  double seconds = 0;
  bool protected = json_array_size (disks) > 0, known = protected;
  const json_t *d;
  size_t i;

  json_array_foreach ((json_t *) disks, i, d) {
    protected = protected && strcmp (get_text (d, "state"), "protected") == 0;
    known = known && has_value (d, "lag_epochs");
    bytes += get_count (d, "lag_bytes");
    if (get_count (d, "lag_epochs") > epochs)
      epochs = get_count (d, "lag_epochs");
    if (get_real (d, "lag_seconds") > seconds)
      seconds = get_real (d, "lag_seconds");
  }
  set_bool (vm, "protected", protected);
  set_json (vm, "lag_epochs", known ? json_integer ((json_int_t) epochs)
                                    : json_null ());
  set_json (vm, "lag_bytes", known ? json_integer ((json_int_t) bytes)
                                   : json_null ());
  if (known)
    set_real (vm, "lag_seconds", seconds);
  else
    set_json (vm, "lag_seconds", json_null ());
}

static json_t *
collect_page (struct vr_epoch *e, const char *path)
{
  const struct vr_epoch_page *page = vr_epoch_page (e);
  uint64_t now = vr_now_ns (vr_io_real ());
  json_t *vm = must (json_object ());
  json_t *disks = must (json_array ());

  set_text (vm, "vm", page->vm);
  set_text (vm, "role", "primary");
  set_text (vm, "target", path);
  set_hex (vm, "vm_id", page->vm_id, sizeof page->vm_id);
  /* Committed first: it never passes the open one. */
  set_count (vm, "committed_epoch", atomic_load (&page->committed_epoch));
  set_count (vm, "open_epoch", vr_epoch_current (e));
  set_bool (vm, "output_held",
            atomic_load (&page->output) & VR_EPOCH_OUTPUT_HELD);
  set_json (vm, "clock", collect_clock (e, now));
  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++)
    if (atomic_load_explicit (&page->member[i].kind, memory_order_acquire)
        != VR_MEMBER_FREE)
      append_json (disks, collect_disk (e, i, now));
  sum_up (vm, disks);
  set_json (vm, "disks", disks);
  return vm;
}

int
collect_primary (const char *path, json_t *vms, char *why, size_t why_size)
{
  struct vr_epoch *e;
  int err = vr_epoch_open_readonly (path, &e);

  if (err < 0) {
    snprintf (why, why_size, "%s: %s", path,
              err == -EBADMSG ? "is not an epoch file; see vmrep inspect"
              : err == -EPROTO ? "is an epoch file of a newer format"
              : err == -ETIMEDOUT
                  ? "is locked by a process that does not go on"
                  : strerror (-err));
    return err;
  }
  append_json (vms, collect_page (e, path));
  vr_epoch_close (e);
  return 0;
}
