/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep status of a backup that serves: the status block of each log export.
 * See status.h. */
#include "status.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"

const char *
image_state (uint32_t log_flags)
{
  if (log_flags & VR_LOG_COPYING)
    return "copying";
  return log_flags & VR_LOG_PROMOTED ? "promoted" : "complete";
}

static uint64_t
more (uint64_t a, uint64_t b)
{
  return a > b ? a - b : 0;
}

static json_t *
describe_log (const struct vr_status *s)
{
  static const uint8_t none[16];
  json_t *o = must (json_object ());

  set_text (o, "disk", s->disk);
  if (memcmp (s->log_id, none, sizeof none) == 0) {
    set_text (o, "state", s->refusal ? "damaged" : "none");
    return o;
  }
  set_text (o, "state", image_state (s->flags));
  set_count (o, "size", s->disk_size);
  set_count (o, "sealed_epoch", s->sealed_epoch);
  set_count (o, "next_lsn", s->next_lsn);
  set_count (o, "lag_bytes", more (s->next_lsn, s->committed_lsn));
  set_count (o, "apply_bytes", more (s->committed_lsn, s->applied_lsn));
  set_count (o, "journal_used_bytes", more (s->next_lsn, s->applied_lsn));
  set_count (o, "journal_bytes", s->segment_size * s->segment_count);
  set_bool (o, "writer", s->session != 0);
  return o;
}

static json_t *
find_vm (const json_t *vms, const char *name, const char *uri)
{
  json_t *vm;
  size_t i;

  json_array_foreach ((json_t *) vms, i, vm)
    if (strcmp (get_text (vm, "vm"), name) == 0
        && strcmp (get_text (vm, "target"), uri) == 0)
      return vm;
  return NULL;
}

/* Put one log's status into its VM's object. */
static void
add_log (json_t *vms, const char *uri, const struct vr_status *s)
{
  json_t *vm = find_vm (vms, s->vm, uri);

  if (vm == NULL) {
    vm = must (json_object ());
    set_text (vm, "vm", s->vm);
    set_text (vm, "role", "backup");
    set_text (vm, "target", uri);
    set_hex (vm, "vm_id", s->vm_id, sizeof s->vm_id);
    set_json (vm, "disks", json_array ());
    append_json (vms, vm);
  }
  set_count (vm, "generation", s->generation);
  set_count (vm, "committed_epoch", s->committed_epoch);
  if (s->waiting_for[0])
    set_text (vm, "waiting_for", s->waiting_for);
  if (s->refusal)
    set_text (vm, "problem", s->refusal_text);
  append_json (json_object_get (vm, "disks"), describe_log (s));
}

static int
query_log (const char *uri, const char *export, json_t *vms, char *why,
           size_t why_size)
{
  struct vr_status status;
  struct client c;
  int err = client_connect (&c, uri);

  if (err == 0)
    err = client_go (&c, export);
  if (err == 0)
    err = client_read_status (&c, &status);
  if (err == 0)
    add_log (vms, uri, &status);
  else
    snprintf (why, why_size, "%s: %s", uri, c.error);
  client_close (&c);
  return err;
}

struct wanted {
  const char *vm; /* "": all */
  char **name;
  size_t count, allocated;
};

/* Log exports, and no views, of the VM wanted. */
static void
note_export (void *opaque, const char *name)
{
  struct wanted *w = opaque;
  const char *slash = strchr (name, '/');
  size_t n = strlen (w->vm);

  if (slash == NULL || strchr (name, '@')
      || (n && ((size_t) (slash - name) != n || strncmp (name, w->vm, n))))
    return;
  if (w->count == w->allocated) {
    w->allocated = w->allocated ? 2 * w->allocated : 16;
    w->name = must (reallocarray (w->name, w->allocated, sizeof *w->name));
  }
  w->name[w->count++] = must (strdup (name));
}

static int
list_logs (const char *uri, struct wanted *w, char **ret_export, char *why,
           size_t why_size)
{
  struct client c;
  int err = client_connect (&c, uri);

  if (err == 0) {
    *ret_export = must (client_export (&c));
    if (strchr (*ret_export, '/'))
      note_export (w, *ret_export);
    else {
      w->vm = *ret_export;
      err = client_list (&c, note_export, w);
    }
  }
  if (err < 0)
    snprintf (why, why_size, "%s: %s", uri, c.error);
  client_close (&c);
  return err;
}

int
collect_backup (const char *uri, json_t *vms, char *why, size_t why_size)
{
  struct wanted w = { .vm = "" };
  char *export = NULL;
  int err = list_logs (uri, &w, &export, why, why_size);

  if (err == 0 && w.count == 0) {
    snprintf (why, why_size,
              "%s: no log exports here%s%s (a primary is asked by its epoch "
              "file)",
              uri, export[0] ? " of VM " : "", export);
    err = -ENOENT;
  }
  for (size_t i = 0; i < w.count && err == 0; i++)
    err = query_log (uri, w.name[i], vms, why, why_size);
  for (size_t i = 0; i < w.count; i++)
    free (w.name[i]);
  free (w.name);
  free (export);
  return err;
}
