/* SPDX-License-Identifier: BSD-3-Clause */
/* The backup's conversation with a primary: status and hello; see vm.h. */
#include "vm_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                      "not a hello of version %u", VR_VERSION);
  if (!name_field_ok (h->vm) || !name_field_ok (h->disk)
      || strcmp (h->vm, vm) != 0 || strcmp (h->disk, disk) != 0
      || memchr (h->node, 0, sizeof h->node) == NULL || h->session == 0
      || h->lsn >= VR_LSN_MAX || h->disk_size == 0
      || h->disk_size >= VR_LSN_MAX || h->generation >= VR_EPOCH_MAX
      || memcmp (h->reserved, zeros, sizeof zeros) != 0
      || h->mode < VR_HELLO_CREATE || h->mode > VR_HELLO_COPIED)
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                      "hello with impossible fields, or for another export");
  return 0;
}

/* Is it this VM, and not an older primary of it?  vm->mutex held. */
static int
check_owner (struct vr_vm *vm, const struct vr_hello *h,
             struct vr_refused *refused)
{
  if (vm->member_count > 0 && memcmp (vm->page.vm_id, h->vm_id, 16) != 0)
    return vr_refuse (refused, VR_REFUSED_VM, -EPERM,
                      "another VM called %s is backed up here; use another "
                      "name, or remove %s to drop that backup",
                      vm->name, vm->dir);
  if (h->generation < vm->page.generation)
    return vr_refuse (refused, VR_REFUSED_GENERATION, -ESHUTDOWN,
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
  return vr_refuse (refused, VR_REFUSED_WRITER, -EPERM,
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
    return vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s",
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

  vr_vm_page_slot (vm, m->name)->sealed_epoch = vm->committed_epoch;
  err = vr_vm_write_page (vm);
  if (err < 0)
    vr_refuse (refused, VR_REFUSED_IO, err, "%s/epoch: %s", vm->dir,
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
    return vr_refuse (refused, VR_REFUSED_PROMOTED, -ESHUTDOWN,
                      "this backup was promoted at epoch %llu",
                      (unsigned long long) info.super.committed_epoch);
  if (memcmp (info.super.log_id, h->log_id, 16) != 0)
    return vr_refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                      "the backup holds another journal's history (committed "
                      "epoch %llu); to start over from this primary, remove "
                      "%s/%s.*",
                      (unsigned long long) info.super.committed_epoch,
                      m->vm->dir, m->name);
  if (info.super.disk_size != h->disk_size
      || info.super.segment_size != h->segment_size)
    return vr_refuse (refused, VR_REFUSED_SIZE, -EINVAL,
                      "disk has %llu bytes here, %llu there",
                      (unsigned long long) info.super.disk_size,
                      (unsigned long long) h->disk_size);
  if (h->lsn < info.sealed_lsn && remember_committed (m, refused) < 0)
    return -EIO;
  err = vr_log_truncate (m->log, h->lsn, h->chain);
  if (err == -ERANGE || err == -ESTALE)
    return vr_refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                      "the backup's log (committed to LSN %llu, ends at %llu) "
                      "does not contain the primary's position %llu",
                      (unsigned long long) info.super.committed_lsn,
                      (unsigned long long) info.head,
                      (unsigned long long) h->lsn);
  if (err < 0)
    return vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s",
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
  char *image = vr_vm_path (vm->dir, disk, ".img.new");
  char *journal = vr_vm_path (vm->dir, disk, ".journal.next");
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
    err = vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                     "hello with an impossible geometry");
  else if (err < 0)
    vr_refuse (refused, VR_REFUSED_IO, err, "%s/%s: cannot create: %s",
               vm->dir,
               disk, strerror (-err));
  free (image);
  free (journal);
  return err;
}

static int
rename_file (struct vr_vm *vm, const char *disk, const char *from_suffix,
             const char *to_suffix)
{
  char *from = vr_vm_path (vm->dir, disk, from_suffix);
  char *to = vr_vm_path (vm->dir, disk, to_suffix);
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
    vr_refuse (refused, VR_REFUSED_IO, err, "%s/%s: %s", vm->dir, disk,
               strerror (-err));
  return err;
}

/* A log that is not there yet, or whose first copy never finished. */
static int
create_member (struct vr_vm *vm, const char *disk, const struct vr_hello *h,
               struct vr_vm_member **ret, struct vr_refused *refused)
{
  struct vr_member *slot = vr_vm_page_slot (vm, disk);
  struct vr_vm_member *m;
  int err;

  if (slot == NULL)
    return vr_refuse (refused, VR_REFUSED_FORMAT, -ENOSPC,
                      "VM %s has %d disks already", vm->name, VR_MEMBERS_MAX);
  if (h->lsn == 0 || h->lsn % (h->segment_size ? h->segment_size : 1) != 0)
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                      "a new log must begin at a segment");
  err = create_files (vm, disk, h, refused);
  if (err == 0)
    err = install_files (vm, disk, refused);
  if (err < 0)
    return err;
  m = vr_vm_new_member (vm, disk);
  if (m == NULL)
    return -ENOMEM;
  err = vr_vm_open_member (m, refused);
  if (err == 0) {
    /* A new member must not hold back what is committed already, now or
       after a restart. */
    m->sealed_epoch = vm->committed_epoch;
    slot->sealed_epoch = vm->committed_epoch;
    snprintf (slot->name, sizeof slot->name, "%s", disk);
    slot->kind = VR_MEMBER_DISK;
    memcpy (vm->page.vm_id, h->vm_id, 16);
    err = vr_vm_write_page (vm);
    if (err < 0) {
      slot->name[0] = 0;
      vr_refuse (refused, VR_REFUSED_IO, err, "%s/epoch: %s", vm->dir,
                 strerror (-err));
    }
  }
  if (err < 0) {
    vr_vm_free_member (m);
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
    return vr_refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                      "the backup already holds a complete disk (committed "
                      "epoch %llu); to start over from this primary, remove "
                      "%s/%s.*",
                      (unsigned long long) info.super.committed_epoch, vm->dir,
                      m->name);
  if (h->lsn == 0 || h->lsn % (h->segment_size ? h->segment_size : 1) != 0)
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                      "a new log must begin at a segment");
  err = create_files (vm, m->name, h, refused);
  if (err == 0) {
    vr_vm_page_slot (vm, m->name)->sealed_epoch = vm->committed_epoch;
    err = vr_vm_write_page (vm);
    if (err < 0)
      vr_refuse (refused, VR_REFUSED_IO, err, "%s/epoch: %s", vm->dir,
                 strerror (-err));
  }
  if (err < 0)
    return err; /* what was there is as it was */
  /* An older session's writes may still be at it. */
  while (m->busy > 0)
    vr_vm_wait (&m->moved, &m->order, WAIT_STEP_NS);
  vr_vm_close_member (m);
  err = install_files (vm, m->name, refused);
  if (err == 0)
    err = vr_vm_open_member (m, refused);
  m->sealed_epoch = vm->committed_epoch;
  if (err < 0) {
    vr_vm_close_member (m);
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
    err = vr_vm_write_page (vm);
  }
  if (err == 0 && generation > m->generation)
    err = vr_log_set_generation (m->log, generation);
  if (err < 0)
    vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s", vm->dir,
               strerror (-err));
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
    err = vr_refuse (refused, VR_REFUSED_HISTORY, -EPERM,
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
  err = vm->damaged.code ? -EIO : vr_vm_harden (vm);
  if (m)
    pthread_mutex_lock (&m->order);
  pthread_mutex_lock (&vm->mutex);
  *ret = m;
  if (err == 0)
    err = hello_locked (vm, disk, hello, ret, refused);
  else
    vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s", vm->dir,
               strerror (-err));
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
  err = m->session == session ? vr_vm_harden (m->vm) : -ESHUTDOWN;
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

int
vr_vm_settle (struct vr_vm *vm)
{
  int err;

  pthread_rwlock_rdlock (&vm->use);
  err = vr_vm_harden (vm);
  pthread_rwlock_unlock (&vm->use);
  return err;
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
