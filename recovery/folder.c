/* SPDX-License-Identifier: BSD-3-Clause */
/* vmrep status of a backup's folder, without a server.  See status.h.
 *
 * Nothing is locked or changed.  If a server does have the VM open, its files
 * change while they are read, so then only superblocks are looked at.
 */
#include "status.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "journal.h"

/* Does a process hold the VM's lock? */
static bool
is_in_use (const char *vm_dir)
{
  struct flock f = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
  char *path = text_of ("%s/lock", vm_dir);
  int fd = open (path, O_RDONLY | O_CLOEXEC);
  bool held = fd >= 0 && fcntl (fd, F_OFD_GETLK, &f) == 0
              && f.l_type != F_UNLCK;

  if (fd >= 0)
    close (fd);
  free (path);
  return held;
}

/* From the superblocks alone: what was so at the last sync. */
static int
describe_super (json_t *o, const char *path)
{
  struct journal_supers s;
  int err = journal_read_supers (path, &s);

  if (err < 0 || s.newest == NULL) {
    set_text (o, "problem", err < 0 ? strerror (-err)
                                    : "no valid superblock");
    return -EBADMSG;
  }
  set_text (o, "state", image_state (s.newest->flags));
  set_count (o, "size", s.newest->disk_size);
  set_count (o, "committed_epoch", s.newest->committed_epoch);
  return 0;
}

/* By recovering it, read-only. */
static int
describe_journal (json_t *o, const char *path, uint64_t *ret_sealed)
{
  static const struct vr_log_open_options options
      = { .cache_segments = 2, .read_only = true };
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  struct vr_log_info info;
  struct vr_log *log;
  int err = vr_log_open (vr_io_real (), path, &options, &log, &problem,
                         &owner);

  if (err < 0) {
    set_text (o, "problem", problem.text[0] ? problem.text : strerror (-err));
    return err;
  }
  vr_log_info (log, &info);
  *ret_sealed = info.sealed_epoch > info.committed_epoch
                    ? info.sealed_epoch
                    : info.committed_epoch;
  set_text (o, "state", image_state (info.super.flags));
  set_count (o, "size", info.super.disk_size);
  set_count (o, "sealed_epoch", *ret_sealed);
  set_count (o, "committed_epoch", info.committed_epoch);
  set_count (o, "apply_bytes", info.committed - info.applied);
  set_count (o, "lag_bytes", info.head - info.committed);
  set_count (o, "journal_used_bytes", info.used);
  set_count (o, "journal_bytes", info.capacity);
  vr_log_close (log);
  return 0;
}

/* All members; *ret_epoch is what they have in common, 0 if one is bad. */
static void
describe_members (json_t *vm, const char *vm_dir,
                  const struct vr_epoch_page *page, bool in_use)
{
  json_t *disks = must (json_array ());
  uint64_t epoch = UINT64_MAX;

  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++) {
    const struct vr_member *m = &page->member[i];
    uint64_t sealed = 0;
    json_t *o;
    char *path;
    int err;

    if (m->name[0] == 0)
      continue;
    o = must (json_object ());
    path = text_of ("%s/%s.journal", vm_dir, m->name);
    set_text (o, "disk", m->name);
    err = in_use ? describe_super (o, path)
                 : describe_journal (o, path, &sealed);
    if (err < 0)
      set_text (o, "state", "damaged");
    if (in_use && err == 0)
      sealed = get_count (o, "committed_epoch");
    if (sealed < epoch)
      epoch = sealed;
    free (path);
    append_json (disks, o);
  }
  set_count (vm, "committed_epoch",
             json_array_size (disks) > 0 ? epoch : 0);
  set_json (vm, "disks", disks);
}

static int
read_page (const char *path, struct vr_epoch_page *page)
{
  struct vr_file *f;
  int err = vr_io_real ()->ops->open (vr_io_real (), path,
                                      VR_OPEN_READ_ONLY, &f);

  if (err < 0)
    return err;
  err = vr_read (f, page, sizeof *page, 0);
  vr_close (f);
  if (err == 0)
    err = vr_epoch_page_check (page);
  if (err == 0 && page->checksum != vr_epoch_page_checksum (page))
    err = -EBADMSG;
  return err;
}

/* 0 without a word if vm_dir is none of a VM. */
static int
collect_vm (const char *vm_dir, json_t *vms, char *why, size_t why_size)
{
  char *path = text_of ("%s/epoch", vm_dir);
  struct vr_epoch_page page;
  int err = read_page (path, &page);

  if (err == 0) {
    json_t *vm = must (json_object ());
    bool in_use = is_in_use (vm_dir);

    set_text (vm, "vm", page.vm);
    set_text (vm, "role", "backup folder");
    set_text (vm, "target", vm_dir);
    set_hex (vm, "vm_id", page.vm_id, sizeof page.vm_id);
    set_count (vm, "generation", atomic_load (&page.generation));
    set_bool (vm, "in_use", in_use);
    describe_members (vm, vm_dir, &page, in_use);
    append_json (vms, vm);
  } else if (err == -ENOENT || err == -ENOTDIR)
    err = 0;
  else
    snprintf (why, why_size, "%s: %s", path,
              err == -EBADMSG || err == -ENODATA ? "damaged"
              : err == -EPROTO ? "of a newer format"
                               : strerror (-err));
  free (path);
  return err;
}

/* Each subfolder that is a VM. */
static int
collect_vms (const char *dir, json_t *vms, char *why, size_t why_size)
{
  struct dirent **entry;
  int n = scandir (dir, &entry, NULL, alphasort), err = 0;

  if (n < 0) {
    err = -errno;
    snprintf (why, why_size, "%s: %s", dir, strerror (-err));
    return err;
  }
  for (int i = 0; i < n; i++) {
    char *vm_dir = text_of ("%s/%s", dir, entry[i]->d_name);

    if (err == 0 && vr_name_ok (entry[i]->d_name))
      err = collect_vm (vm_dir, vms, why, why_size);
    free (vm_dir);
    free (entry[i]);
  }
  free (entry);
  return err;
}

int
collect_folder (const char *path, json_t *vms, char *why, size_t why_size)
{
  size_t before = json_array_size (vms);
  int err = collect_vm (path, vms, why, why_size);

  if (err == 0 && json_array_size (vms) == before)
    err = collect_vms (path, vms, why, why_size);
  if (err == 0 && json_array_size (vms) == before) {
    snprintf (why, why_size, "%s: no VM is backed up here", path);
    err = -ENOENT;
  }
  return err;
}
