/* SPDX-License-Identifier: BSD-3-Clause */
/* The backup of one VM: its files, its members, the commit; see vm.h. */
#include "vm_internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Segments kept in memory per log. */
#define CACHE_SEGMENTS 16

int
vr_refuse (struct vr_refused *r, enum vr_refusal code, int err,
           const char *fmt, ...)
{
  va_list args;

  r->code = code;
  va_start (args, fmt);
  vsnprintf (r->text, sizeof r->text, fmt, args);
  va_end (args);
  return err;
}

char *
vr_vm_path (const char *dir, const char *name, const char *suffix)
{
  char *p;

  return asprintf (&p, "%s/%s%s", dir, name, suffix) < 0 ? NULL : p;
}

static void
cond_init (pthread_cond_t *c)
{
  pthread_condattr_t attr;

  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (c, &attr);
  pthread_condattr_destroy (&attr);
}

/* Wait on c for one step. */
void
vr_vm_wait (pthread_cond_t *c, pthread_mutex_t *m, long ns)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  t.tv_nsec += ns % 1000000000;
  t.tv_sec += ns / 1000000000 + t.tv_nsec / 1000000000;
  t.tv_nsec %= 1000000000;
  pthread_cond_timedwait (c, m, &t);
}

/* ---- The durable page --------------------------------------------------- */

/* Write DIR/VM/epoch anew.  vm->mutex held, or nobody else there yet. */
int
vr_vm_write_page (struct vr_vm *vm)
{
  struct vr_io *io = vm->io;
  char *tmp = vr_vm_path (vm->dir, "epoch.new", "");
  char *path = vr_vm_path (vm->dir, "epoch", "");
  struct vr_file *f;
  int err = tmp && path ? 0 : -ENOMEM;

  if (err == 0) {
    vm->page.checksum = vr_epoch_page_checksum (&vm->page);
    io->ops->unlink (io, tmp);
    err = io->ops->open (io, tmp, VR_OPEN_CREATE, &f);
  }
  if (err == 0) {
    /* The size of a shared one, so that it can be read like one. */
    err = vm->io->ops->truncate (f, VR_EPOCH_FILE_SIZE);
    if (err == 0)
      err = vr_write (f, &vm->page, sizeof vm->page, 0);
    if (err == 0)
      err = vr_sync (f);
    vr_close (f);
  }
  if (err == 0)
    err = io->ops->rename (io, tmp, path);
  if (err == 0)
    err = io->ops->sync_dir (io, vm->dir);
  free (tmp);
  free (path);
  return err;
}

static void
new_page (struct vr_vm *vm)
{
  memset (&vm->page, 0, sizeof vm->page);
  memcpy (vm->page.magic, VR_EPOCH_MAGIC, 8);
  vm->page.version = VR_EPOCH_VERSION;
  snprintf (vm->page.vm, sizeof vm->page.vm, "%s", vm->name);
}

/* The slot of a member in the page. */
struct vr_member *
vr_vm_page_slot (struct vr_vm *vm, const char *disk)
{
  struct vr_member *free_slot = NULL;

  for (size_t i = 0; i < VR_MEMBERS_MAX; i++) {
    struct vr_member *s = &vm->page.member[i];

    if (strcmp (s->name, disk) == 0)
      return s;
    if (s->name[0] == 0 && free_slot == NULL)
      free_slot = s;
  }
  return free_slot;
}

/* Read DIR/VM/epoch.  -ENOENT if there is none; a bad one marks the VM
   damaged. */
static int
read_page (struct vr_vm *vm)
{
  char *path = vr_vm_path (vm->dir, "epoch", "");
  struct vr_file *f;
  int err;

  if (path == NULL)
    return -ENOMEM;
  err = vm->io->ops->open (vm->io, path, VR_OPEN_READ_ONLY, &f);
  if (err == 0) {
    err = vr_read (f, &vm->page, sizeof vm->page, 0);
    vr_close (f);
    if (err == 0)
      err = vr_epoch_page_check (&vm->page);
    if (err == 0 && vm->page.checksum != vr_epoch_page_checksum (&vm->page))
      err = -EBADMSG;
    if (err == 0 && strcmp (vm->page.vm, vm->name) != 0)
      err = -EXDEV;
    if (err < 0) {
      vr_refuse (&vm->damaged, VR_REFUSED_DAMAGE, err, "%s: %s", path,
                 err == -EBADMSG || err == -ENODATA ? "damaged"
                 : err == -EPROTO ? "of a newer format"
                 : err == -EXDEV  ? "belongs to another VM"
                                  : strerror (-err));
      err = 0;
    }
  }
  free (path);
  return err;
}

/* ---- Members ------------------------------------------------------------ */

void
vr_vm_close_member (struct vr_vm_member *m)
{
  if (m->img.batch)
    vr_image_destroy (&m->img);
  vr_log_close (m->log);
  vr_close (m->base);
  m->log = NULL;
  m->base = NULL;
  m->img.batch = NULL;
}

void
vr_vm_free_member (struct vr_vm_member *m)
{
  if (m == NULL)
    return;
  vr_vm_close_member (m);
  pthread_cond_destroy (&m->moved);
  pthread_mutex_destroy (&m->order);
  free (m);
}

struct vr_vm_member *
vr_vm_new_member (struct vr_vm *vm, const char *name)
{
  struct vr_vm_member *m = calloc (1, sizeof *m);

  if (m == NULL)
    return NULL;
  m->vm = vm;
  snprintf (m->name, sizeof m->name, "%s", name);
  pthread_mutex_init (&m->order, NULL);
  cond_init (&m->moved);
  return m;
}

static int
open_base (struct vr_vm_member *m, uint64_t want_size,
           struct vr_refused *refused)
{
  struct vr_vm *vm = m->vm;
  char *path = vr_vm_path (vm->dir, m->name, ".img");
  uint64_t size = 0;
  int err;

  if (path == NULL)
    return -ENOMEM;
  err = vm->io->ops->open (vm->io, path, 0, &m->base);
  if (err == 0)
    err = vm->io->ops->size (m->base, &size);
  if (err < 0)
    vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s", path, strerror (-err));
  else if (size < want_size)
    err = vr_refuse (refused, VR_REFUSED_DAMAGE, -EUCLEAN,
                     "%s: has %llu bytes, the disk has %llu", path,
                     (unsigned long long) size,
                     (unsigned long long) want_size);
  free (path);
  return err;
}

/* Open journal and image of an existing member. */
int
vr_vm_open_member (struct vr_vm_member *m, struct vr_refused *refused)
{
  static const struct vr_log_open_options options
      = { .cache_segments = CACHE_SEGMENTS, .direct = true };
  struct vr_vm *vm = m->vm;
  char *path = vr_vm_path (vm->dir, m->name, ".journal");
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  struct vr_log_info info;
  int err;

  if (path == NULL)
    return -ENOMEM;
  err = vr_log_open (vm->io, path, &options, &m->log, &problem, &owner);
  if (err < 0)
    vr_refuse (refused, VR_REFUSED_DAMAGE, err, "%s: at byte %llu: %s", path,
               (unsigned long long) problem.file_offset,
               problem.text[0] ? problem.text : strerror (-err));
  free (path);
  if (err < 0)
    return err;
  vr_log_info (m->log, &info);
  err = open_base (m, info.super.disk_size, refused);
  if (err == 0)
    err = vr_image_init (&m->img, m->log, m->base, false);
  m->sealed_epoch = info.sealed_epoch > info.super.committed_epoch
                        ? info.sealed_epoch
                        : info.super.committed_epoch;
  m->generation = info.super.generation;
  return err;
}

struct vr_vm_member *
vr_vm_find (struct vr_vm *vm, const char *disk)
{
  struct vr_vm_member *found = NULL;

  pthread_mutex_lock (&vm->mutex);
  for (size_t i = 0; i < vm->member_count; i++)
    if (strcmp (vm->members[i]->name, disk) == 0)
      found = vm->members[i];
  pthread_mutex_unlock (&vm->mutex);
  return found;
}

static int
commit_logs_locked (struct vr_vm *vm, uint64_t epoch)
{
  int err = 0;

  for (size_t i = 0; i < vm->member_count && err == 0; i++)
    err = vr_log_commit (vm->members[i]->log, epoch);
  return err;
}

/* Recompute the commit from the members' seals.  A member that joined late may
   still be sealing epochs that are committed.  vm->mutex held. */
int
vr_vm_commit_locked (struct vr_vm *vm)
{
  uint64_t epoch = UINT64_MAX;
  int err = 0;

  if (vm->member_count == 0)
    return 0;
  for (size_t i = 0; i < vm->member_count; i++)
    if (vm->members[i]->sealed_epoch < epoch)
      epoch = vm->members[i]->sealed_epoch;
  if (epoch < vm->committed_epoch)
    epoch = vm->committed_epoch;
  if (!vm->sync_memory)
    err = commit_logs_locked (vm, epoch);
  if (err == 0 && epoch > vm->committed_epoch) {
    vm->committed_epoch = epoch;
    pthread_cond_broadcast (&vm->committed_changed);
  }
  return err;
}

/* With sync=memory an epoch is committed for its primary before it is durable
   here.  The images and commit points follow when it is durable in every log,
   so that after a power failure they still agree on one epoch, if an older
   one.  vm->use held, or nobody else there yet. */
int
vr_vm_harden (struct vr_vm *vm)
{
  uint64_t epoch;
  size_t count;
  int err = 0;

  if (!vm->sync_memory)
    return 0;
  pthread_mutex_lock (&vm->mutex);
  epoch = vm->committed_epoch;
  count = vm->member_count;
  pthread_mutex_unlock (&vm->mutex);
  for (size_t i = 0; i < count && err == 0; i++) {
    struct vr_log_info info;

    vr_log_info (vm->members[i]->log, &info);
    err = vr_log_sync (vm->members[i]->log, info.sealed_lsn);
  }
  pthread_mutex_lock (&vm->mutex);
  if (err == 0)
    err = commit_logs_locked (vm, epoch);
  pthread_mutex_unlock (&vm->mutex);
  return err;
}

/* ---- Open and close ----------------------------------------------------- */

static int
open_members (struct vr_vm *vm)
{
  for (size_t i = 0; i < VR_MEMBERS_MAX; i++) {
    struct vr_vm_member *m;
    int err;

    if (vm->page.member[i].name[0] == 0)
      continue;
    m = vr_vm_new_member (vm, vm->page.member[i].name);
    if (m == NULL)
      return -ENOMEM;
    vm->members[vm->member_count++] = m;
    err = vr_vm_open_member (m, &vm->damaged);
    if (err < 0 && vm->damaged.code == 0)
      return err;
    if (err < 0)
      return 0;
    if (m->sealed_epoch < vm->page.member[i].sealed_epoch)
      m->sealed_epoch = vm->page.member[i].sealed_epoch;
  }
  return 0;
}

/* What one log says is committed, every log had durably sealed.  One that has
   not any more lost it to damage: its own commit point may lag behind. */
static void
compare_commit_points (struct vr_vm *vm)
{
  uint64_t committed = 0;

  for (size_t i = 0; i < vm->member_count; i++) {
    struct vr_log_info info;

    vr_log_info (vm->members[i]->log, &info);
    if (committed < info.super.committed_epoch)
      committed = info.super.committed_epoch;
  }
  for (size_t i = 0; i < vm->member_count; i++) {
    const struct vr_vm_member *m = vm->members[i];

    if (m->sealed_epoch < committed)
      vr_refuse (&vm->damaged, VR_REFUSED_DAMAGE, -EUCLEAN,
                 "%s: ends at epoch %llu, but epoch %llu was committed",
                 vr_log_path (m->log), (unsigned long long) m->sealed_epoch,
                 (unsigned long long) committed);
  }
}

/* The lock outlives every other file of the VM. */
static int
lock_vm (struct vr_vm *vm, bool create, char *message, size_t size)
{
  struct vr_lock_owner owner = { 0 };
  char *path = vr_vm_path (vm->dir, "lock", "");
  int err;

  if (path == NULL)
    return -ENOMEM;
  err = vm->io->ops->open (vm->io, path, 0, &vm->lock);
  if (err == -ENOENT && create)
    err = vm->io->ops->open (vm->io, path, VR_OPEN_CREATE, &vm->lock);
  if (err == 0)
    err = vm->io->ops->lock (vm->lock, &owner);
  if (err == -EAGAIN)
    snprintf (message, size, "%s: in use by another process (pid %d)",
              vm->dir, owner.pid);
  else if (err < 0)
    snprintf (message, size, "%s: %s", path, strerror (-err));
  free (path);
  return err;
}

static struct vr_vm *
new_vm (struct vr_io *io, const struct vr_vm_config *c)
{
  pthread_rwlockattr_t attr;
  struct vr_vm *vm = calloc (1, sizeof *vm);

  if (vm == NULL)
    return NULL;
  vm->io = io;
  vm->sync_memory = c->sync_memory;
  vm->writer_timeout_ns = c->writer_timeout_ns;
  vm->keep_waiting = c->keep_waiting;
  snprintf (vm->name, sizeof vm->name, "%s", c->name);
  pthread_rwlockattr_init (&attr);
  pthread_rwlockattr_setkind_np (
      &attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
  pthread_rwlock_init (&vm->use, &attr);
  pthread_rwlockattr_destroy (&attr);
  pthread_mutex_init (&vm->mutex, NULL);
  cond_init (&vm->committed_changed);
  vm->dir = vr_vm_path (c->dir, c->name, "");
  return vm;
}

/* Files of the VM, behind its lock. */
static int
load_vm (struct vr_vm *vm, bool create, char *message, size_t size)
{
  int err = read_page (vm);

  if (err == -ENOENT && create) {
    new_page (vm);
    return 0; /* written with the first member */
  }
  if (err == 0 && vm->damaged.code == 0)
    err = open_members (vm);
  if (err == 0 && vm->damaged.code == 0)
    compare_commit_points (vm);
  if (err == 0 && vm->damaged.code == 0) {
    pthread_mutex_lock (&vm->mutex);
    err = vr_vm_commit_locked (vm);
    pthread_mutex_unlock (&vm->mutex);
    if (err == 0)
      err = vr_vm_harden (vm);
  }
  if (err < 0)
    snprintf (message, size, "%s: %s", vm->dir, strerror (-err));
  return err;
}

int
vr_vm_open (struct vr_io *io, const struct vr_vm_config *c,
            struct vr_vm **ret, char *message, size_t message_size)
{
  struct vr_vm *vm = new_vm (io, c);
  int err = vm && vm->dir ? 0 : -ENOMEM;

  message[0] = 0;
  if (err == 0 && c->create) {
    err = io->ops->mkdir (io, vm->dir);
    if (err == 0)
      err = io->ops->sync_dir (io, c->dir);
    if (err < 0)
      snprintf (message, message_size, "%s: %s", vm->dir, strerror (-err));
  }
  if (err == 0)
    err = lock_vm (vm, c->create, message, message_size);
  if (err == 0)
    err = load_vm (vm, c->create, message, message_size);
  if (err < 0) {
    vr_vm_close (vm);
    return err;
  }
  *ret = vm;
  return 0;
}

void
vr_vm_close (struct vr_vm *vm)
{
  if (vm == NULL)
    return;
  for (size_t i = 0; i < vm->member_count; i++)
    vr_vm_free_member (vm->members[i]);
  vr_close (vm->lock);
  pthread_cond_destroy (&vm->committed_changed);
  pthread_mutex_destroy (&vm->mutex);
  pthread_rwlock_destroy (&vm->use);
  free (vm->dir);
  free (vm);
}
