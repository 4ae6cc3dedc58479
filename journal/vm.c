/* SPDX-License-Identifier: BSD-3-Clause */
/* The backup of one VM; see vm.h. */
#include "vm.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* How often a waiter looks whether it should give up. */
#define WAIT_STEP_NS 50000000L

/* Segments kept in memory per log. */
#define CACHE_SEGMENTS 16

/* A log is recycled once this share of its journal is applied. */
#define CHECKPOINT_SHARE 3

/* Log bytes that may wait in memory before they are written to the file. */
#define WRITE_OUT_BYTES (UINT64_C (2) << 20)

static int
refuse (struct vr_refused *r, enum vr_refusal code, int err, const char *fmt,
        ...)
{
  va_list args;

  r->code = code;
  va_start (args, fmt);
  vsnprintf (r->text, sizeof r->text, fmt, args);
  va_end (args);
  return err;
}

static char *
path_of (const char *dir, const char *name, const char *suffix)
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
static void
wait_step (pthread_cond_t *c, pthread_mutex_t *m, long ns)
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
static int
write_page (struct vr_vm *vm)
{
  struct vr_io *io = vm->io;
  char *tmp = path_of (vm->dir, "epoch.new", "");
  char *path = path_of (vm->dir, "epoch", "");
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
static struct vr_member *
page_slot (struct vr_vm *vm, const char *disk)
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
  char *path = path_of (vm->dir, "epoch", "");
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
      refuse (&vm->damaged, VR_REFUSED_DAMAGE, err, "%s: %s", path,
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

static void
close_member (struct vr_vm_member *m)
{
  if (m->img.batch)
    vr_image_destroy (&m->img);
  vr_log_close (m->log);
  vr_close (m->base);
  m->log = NULL;
  m->base = NULL;
  m->img.batch = NULL;
}

static void
free_member (struct vr_vm_member *m)
{
  if (m == NULL)
    return;
  close_member (m);
  pthread_cond_destroy (&m->moved);
  pthread_mutex_destroy (&m->order);
  free (m);
}

static struct vr_vm_member *
new_member (struct vr_vm *vm, const char *name)
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
  char *path = path_of (vm->dir, m->name, ".img");
  uint64_t size = 0;
  int err;

  if (path == NULL)
    return -ENOMEM;
  err = vm->io->ops->open (vm->io, path, 0, &m->base);
  if (err == 0)
    err = vm->io->ops->size (m->base, &size);
  if (err < 0)
    refuse (refused, VR_REFUSED_IO, err, "%s: %s", path, strerror (-err));
  else if (size < want_size)
    err = refuse (refused, VR_REFUSED_DAMAGE, -EUCLEAN,
                  "%s: has %llu bytes, the disk has %llu", path,
                  (unsigned long long) size, (unsigned long long) want_size);
  free (path);
  return err;
}

/* Open journal and image of an existing member. */
static int
open_member (struct vr_vm_member *m, struct vr_refused *refused)
{
  static const struct vr_log_open_options options
      = { .cache_segments = CACHE_SEGMENTS, .direct = true };
  struct vr_vm *vm = m->vm;
  char *path = path_of (vm->dir, m->name, ".journal");
  struct vr_log_problem problem;
  struct vr_lock_owner owner;
  struct vr_log_info info;
  int err;

  if (path == NULL)
    return -ENOMEM;
  err = vr_log_open (vm->io, path, &options, &m->log, &problem, &owner);
  if (err < 0)
    refuse (refused, VR_REFUSED_DAMAGE, err, "%s: at byte %llu: %s", path,
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
static int
commit_locked (struct vr_vm *vm)
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
static int
harden (struct vr_vm *vm)
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
    m = new_member (vm, vm->page.member[i].name);
    if (m == NULL)
      return -ENOMEM;
    vm->members[vm->member_count++] = m;
    err = open_member (m, &vm->damaged);
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
      refuse (&vm->damaged, VR_REFUSED_DAMAGE, -EUCLEAN,
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
  char *path = path_of (vm->dir, "lock", "");
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
  vm->dir = path_of (c->dir, c->name, "");
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
    err = commit_locked (vm);
    pthread_mutex_unlock (&vm->mutex);
    if (err == 0)
      err = harden (vm);
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
    free_member (vm->members[i]);
  vr_close (vm->lock);
  pthread_cond_destroy (&vm->committed_changed);
  pthread_mutex_destroy (&vm->mutex);
  pthread_rwlock_destroy (&vm->use);
  free (vm->dir);
  free (vm);
}

/* ---- Status ------------------------------------------------------------- */

/* Whose seal the next commit waits for, when others have sealed it. */
static void
fill_waiting_for (struct vr_vm *vm, struct vr_status *s)
{
  uint64_t newest = 0;
  const struct vr_vm_member *slowest = NULL;

  for (size_t i = 0; i < vm->member_count; i++) {
    const struct vr_vm_member *m = vm->members[i];

    if (m->sealed_epoch > newest)
      newest = m->sealed_epoch;
    if (slowest == NULL || m->sealed_epoch < slowest->sealed_epoch)
      slowest = m;
  }
  if (slowest && slowest->sealed_epoch < newest)
    memcpy (s->waiting_for, slowest->name, sizeof s->waiting_for);
}

static void
fill_member_status (struct vr_vm_member *m, struct vr_status *s)
{
  struct vr_log_info info;

  vr_log_info (m->log, &info);
  s->flags = info.super.flags;
  memcpy (s->log_id, info.super.log_id, 16);
  s->disk_size = info.super.disk_size;
  s->segment_size = info.super.segment_size;
  s->segment_count = info.super.segment_count;
  s->committed_lsn = info.super.committed_lsn;
  s->committed_chain = info.super.committed_chain;
  s->next_lsn = info.head;
  s->next_chain = info.head_chain;
  s->applied_epoch = m->img.applied_epoch;
  s->applied_lsn = info.applied;
  s->session = m->session;
  s->sealed_epoch = m->sealed_epoch;
}

/* Names and the last refusal. */
static void
begin_status (const char *vm, const char *disk,
              const struct vr_refused *refused, struct vr_status *s)
{
  memset (s, 0, sizeof *s);
  memcpy (s->magic, VR_STATUS_MAGIC, 8);
  s->version = VR_VERSION;
  snprintf (s->vm, sizeof s->vm, "%s", vm);
  snprintf (s->disk, sizeof s->disk, "%s", disk);
  s->refusal = refused->code;
  snprintf (s->refusal_text, sizeof s->refusal_text, "%s", refused->text);
}

void
vr_status_empty (const char *vm, const char *disk,
                 const struct vr_refused *refused, struct vr_status *s)
{
  begin_status (vm, disk, refused, s);
  vr_block_seal (s);
}

void
vr_vm_status (struct vr_vm *vm, const char *disk,
              const struct vr_refused *refused, struct vr_status *s)
{
  struct vr_vm_member *m = vr_vm_find (vm, disk);

  if (refused->code == 0 && vm->damaged.code)
    refused = &vm->damaged;
  begin_status (vm->name, disk, refused, s);
  /* order before mutex, as everywhere. */
  if (m)
    pthread_mutex_lock (&m->order);
  pthread_mutex_lock (&vm->mutex);
  memcpy (s->vm_id, vm->page.vm_id, 16);
  s->generation = vm->page.generation;
  s->committed_epoch = vm->committed_epoch;
  s->members = (uint32_t) vm->member_count;
  fill_waiting_for (vm, s);
  if (m && m->log)
    fill_member_status (m, s);
  pthread_mutex_unlock (&vm->mutex);
  if (m)
    pthread_mutex_unlock (&m->order);
  vr_block_seal (s);
}

/* ---- Hello -------------------------------------------------------------- */

static bool
name_field_ok (const char name[VR_NAME_SIZE])
{
  return memchr (name, 0, VR_NAME_SIZE) != NULL && vr_name_ok (name);
}

int
vr_hello_check (const struct vr_hello *h, const char *vm, const char *disk,
                struct vr_refused *refused)
{
  static const uint8_t zeros[sizeof h->reserved];

  *refused = (struct vr_refused){ 0 };
  if (!vr_block_ok (h, VR_HELLO_MAGIC) || h->version != VR_VERSION)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                   "not a hello of version %u", VR_VERSION);
  if (!name_field_ok (h->vm) || !name_field_ok (h->disk)
      || strcmp (h->vm, vm) != 0 || strcmp (h->disk, disk) != 0
      || memchr (h->node, 0, sizeof h->node) == NULL || h->session == 0
      || h->lsn >= VR_LSN_MAX || h->disk_size == 0
      || h->disk_size >= VR_LSN_MAX || h->generation >= VR_EPOCH_MAX
      || memcmp (h->reserved, zeros, sizeof zeros) != 0
      || h->mode < VR_HELLO_CREATE || h->mode > VR_HELLO_COPIED)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                   "hello with impossible fields, or for another export");
  return 0;
}

/* Is it this VM, and not an older primary of it?  vm->mutex held. */
static int
check_owner (struct vr_vm *vm, const struct vr_hello *h,
             struct vr_refused *refused)
{
  if (vm->member_count > 0 && memcmp (vm->page.vm_id, h->vm_id, 16) != 0)
    return refuse (refused, VR_REFUSED_VM, -EPERM,
                   "another VM called %s is backed up here; use another "
                   "name, or remove %s to drop that backup",
                   vm->name, vm->dir);
  if (h->generation < vm->page.generation)
    return refuse (refused, VR_REFUSED_GENERATION, -ESHUTDOWN,
                   "generation %llu is older than %llu, the newest known "
                   "here: another primary has taken over",
                   (unsigned long long) h->generation,
                   (unsigned long long) vm->page.generation);
  return 0;
}

/* m->order held.  A writer that was not heard of for some time is as good as
   gone: its host may have died without a word. */
static int
check_writer (struct vr_vm_member *m, const struct vr_hello *h,
              struct vr_refused *refused)
{
  uint64_t age = vr_now_ns (m->vm->io) - m->heard_ns;

  if (m->session == 0 || h->generation > m->generation
      || age >= m->vm->writer_timeout_ns)
    return 0;
  return refuse (refused, VR_REFUSED_WRITER, -EPERM,
                 "%s is writing this log (heard of %llu ms ago)",
                 m->writer[0] ? m->writer : "another primary",
                 (unsigned long long) (age / 1000000));
}

/* After a truncation: a seal that was cut off is one no more; one that is
   left may not be durable yet, when the writer that sent it died. */
static int
recount_seals (struct vr_vm_member *m, struct vr_refused *refused)
{
  struct vr_log_info info;
  int err = 0;

  vr_log_info (m->log, &info);
  if (!m->vm->sync_memory)
    err = vr_log_sync (m->log, info.sealed_lsn);
  if (err < 0)
    return refuse (refused, VR_REFUSED_IO, err, "%s: %s",
                   vr_log_path (m->log), strerror (-err));
  m->sealed_epoch = info.sealed_epoch > m->vm->committed_epoch
                        ? info.sealed_epoch
                        : m->vm->committed_epoch;
  return 0;
}

/* Seals are about to be cut off, on which what is committed may rest: from now
   on that is known without them.  (This log's part of it is behind its commit
   point and stays.) */
static int
remember_committed (struct vr_vm_member *m, struct vr_refused *refused)
{
  struct vr_vm *vm = m->vm;
  int err;

  page_slot (vm, m->name)->sealed_epoch = vm->committed_epoch;
  err = write_page (vm);
  if (err < 0)
    refuse (refused, VR_REFUSED_IO, err, "%s/epoch: %s", vm->dir,
            strerror (-err));
  return err;
}

/* May this log go on from where the primary says? */
static int
resume_member (struct vr_vm_member *m, const struct vr_hello *h,
               struct vr_refused *refused)
{
  struct vr_log_info info;
  int err;

  vr_log_info (m->log, &info);
  if (info.super.flags & VR_LOG_PROMOTED)
    return refuse (refused, VR_REFUSED_PROMOTED, -ESHUTDOWN,
                   "this backup was promoted at epoch %llu",
                   (unsigned long long) info.super.committed_epoch);
  if (memcmp (info.super.log_id, h->log_id, 16) != 0)
    return refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                   "the backup holds another journal's history (committed "
                   "epoch %llu); to start over from this primary, remove "
                   "%s/%s.*",
                   (unsigned long long) info.super.committed_epoch,
                   m->vm->dir, m->name);
  if (info.super.disk_size != h->disk_size
      || info.super.segment_size != h->segment_size)
    return refuse (refused, VR_REFUSED_SIZE, -EINVAL,
                   "disk has %llu bytes here, %llu there",
                   (unsigned long long) info.super.disk_size,
                   (unsigned long long) h->disk_size);
  if (h->lsn < info.sealed_lsn && remember_committed (m, refused) < 0)
    return -EIO;
  err = vr_log_truncate (m->log, h->lsn, h->chain);
  if (err == -ERANGE || err == -ESTALE)
    return refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                   "the backup's log (committed to LSN %llu, ends at %llu) "
                   "does not contain the primary's position %llu",
                   (unsigned long long) info.super.committed_lsn,
                   (unsigned long long) info.head,
                   (unsigned long long) h->lsn);
  if (err < 0)
    return refuse (refused, VR_REFUSED_IO, err, "%s: %s",
                   vr_log_path (m->log), strerror (-err));
  return recount_seals (m, refused);
}

/* An empty image of the disk's size. */
static int
create_image (struct vr_vm *vm, const char *path, uint64_t size)
{
  struct vr_file *f;
  int err;

  vm->io->ops->unlink (vm->io, path);
  err = vm->io->ops->open (vm->io, path, VR_OPEN_CREATE, &f);
  if (err < 0)
    return err;
  err = vm->io->ops->truncate (f, size);
  if (err == 0)
    err = vr_sync (f);
  vr_close (f);
  return err;
}

/* Under temporary names: an image, and a journal that begins at h->lsn. */
static int
create_files (struct vr_vm *vm, const char *disk, const struct vr_hello *h,
              struct vr_refused *refused)
{
  struct vr_log_config c = {
    .vm = vm->name, .disk = disk, .disk_size = h->disk_size,
    .segment_size = h->segment_size, .segment_count = h->segment_count,
    .start = { h->lsn, h->chain }, .generation = h->generation,
    .epoch_limit = 1, .flags = VR_LOG_BACKUP | VR_LOG_COPYING,
  };
  char *image = path_of (vm->dir, disk, ".img.new");
  char *journal = path_of (vm->dir, disk, ".journal.next");
  int err = image && journal ? 0 : -ENOMEM;

  memcpy (c.vm_id, h->vm_id, 16);
  memcpy (c.log_id, h->log_id, 16);
  if (err == 0) {
    vm->io->ops->unlink (vm->io, journal);
    err = vr_log_create (vm->io, journal, &c);
  }
  if (err == 0)
    err = create_image (vm, image, h->disk_size);
  if (err < 0 && image && journal) {
    vm->io->ops->unlink (vm->io, image);
    vm->io->ops->unlink (vm->io, journal);
  }
  if (err == -EUCLEAN || err == -EPROTO)
    err = refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                  "hello with an impossible geometry");
  else if (err < 0)
    refuse (refused, VR_REFUSED_IO, err, "%s/%s: cannot create: %s", vm->dir,
            disk, strerror (-err));
  free (image);
  free (journal);
  return err;
}

static int
rename_file (struct vr_vm *vm, const char *disk, const char *from_suffix,
             const char *to_suffix)
{
  char *from = path_of (vm->dir, disk, from_suffix);
  char *to = path_of (vm->dir, disk, to_suffix);
  int err = from && to ? 0 : -ENOMEM;

  if (err == 0)
    err = vm->io->ops->rename (vm->io, from, to);
  if (err == 0)
    err = vm->io->ops->sync_dir (vm->io, vm->dir);
  free (from);
  free (to);
  return err;
}

/* Give the new files their names.  The empty image comes first: under an old
   journal, which says that its copy is not finished, it does no harm; an old
   image under the new journal would, as zeros are not copied. */
static int
install_files (struct vr_vm *vm, const char *disk, struct vr_refused *refused)
{
  int err = rename_file (vm, disk, ".img.new", ".img");

  if (err == 0)
    err = rename_file (vm, disk, ".journal.next", ".journal");
  if (err < 0)
    refuse (refused, VR_REFUSED_IO, err, "%s/%s: %s", vm->dir, disk,
            strerror (-err));
  return err;
}

/* A log that is not there yet, or whose first copy never finished. */
static int
create_member (struct vr_vm *vm, const char *disk, const struct vr_hello *h,
               struct vr_vm_member **ret, struct vr_refused *refused)
{
  struct vr_member *slot = page_slot (vm, disk);
  struct vr_vm_member *m;
  int err;

  if (slot == NULL)
    return refuse (refused, VR_REFUSED_FORMAT, -ENOSPC,
                   "VM %s has %d disks already", vm->name, VR_MEMBERS_MAX);
  if (h->lsn == 0 || h->lsn % (h->segment_size ? h->segment_size : 1) != 0)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                   "a new log must begin at a segment");
  err = create_files (vm, disk, h, refused);
  if (err == 0)
    err = install_files (vm, disk, refused);
  if (err < 0)
    return err;
  m = new_member (vm, disk);
  if (m == NULL)
    return -ENOMEM;
  err = open_member (m, refused);
  if (err == 0) {
    /* A new member must not hold back what is committed already, now or
       after a restart. */
    m->sealed_epoch = vm->committed_epoch;
    slot->sealed_epoch = vm->committed_epoch;
    snprintf (slot->name, sizeof slot->name, "%s", disk);
    slot->kind = VR_MEMBER_DISK;
    memcpy (vm->page.vm_id, h->vm_id, 16);
    err = write_page (vm);
    if (err < 0) {
      slot->name[0] = 0;
      refuse (refused, VR_REFUSED_IO, err, "%s/epoch: %s", vm->dir,
              strerror (-err));
    }
  }
  if (err < 0) {
    free_member (m);
    return err;
  }
  vm->members[vm->member_count++] = m;
  *ret = m;
  return 0;
}

/* CREATE over an existing log: only if nothing is lost by it. */
static int
recreate_member (struct vr_vm_member *m, const struct vr_hello *h,
                 struct vr_refused *refused)
{
  struct vr_vm *vm = m->vm;
  struct vr_log_info info;
  int err;

  vr_log_info (m->log, &info);
  if (!(info.super.flags & VR_LOG_COPYING))
    return refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                   "the backup already holds a complete disk (committed "
                   "epoch %llu); to start over from this primary, remove "
                   "%s/%s.*",
                   (unsigned long long) info.super.committed_epoch, vm->dir,
                   m->name);
  if (h->lsn == 0 || h->lsn % (h->segment_size ? h->segment_size : 1) != 0)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                   "a new log must begin at a segment");
  err = create_files (vm, m->name, h, refused);
  if (err == 0) {
    page_slot (vm, m->name)->sealed_epoch = vm->committed_epoch;
    err = write_page (vm);
    if (err < 0)
      refuse (refused, VR_REFUSED_IO, err, "%s/epoch: %s", vm->dir,
              strerror (-err));
  }
  if (err < 0)
    return err; /* what was there is as it was */
  /* An older session's writes may still be at it. */
  while (m->busy > 0)
    wait_step (&m->moved, &m->order, WAIT_STEP_NS);
  close_member (m);
  err = install_files (vm, m->name, refused);
  if (err == 0)
    err = open_member (m, refused);
  m->sealed_epoch = vm->committed_epoch;
  if (err < 0) {
    close_member (m);
    m->session = 0;
    vm->damaged = *refused;
  }
  return err;
}

/* A newer generation is remembered before its first byte is taken. */
static int
raise_generation (struct vr_vm *vm, struct vr_vm_member *m,
                  uint64_t generation, struct vr_refused *refused)
{
  int err = 0;

  if (generation > vm->page.generation) {
    vm->page.generation = generation;
    err = write_page (vm);
  }
  if (err == 0 && generation > m->generation)
    err = vr_log_set_generation (m->log, generation);
  if (err < 0)
    refuse (refused, VR_REFUSED_IO, err, "%s: %s", vm->dir, strerror (-err));
  return err;
}

static int
hello_locked (struct vr_vm *vm, const char *disk, const struct vr_hello *h,
              struct vr_vm_member **ret, struct vr_refused *refused)
{
  struct vr_vm_member *m = *ret;
  int err = check_owner (vm, h, refused);

  if (err == 0 && m)
    err = check_writer (m, h, refused);
  if (err < 0)
    return err;
  if (h->mode == VR_HELLO_CREATE)
    err = m ? recreate_member (m, h, refused)
            : create_member (vm, disk, h, &m, refused);
  else if (h->mode == VR_HELLO_RESUME && m)
    err = resume_member (m, h, refused);
  else
    err = refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                  "there is no log to resume here");
  if (err == 0)
    err = raise_generation (vm, m, h->generation, refused);
  if (err < 0)
    return err;
  m->session = h->session;
  m->generation = h->generation;
  m->heard_ns = vr_now_ns (vm->io);
  memcpy (m->writer, h->node, sizeof m->writer);
  *ret = m;
  return 0;
}

int
vr_vm_hello (struct vr_vm *vm, const char *disk, const struct vr_hello *hello,
             struct vr_vm_member **ret, struct vr_refused *refused)
{
  struct vr_vm_member *m;
  int err;

  err = vr_hello_check (hello, vm->name, disk, refused);
  if (err < 0)
    return err;
  if (vm->damaged.code) {
    *refused = vm->damaged;
    return -EIO;
  }
  /* Serialises hellos too, so nobody else adds this member meanwhile. */
  pthread_rwlock_wrlock (&vm->use);
  m = vr_vm_find (vm, disk);
  /* What is committed is then behind every log's commit point, and no hello
     can cut it off. */
  err = vm->damaged.code ? -EIO : harden (vm);
  if (m)
    pthread_mutex_lock (&m->order);
  pthread_mutex_lock (&vm->mutex);
  *ret = m;
  if (err == 0)
    err = hello_locked (vm, disk, hello, ret, refused);
  else
    refuse (refused, VR_REFUSED_IO, err, "%s: %s", vm->dir, strerror (-err));
  pthread_mutex_unlock (&vm->mutex);
  if (m) {
    pthread_cond_broadcast (&m->moved);
    pthread_mutex_unlock (&m->order);
  }
  pthread_rwlock_unlock (&vm->use);
  return err;
}

int
vr_vm_copied (struct vr_vm_member *m, uint64_t session)
{
  int err;

  pthread_rwlock_rdlock (&m->vm->use);
  pthread_mutex_lock (&m->order);
  err = m->session == session ? harden (m->vm) : -ESHUTDOWN;
  if (err == 0)
    err = vr_log_set_flags (m->log, 0, VR_LOG_COPYING);
  pthread_mutex_unlock (&m->order);
  pthread_rwlock_unlock (&m->vm->use);
  return err;
}

bool
vr_vm_is_whole (struct vr_vm_member *m)
{
  struct vr_log_info info;
  bool whole = false;

  pthread_rwlock_rdlock (&m->vm->use); /* hellos replace logs under it */
  if (m->log) {
    vr_log_info (m->log, &info);
    whole = !(info.super.flags & VR_LOG_COPYING);
  }
  pthread_rwlock_unlock (&m->vm->use);
  return whole;
}

void
vr_vm_goodbye (struct vr_vm_member *m, uint64_t session)
{
  pthread_mutex_lock (&m->order);
  if (m->session == session)
    m->session = 0;
  pthread_cond_broadcast (&m->moved);
  pthread_mutex_unlock (&m->order);
}

/* ---- Log bytes ---------------------------------------------------------- */

/* Wait until these bytes are next.  m->order held. */
static int
wait_turn (struct vr_vm_member *m, uint64_t session, uint64_t lsn,
           const void *buf, size_t n, void *opaque)
{
  for (;;) {
    if (m->session != session)
      return -ESHUTDOWN;
    m->heard_ns = vr_now_ns (m->vm->io);
    if (vr_log_expects (m->log, lsn, buf, n))
      return 0;
    if (lsn < vr_log_head (m->log))
      return -ERANGE;
    wait_step (&m->moved, &m->order, WAIT_STEP_NS);
    if (m->vm->keep_waiting && !m->vm->keep_waiting (opaque))
      return -ESHUTDOWN;
  }
}

/* Append when it is our turn and there is space.  m->order held; it is kept
   while waiting for space, since those behind us must wait anyway. */
static int
append_in_order (struct vr_vm_member *m, uint64_t session, uint64_t lsn,
                 const void *buf, size_t n, void *opaque,
                 struct vr_raw_result *result, struct vr_refused *refused)
{
  const char *reason = NULL;
  int err = wait_turn (m, session, lsn, buf, n, opaque);

  while (err == 0) {
    err = vr_log_append_raw (m->log, lsn, buf, n, m->generation, result,
                             &reason);
    if (err != -EAGAIN)
      break;
    m->busy++;
    pthread_mutex_unlock (&m->order);
    vr_log_wait_space (m->log, WAIT_STEP_NS);
    pthread_mutex_lock (&m->order);
    m->busy--;
    pthread_cond_broadcast (&m->moved);
    err = m->vm->keep_waiting && !m->vm->keep_waiting (opaque)
              ? -ESHUTDOWN
              : wait_turn (m, session, lsn, buf, n, opaque);
  }
  if (err == -EBADMSG)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL, "at LSN %llu: %s",
                   (unsigned long long) lsn, reason);
  if (err == -ERANGE)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                   "write at LSN %llu, which is behind the end of the log",
                   (unsigned long long) lsn);
  if (err < 0 && err != -ESHUTDOWN)
    refuse (refused, VR_REFUSED_IO, err, "%s: %s", vr_log_path (m->log),
            strerror (-err));
  return err;
}

/* A seal is durable here: take part in the commit, and wait for it. */
static int
commit_and_wait (struct vr_vm_member *m, uint64_t session, uint64_t epoch,
                 void *opaque)
{
  struct vr_vm *vm = m->vm;
  int err;

  pthread_mutex_lock (&vm->mutex);
  /* A new writer may have cut this seal off. */
  err = m->session == session ? 0 : -ESHUTDOWN;
  if (err == 0 && m->sealed_epoch < epoch)
    m->sealed_epoch = epoch;
  if (err == 0)
    err = commit_locked (vm);
  while (err == 0 && vm->committed_epoch < epoch) {
    wait_step (&vm->committed_changed, &vm->mutex, WAIT_STEP_NS);
    if (vm->committed_epoch >= epoch)
      break;
    if (m->session != session
        || (vm->keep_waiting && !vm->keep_waiting (opaque)))
      err = -ESHUTDOWN;
  }
  pthread_mutex_unlock (&vm->mutex);
  return err;
}

/* Bring what was appended to the file; a seal durably, as configured. */
static int
write_down (struct vr_vm_member *m, const struct vr_raw_result *result)
{
  int err;

  if (result->sealed_epoch == 0)
    err = vr_log_write_out (m->log, WRITE_OUT_BYTES);
  else if (m->vm->sync_memory)
    err = vr_log_write_out (m->log, 0);
  else
    err = vr_log_sync (m->log, result->sealed_lsn);
  pthread_mutex_lock (&m->order);
  m->busy--;
  pthread_cond_broadcast (&m->moved);
  pthread_mutex_unlock (&m->order);
  return err;
}

int
vr_vm_write (struct vr_vm_member *m, uint64_t session, uint64_t lsn,
             const void *buf, size_t n, void *opaque,
             struct vr_refused *refused)
{
  struct vr_raw_result result = { 0 };
  int err;

  *refused = (struct vr_refused){ 0 };
  if (n == 0 || n > VR_SHIP_MAX)
    return refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                   "write of %zu bytes", n);
  pthread_mutex_lock (&m->order);
  err = append_in_order (m, session, lsn, buf, n, opaque, &result, refused);
  if (err == 0)
    m->busy++;
  pthread_cond_broadcast (&m->moved);
  pthread_mutex_unlock (&m->order);
  if (err < 0)
    return err;
  err = write_down (m, &result);
  if (err == -ESTALE)
    return -ESHUTDOWN; /* the session went first */
  if (err < 0)
    return refuse (refused, VR_REFUSED_IO, err, "%s: %s",
                   vr_log_path (m->log), strerror (-err));
  if (result.sealed_epoch == 0)
    return 0;
  return commit_and_wait (m, session, result.sealed_epoch, opaque);
}

uint64_t
vr_vm_wait_committed (struct vr_vm *vm, uint64_t epoch, uint64_t timeout_ns)
{
  uint64_t committed;

  pthread_mutex_lock (&vm->mutex);
  if (vm->committed_epoch < epoch)
    wait_step (&vm->committed_changed, &vm->mutex, (long) timeout_ns);
  committed = vm->committed_epoch;
  pthread_mutex_unlock (&vm->mutex);
  return committed;
}

/* ---- Apply and promote -------------------------------------------------- */

/* Member i, or NULL.  Members are only ever added. */
static struct vr_vm_member *
member_at (struct vr_vm *vm, size_t i)
{
  struct vr_vm_member *m;

  pthread_mutex_lock (&vm->mutex);
  m = i < vm->member_count ? vm->members[i] : NULL;
  pthread_mutex_unlock (&vm->mutex);
  return m;
}

int
vr_vm_apply (struct vr_vm *vm, uint64_t max_bytes, uint64_t *ret_bytes)
{
  struct vr_vm_member *m;
  int err = 0;

  *ret_bytes = 0;
  pthread_rwlock_rdlock (&vm->use);
  err = vm->damaged.code ? -EIO : harden (vm);
  for (size_t i = 0; (m = member_at (vm, i)) != NULL && err == 0; i++) {
    uint64_t n = 0;

    err = vr_image_apply (&m->img, max_bytes, &n);
    *ret_bytes += n;
  }
  pthread_rwlock_unlock (&vm->use);
  return err;
}

/* So much is applied that recycling it pays, before the writer has to wait
   for it. */
static bool
journal_needs_space (struct vr_vm_member *m)
{
  struct vr_log_info info;

  vr_log_info (m->log, &info);
  return m->img.dirty_bytes >= info.capacity / CHECKPOINT_SHARE;
}

int
vr_vm_checkpoint (struct vr_vm *vm, uint64_t min_bytes)
{
  struct vr_vm_member *m;
  int err;

  pthread_rwlock_rdlock (&vm->use);
  err = vm->damaged.code ? -EIO : 0;
  for (size_t i = 0; (m = member_at (vm, i)) != NULL && err == 0; i++)
    if (m->img.dirty_bytes >= min_bytes || journal_needs_space (m))
      err = vr_image_checkpoint (&m->img);
  pthread_rwlock_unlock (&vm->use);
  return err;
}

static int
promotable (struct vr_vm *vm, struct vr_refused *refused)
{
  if (vm->damaged.code) {
    *refused = vm->damaged;
    return -EPERM;
  }
  if (vm->member_count == 0)
    return refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                   "%s: no disk was ever replicated here", vm->dir);
  for (size_t i = 0; i < vm->member_count; i++) {
    struct vr_log_info info;

    vr_log_info (vm->members[i]->log, &info);
    if (info.super.flags & VR_LOG_COPYING)
      return refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                     "%s/%s.img: its first copy was not finished, the image "
                     "is incomplete",
                     vm->dir, vm->members[i]->name);
  }
  return 0;
}

static int
promote_member (struct vr_vm_member *m)
{
  uint64_t n;
  int err;

  do
    err = vr_image_apply (&m->img, 16 << 20, &n);
  while (err == 0 && n > 0);
  if (err == 0)
    err = vr_image_checkpoint (&m->img);
  if (err == 0)
    err = vr_log_set_flags (m->log, VR_LOG_PROMOTED, 0);
  return err;
}

int
vr_vm_promote (struct vr_vm *vm, struct vr_refused *refused)
{
  bool again = true;
  int err;

  *refused = (struct vr_refused){ 0 };
  err = promotable (vm, refused);
  if (err < 0)
    return err;
  for (size_t i = 0; i < vm->member_count; i++) {
    struct vr_log_info info;

    vr_log_info (vm->members[i]->log, &info);
    if (!(info.super.flags & VR_LOG_PROMOTED))
      again = false;
  }
  if (again)
    return 0;
  /* First: from here on no older primary is listened to. */
  vm->page.generation++;
  vm->page.committed_epoch = vm->committed_epoch;
  err = write_page (vm);
  if (err == 0)
    err = harden (vm);
  for (size_t i = 0; i < vm->member_count && err == 0; i++)
    err = promote_member (vm->members[i]);
  if (err < 0)
    refuse (refused, VR_REFUSED_IO, err, "%s: %s", vm->dir, strerror (-err));
  return err;
}
