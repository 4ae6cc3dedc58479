/* SPDX-License-Identifier: BSD-3-Clause */
/* What the files of the backup share; see vm.h for what a VM is.
 *
 *   vm.c         files, members, open and close, the commit
 *   vm_hello.c   status and hello
 *   vm_log.c     log bytes, apply, promote
 *
 * Locks are taken in this order: vm->use, member->order, vm->mutex.
 */
#ifndef VR_VM_INTERNAL_H
#define VR_VM_INTERNAL_H

#include "vm.h"

/* How often a waiter looks whether it should give up. */
#define WAIT_STEP_NS 50000000L

/* Fill in *r; returns err. */
int vr_refuse (struct vr_refused *r, enum vr_refusal code, int err,
               const char *fmt, ...)
    __attribute__ ((format (printf, 4, 5)));

/* DIR/NAMESUFFIX, to be freed; NULL when out of memory. */
char *vr_vm_path (const char *dir, const char *name, const char *suffix);

/* Wait on c, which uses CLOCK_MONOTONIC, for at most ns. */
void vr_vm_wait (pthread_cond_t *c, pthread_mutex_t *m, long ns);

/* Write DIR/VM/epoch anew, durably.  vm->mutex held. */
int vr_vm_write_page (struct vr_vm *vm);

/* The slot of a member in the page, its own or a free one; NULL if full. */
struct vr_member *vr_vm_page_slot (struct vr_vm *vm, const char *disk);

/* A member without files; open its files; close them; free it. */
struct vr_vm_member *vr_vm_new_member (struct vr_vm *vm, const char *name);
int vr_vm_open_member (struct vr_vm_member *m, struct vr_refused *refused);
void vr_vm_close_member (struct vr_vm_member *m);
void vr_vm_free_member (struct vr_vm_member *m);

/* Recompute the commit from the members' durable seals.  vm->mutex held. */
int vr_vm_commit_locked (struct vr_vm *vm);

/* sync=memory: have logs and commit points follow what was answered.
   vm->use held. */
int vr_vm_harden (struct vr_vm *vm);

#endif /* VR_VM_INTERNAL_H */
