/* SPDX-License-Identifier: BSD-3-Clause */
/* The backup of one VM: its member logs, their images and the commit.
 *
 *   DIR/VM/lock          held by the process that serves or promotes the VM
 *   DIR/VM/epoch         struct vr_epoch_page: members, generation (durable)
 *   DIR/VM/DISK.journal  the log
 *   DIR/VM/DISK.img      the base image
 *
 * The commit rule: epoch N is committed when every member's log durably holds
 * a seal of an epoch >= N.  There is no other commit record: after a crash
 * the smallest of the members' last durable seals is the committed epoch, and
 * it includes every epoch that was ever acknowledged.  The commit point in a
 * superblock only lets damage be told from a torn tail.
 *
 * Threads: any, concurrently, unless noted.  Errors: 0 or negative errno;
 * refusals also fill in a struct vr_refused.
 */
#ifndef VR_VM_H
#define VR_VM_H

#include "image.h"

#define VR_MEMBERS_MAX VR_EPOCH_MEMBERS

struct vr_refused {
  enum vr_refusal code;
  char text[512];
};

struct vr_vm;

struct vr_vm_member {
  struct vr_vm *vm;
  char name[VR_NAME_SIZE];
  struct vr_file *base;
  struct vr_log *log;
  struct vr_image img;

  /* Appending in LSN order.  order guards session and busy; broadcast when
     head moved or one of these changed. */
  pthread_mutex_t order;
  pthread_cond_t moved;
  _Atomic uint64_t session; /* of the writer; 0: none */
  unsigned busy; /* writes that use the log though order is not held */
  uint64_t generation; /* the writer's */
  uint64_t heard_ns;   /* last message of the writer */
  char writer[VR_NAME_SIZE];

  uint64_t sealed_epoch; /* durable; vm->mutex */
};

struct vr_vm {
  struct vr_io *io;
  char *dir; /* DIR/VM */
  char name[VR_NAME_SIZE];
  struct vr_file *lock;
  bool sync_memory; /* commit once written, not once durable */
  uint64_t writer_timeout_ns;

  /* Held shared while logs and images are used, exclusively while a hello may
     replace them; before order and mutex. */
  pthread_rwlock_t use;
  pthread_mutex_t mutex;
  pthread_cond_t committed_changed;
  struct vr_epoch_page page; /* as in DIR/VM/epoch */
  uint64_t committed_epoch;
  struct vr_vm_member *members[VR_MEMBERS_MAX];
  size_t member_count;
  struct vr_refused damaged; /* code set: nothing is served */

  /* Asked about every 50 ms by whoever waits; false gives up with
     -ESHUTDOWN. */
  bool (*keep_waiting) (void *opaque);
};

struct vr_vm_config {
  const char *dir; /* DIR */
  const char *name;
  bool sync_memory;
  bool create;
  uint64_t writer_timeout_ns; /* a writer unheard of for so long may be
                                 replaced by one of the same generation */
  bool (*keep_waiting) (void *opaque);
};

/* Lock, open and recover a VM.  -ENOENT if it does not exist (unless create),
 * -EAGAIN if another process has it (message says who).  Damage is no error:
 * vm->damaged says what, and every hello is refused with it. */
int vr_vm_open (struct vr_io *io, const struct vr_vm_config *config,
                struct vr_vm **ret, char *message, size_t message_size);

/* No other call may be running. */
void vr_vm_close (struct vr_vm *vm);

/* The member called disk, or NULL. */
struct vr_vm_member *vr_vm_find (struct vr_vm *vm, const char *disk);

/* Answer for offset 0 of VM/DISK; works before the log exists. */
void vr_vm_status (struct vr_vm *vm, const char *disk,
                   const struct vr_refused *refused, struct vr_status *ret);

/* The same where there is no such VM. */
void vr_status_empty (const char *vm, const char *disk,
                      const struct vr_refused *refused,
                      struct vr_status *ret);

/* What can be said of a hello without looking at what is there: 0, or a
   refusal. */
int vr_hello_check (const struct vr_hello *hello, const char *vm,
                    const char *disk, struct vr_refused *refused);

/* A writer introduces itself for VM/DISK.  opaque is passed to keep_waiting.
   On success *ret is the member.  A refusal gives a negative errno, with the
   reason in *refused. */
int vr_vm_hello (struct vr_vm *vm, const char *disk,
                 const struct vr_hello *hello, struct vr_vm_member **ret,
                 struct vr_refused *refused);

/* The copy that this log began with is complete: it may be promoted. */
int vr_vm_copied (struct vr_vm_member *m, uint64_t session);

/* Is the image a disk, so that views of it may be opened?  Once it is, it
   stays one. */
bool vr_vm_is_whole (struct vr_vm_member *m);

/* With sync=memory the logs' commit points follow the VM's; bring them up to
   it now, so that a view of the last commit is one. */
int vr_vm_settle (struct vr_vm *vm);

/* The writer is gone. */
void vr_vm_goodbye (struct vr_vm_member *m, uint64_t session);

/* Log bytes at lsn.  Waits for its turn; if they hold a seal, returns when
 * that epoch is committed.  -ESHUTDOWN: another writer took over, or
 * keep_waiting said no. */
int vr_vm_write (struct vr_vm_member *m, uint64_t session, uint64_t lsn,
                 const void *buf, size_t n, void *opaque,
                 struct vr_refused *refused);

/* Wait until epoch is committed or timeout_ns passed; the committed epoch. */
uint64_t vr_vm_wait_committed (struct vr_vm *vm, uint64_t epoch,
                               uint64_t timeout_ns);

/* Apply what is committed on every member, at most max_bytes each.
   *ret_bytes: of all.  -EIO if the VM is damaged. */
int vr_vm_apply (struct vr_vm *vm, uint64_t max_bytes, uint64_t *ret_bytes);

/* Sync images and recycle logs where at least min_bytes or a good part of the
   journal were applied. */
int vr_vm_checkpoint (struct vr_vm *vm, uint64_t min_bytes);

/* Make the images the disks at the committed epoch and stop accepting log.
 * The tail behind it is discarded, the generation goes up.  Doing it again
 * changes nothing.  A refusal is -EPERM with its reason. */
int vr_vm_promote (struct vr_vm *vm, struct vr_refused *refused);

#endif /* VR_VM_H */
