/* SPDX-License-Identifier: BSD-3-Clause */
/* The backup's work: log bytes in, committed epochs onto the images,
   promotion; see vm.h. */
#include "vm_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* A log is recycled once this share of its journal is applied. */
#define CHECKPOINT_SHARE 3

/* Log bytes that may wait in memory before they are written to the file. */
#define WRITE_OUT_BYTES (UINT64_C (2) << 20)

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
    vr_vm_wait (&m->moved, &m->order, WAIT_STEP_NS);
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
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL, "at LSN %llu: %s",
                      (unsigned long long) lsn, reason);
  if (err == -ERANGE)
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
                      "write at LSN %llu, which is behind the end of the log",
                      (unsigned long long) lsn);
  if (err < 0 && err != -ESHUTDOWN)
    vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s", vr_log_path (m->log),
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
    err = vr_vm_commit_locked (vm);
  while (err == 0 && vm->committed_epoch < epoch) {
    vr_vm_wait (&vm->committed_changed, &vm->mutex, WAIT_STEP_NS);
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
    return vr_refuse (refused, VR_REFUSED_FORMAT, -EINVAL,
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
    return vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s",
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
    vr_vm_wait (&vm->committed_changed, &vm->mutex, (long) timeout_ns);
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
  err = vm->damaged.code ? -EIO : vr_vm_harden (vm);
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
    return vr_refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                      "%s: no disk was ever replicated here", vm->dir);
  for (size_t i = 0; i < vm->member_count; i++) {
    struct vr_log_info info;

    vr_log_info (vm->members[i]->log, &info);
    if (info.super.flags & VR_LOG_COPYING)
      return vr_refuse (refused, VR_REFUSED_HISTORY, -EPERM,
                        "%s/%s.img: its first copy was not finished, the "
                        "image is incomplete",
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
  err = vr_vm_write_page (vm);
  if (err == 0)
    err = vr_vm_harden (vm);
  for (size_t i = 0; i < vm->member_count && err == 0; i++)
    err = promote_member (vm->members[i]);
  if (err < 0)
    vr_refuse (refused, VR_REFUSED_IO, err, "%s: %s", vm->dir,
               strerror (-err));
  return err;
}
