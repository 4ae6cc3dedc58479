/* SPDX-License-Identifier: BSD-3-Clause */
/* Get a userfaultfd for the memory of a process that runs already.
 *
 * A userfaultfd works on the memory of the process that made it, so QEMU must
 * make it.  One of its threads is stopped with ptrace, sent on a detour that
 * runs one system call, and let go; the descriptor is fetched from it with
 * pidfd_getfd.
 *
 * THE DETOUR
 *
 * What must not happen: we are killed (SIGKILL, at any instruction) and leave
 * a thread stopped, in registers that are not its own, or with a descriptor
 * too many.  When a tracer dies, the kernel lets its tracee run on from where
 * it is.  So the detour is code that needs no tracer: it saves the registers,
 * runs the system call, closes the descriptor, restores the registers and
 * goes back.  It is written behind the end of the vDSO's code, into the zeros
 * of its last page, and what it works with below the thread's stack; then one
 * PTRACE_SETREGS moves instruction and stack pointer there.  Before that,
 * nothing has changed that anyone can see; behind it, the thread finds its way
 * home by itself, through signal handlers too.  While we live we stop it
 * between the two system calls, and take our copy of the descriptor; then the
 * code is wiped out.  It stays behind, for the next one to use, only if we are
 * killed.
 *
 * (The usual way, to set all registers to those of a system call and set them
 * back, crashes the process if the tracer dies in between.  Nor may a tracer
 * single-step: if it dies, the trap flag stays set and the next trap kills.)
 *
 * A thread is nearly always stopped in a blocking system call, which then has
 * to be restarted.  The kernel would do so, but only for registers that it
 * sees; so the detour ends at the system call instruction, with the number to
 * restart in rax, as the kernel's own restart does.
 *
 * All of this runs in a thread of its own, which ends with it: should a stop
 * not come in time, the end of the tracing thread detaches, whatever the
 * state.
 *
 * x86-64 only; others get -EOPNOTSUPP.  Needs CAP_SYS_PTRACE, or to be QEMU's
 * user with ptrace allowed.
 */
#ifndef VR_ATTACH_H
#define VR_ATTACH_H

#include <stdint.h>
#include <sys/types.h>

#include "memsync/problem.h"
#include "memsync/qmp.h"

struct vr_attach_times {
  uint64_t stopped_ns; /* how long its thread was kept from running */
};

/* Run userfaultfd (O_CLOEXEC | O_NONBLOCK) in process pid.  *ret becomes our
   descriptor, the only one.  times may be NULL.

   -EOPNOTSUPP: a 32-bit process, or one with a shadow stack.
   -EPERM: the process may not call it (see vm.unprivileged_userfaultfd; the
   next function helps), or we may not trace it; -EBUSY: it is being traced
   (by a debugger?) or stopped by a signal; -ETIMEDOUT: its main thread did
   not stop within a second; -ESRCH: no such process. */
int vr_attach (pid_t pid, int *ret, struct vr_attach_times *times,
               struct vr_problem *problem);

/* The same, for a QEMU that may not: we open /dev/userfaultfd, hand it over
   by QMP, and QEMU runs its USERFAULTFD_IOC_NEW.  Tries vr_attach first.
   QEMU's copy of the device is dropped again.  -ENOENT: there is no
   /dev/userfaultfd (kernel < 6.1). */
int vr_attach_qemu (pid_t pid, struct vr_qmp *q, int *ret,
                    struct vr_attach_times *times,
                    struct vr_problem *problem);

/* As vr_attach, with the ioctl on descriptor `device` of the process. */
int vr_attach_by_device (pid_t pid, int device, int *ret,
                         struct vr_attach_times *times,
                         struct vr_problem *problem);

#endif /* VR_ATTACH_H */
