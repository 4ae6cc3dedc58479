/* SPDX-License-Identifier: BSD-3-Clause */
/* See attach.h. */
#include "memsync/attach.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#define QMP_TIMEOUT_MS 2000

#ifdef __x86_64__

#define STOP_TIMEOUT_NS UINT64_C (1000000000)
#define POLL_NS 20000
#define SPIN_NS 500000 /* a stop that takes no longer is not slept for */

/* The kernel's own; user space has no header for them. */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

#define SYSCALL_SIZE 2     /* bytes of the instruction */
#define USER_CS64 0x33     /* code segment of a 64-bit process */

/* ---- The detour --------------------------------------------------------- */

/* The stack on arrival, below the 128 bytes under the stack pointer that
   belong to whoever runs there (the ABI's red zone). */
struct frame {
  uint64_t number, argument[3]; /* of the system call */
  uint64_t rax, back;           /* to return with, and to */
};

#define RED_ZONE 128
#define FRAME_WORDS (sizeof (struct frame) / 8)

/* A system call preserves all registers but rax, rcx and r11.  The return
   takes the frame and the red zone off the stack in one instruction: a signal
   may come between any two, and overwrites what is under the stack pointer. */
__asm__ (".pushsection .rodata\n"
         ".balign 8\n"
         "vr_detour:\n"
         "  pushfq\n"
         "  push %rdi\n"
         "  push %rsi\n"
         "  push %rdx\n"
         "  push %rcx\n"
         "  push %r11\n"
         "  mov 48(%rsp), %rax\n" /* frame.number */
         "  mov 56(%rsp), %rdi\n"
         "  mov 64(%rsp), %rsi\n"
         "  mov 72(%rsp), %rdx\n"
         "  syscall\n"
         "vr_detour_done:\n"
         "  mov %rax, %rdi\n"
         "  mov $3, %eax\n" /* close; of an error, it fails: no matter */
         "  syscall\n"
         "  pop %r11\n"
         "  pop %rcx\n"
         "  pop %rdx\n"
         "  pop %rsi\n"
         "  pop %rdi\n"
         "  popfq\n"
         "  mov 32(%rsp), %rax\n" /* frame.rax */
         "  lea 40(%rsp), %rsp\n" /* to frame.back */
         "  ret $128\n"
         ".org vr_detour + 80\n" /* an error if it is longer */
         ".popsection\n");

extern const uint8_t vr_detour[] __attribute__ ((visibility ("hidden")));
extern const uint8_t vr_detour_done[] __attribute__ ((visibility ("hidden")));

#define DETOUR_SIZE 80 /* bytes, as in the .org above */
#define DETOUR_WORDS (DETOUR_SIZE / 8)

struct job {
  pid_t pid;
  uint64_t number, argument[3];
  int pidfd;
  uint64_t detour; /* its address in the process */
  bool is_there;   /* as somebody left it */
  uint64_t back;   /* where it leads to, */
  uint64_t rsp;    /* and the stack pointer there */
  uint64_t deadline_ns;

  bool seized;
  uint64_t stopped_at; /* 0: runs */
  uint64_t stopped_ns;
  int fd; /* the result */
  int err;
  struct vr_problem *problem;
};

static uint64_t
now_ns (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * 1000000000 + (uint64_t) t.tv_nsec;
}

/* ---- The place for it --------------------------------------------------- */

/* Where the vDSO's mapping ends in the process. */
static int
find_vdso_end (pid_t pid, uint64_t *ret)
{
  char path[64], line[512];
  FILE *f;
  int err = -ENOENT;

  snprintf (path, sizeof path, "/proc/%d/maps", (int) pid);
  f = fopen (path, "re");
  if (!f)
    return -errno;
  while (err < 0 && fgets (line, sizeof line, f)) {
    unsigned long start, end;

    if (strstr (line, "[vdso]") && sscanf (line, "%lx-%lx", &start, &end) == 2
        && end - start >= DETOUR_SIZE) {
      *ret = end;
      err = 0;
    }
  }
  fclose (f);
  return err;
}

/* How many bytes of the room are the beginning of the detour, the others being
   zeros; -1 if there is something else.  It is written forwards and wiped out
   backwards, so this is what is left by who was killed meanwhile. */
static int
find_beginning (const uint8_t *room)
{
  int n = 0;

  while (n < DETOUR_SIZE && room[n] == vr_detour[n])
    n++;
  for (int i = n; i < DETOUR_SIZE; i++)
    if (room[i] != 0)
      return -1;
  return n;
}

static int
find_room (struct job *j)
{
  uint8_t room[DETOUR_SIZE];
  struct iovec here = { room, sizeof room }, there = { NULL, sizeof room };
  uint64_t end = 0;
  int n, err = find_vdso_end (j->pid, &end);

  if (err < 0)
    return vr_problem (j->problem, err, "process %d: finding its vDSO: %s",
                       (int) j->pid, strerror (-err));
  j->detour = end - DETOUR_SIZE;
  there.iov_base = (void *) (uintptr_t) j->detour;
  if (process_vm_readv (j->pid, &here, 1, &there, 1, 0) != sizeof room) {
    err = errno ? -errno : -EIO;
    return vr_problem (j->problem, err, "process %d: reading its memory: %s",
                       (int) j->pid, strerror (-err));
  }
  n = find_beginning (room);
  if (n < 0)
    return vr_problem (j->problem, -ENOSPC,
                       "process %d: no room behind the vDSO's code",
                       (int) j->pid);
  j->is_there = n == DETOUR_SIZE;
  return 0;
}

/* The detour returns to where no call came from. */
static int
check_shadow_stack (struct job *j)
{
  char path[64], line[512];
  bool found = false;
  FILE *f;

  snprintf (path, sizeof path, "/proc/%d/status", (int) j->pid);
  f = fopen (path, "re");
  if (!f)
    return vr_problem (j->problem, -errno, "%s: %s", path, strerror (errno));
  while (fgets (line, sizeof line, f))
    found |= strncmp (line, "x86_Thread_features:", 20) == 0
             && strstr (line, "shstk");
  fclose (f);
  if (found)
    return vr_problem (j->problem, -EOPNOTSUPP,
                       "process %d uses a shadow stack", (int) j->pid);
  return 0;
}

/* ---- Stops -------------------------------------------------------------- */

static int
trace_failed (struct job *j, const char *what)
{
  const int err = errno == 0 ? -EIO : -errno;

  return vr_problem (j->problem, err, "process %d: %s: %s", (int) j->pid, what,
                     strerror (-err));
}

static int
resume (struct job *j, enum __ptrace_request how, int signal_number)
{
  if (ptrace (how, j->pid, NULL, (void *) (intptr_t) signal_number) == -1)
    return trace_failed (j, "resuming it");
  if (j->stopped_at)
    j->stopped_ns += now_ns () - j->stopped_at;
  j->stopped_at = 0;
  return 0;
}

/* Wait for a change of state; *ret is waitpid's status. */
static int
wait_change (struct job *j, int *ret)
{
  const struct timespec pause = { 0, POLL_NS };
  const uint64_t begin = now_ns ();

  for (;;) {
    const pid_t pid = waitpid (j->pid, ret, __WALL | WNOHANG);

    if (pid == -1 && errno != EINTR)
      return trace_failed (j, "waiting for it");
    if (pid == j->pid)
      break;
    if (now_ns () > j->deadline_ns)
      return vr_problem (j->problem, -ETIMEDOUT,
                         "process %d: its main thread does not stop",
                         (int) j->pid);
    if (now_ns () - begin < SPIN_NS)
      sched_yield ();
    else
      nanosleep (&pause, NULL);
  }
  if (!WIFSTOPPED (*ret))
    return vr_problem (j->problem, -ESRCH, "process %d has ended",
                       (int) j->pid);
  j->stopped_at = now_ns ();
  return 0;
}

static bool
is_event_stop (int status)
{
  return status >> 16 == PTRACE_EVENT_STOP;
}

static bool
is_syscall_stop (int status)
{
  return status >> 8 == (SIGTRAP | 0x80);
}

/* Let it run, as `how` says, until a stop for which is_wanted; signals that
   arrive in between are delivered. */
static int
run_until (struct job *j, enum __ptrace_request how, bool (*is_wanted) (int),
           int *ret_status)
{
  int err, status, pass_on;

  for (;;) {
    err = wait_change (j, &status);
    if (err < 0)
      return err;
    if (is_wanted (status)) {
      *ret_status = status;
      return 0;
    }
    pass_on = is_event_stop (status) || is_syscall_stop (status)
                ? 0 : WSTOPSIG (status);
    err = resume (j, how, pass_on);
    if (err < 0)
      return err;
  }
}

/* Stop it wherever it is. */
static int
interrupt (struct job *j)
{
  int status, err;

  if (ptrace (PTRACE_INTERRUPT, j->pid, NULL, NULL) == -1)
    return trace_failed (j, "interrupting it");
  err = run_until (j, PTRACE_CONT, is_event_stop, &status);
  if (err == 0 && WSTOPSIG (status) != SIGTRAP)
    return vr_problem (j->problem, -EBUSY,
                       "process %d is stopped by a signal (SIGCONT helps)",
                       (int) j->pid);
  return err;
}

/* Stop it behind the detour's system call, and give what it returned. */
static int
run_syscall (struct job *j, int64_t *ret)
{
  const uint64_t done = j->detour + (uint64_t) (vr_detour_done - vr_detour);
  struct __ptrace_syscall_info info;
  int status, err;

  for (;;) {
    err = resume (j, PTRACE_SYSCALL, 0);
    if (err == 0)
      err = run_until (j, PTRACE_SYSCALL, is_syscall_stop, &status);
    if (err < 0)
      return err;
    if (ptrace (PTRACE_GET_SYSCALL_INFO, j->pid, (void *) sizeof info, &info)
        == -1)
      return trace_failed (j, "asking for its system call");
    /* A signal handler in between has system calls of its own. */
    if (info.op == PTRACE_SYSCALL_INFO_EXIT
        && info.instruction_pointer == done) {
      *ret = info.exit.rval;
      return 0;
    }
  }
}

/* ---- Send it on the detour ---------------------------------------------- */

/* With what and where it goes on: where it was, or at the system call that the
   stop interrupted. */
static void
fill_return (const struct user_regs_struct *regs, struct frame *f)
{
  const int64_t rax = (int64_t) regs->rax;

  f->rax = regs->rax;
  f->back = regs->rip;
  if ((int64_t) regs->orig_rax < 0)
    return;
  if (rax == -ERESTARTSYS || rax == -ERESTARTNOINTR || rax == -ERESTARTNOHAND)
    f->rax = regs->orig_rax;
  else if (rax == -ERESTART_RESTARTBLOCK)
    f->rax = SYS_restart_syscall;
  else
    return;
  f->back = regs->rip - SYSCALL_SIZE;
}

static int
poke (struct job *j, uint64_t address, uint64_t word)
{
  if (ptrace (PTRACE_POKETEXT, j->pid, (void *) address, (void *) word) == -1)
    return trace_failed (j, "writing to its memory");
  return 0;
}

/* Code that is there is left alone: somebody's detour may not be over yet, as
   when he was killed and the thread is in a signal handler now. */
static int
write_detour (struct job *j)
{
  uint64_t words[DETOUR_WORDS];
  int err = 0;

  memcpy (words, vr_detour, sizeof words);
  for (unsigned i = 0; i < DETOUR_WORDS && err == 0 && !j->is_there; i++)
    err = poke (j, j->detour + i * 8, words[i]);
  return err;
}

static int
write_frame (struct job *j, const struct user_regs_struct *regs,
             uint64_t address)
{
  struct frame f = {
    .number = j->number,
    .argument = { j->argument[0], j->argument[1], j->argument[2] },
  };
  uint64_t words[FRAME_WORDS];
  int err = 0;

  fill_return (regs, &f);
  j->back = f.back;
  j->rsp = regs->rsp;
  memcpy (words, &f, sizeof words);
  for (unsigned i = 0; i < FRAME_WORDS && err == 0; i++)
    err = poke (j, address + i * 8, words[i]);
  return err;
}

static int
start_detour (struct job *j)
{
  struct user_regs_struct regs;
  uint64_t frame;
  int err;

  if (ptrace (PTRACE_GETREGS, j->pid, NULL, &regs) == -1)
    return trace_failed (j, "reading its registers");
  if (regs.cs != USER_CS64)
    return vr_problem (j->problem, -EOPNOTSUPP,
                       "process %d is not a 64-bit process", (int) j->pid);
  frame = regs.rsp - RED_ZONE - sizeof (struct frame);
  err = write_detour (j);
  if (err == 0)
    err = write_frame (j, &regs, frame);
  if (err < 0)
    return err;
  regs.rip = j->detour;
  regs.rsp = frame;
  /* The detour restarts the system call, so the kernel must not. */
  regs.orig_rax = UINT64_MAX;
  if (ptrace (PTRACE_SETREGS, j->pid, NULL, &regs) == -1)
    return trace_failed (j, "setting its registers");
  return 0;
}

/* It stands behind the system call, its descriptor still open. */
static int
take_descriptor (struct job *j, int64_t result)
{
  const char *const what
    = j->number == SYS_ioctl ? "/dev/userfaultfd" : "userfaultfd";

  if (result < 0)
    return vr_problem (j->problem, (int) result, "process %d: %s: %s",
                       (int) j->pid, what, strerror ((int) -result));
  j->fd = (int) syscall (SYS_pidfd_getfd, j->pidfd, (int) result, 0);
  return j->fd == -1 ? trace_failed (j, "fetching the descriptor") : 0;
}

/* Is the thread back where it was, or in the system call there?  Elsewhere it
   may be in a signal handler that returns to the detour. */
static bool
is_back (const struct job *j, const struct user_regs_struct *regs)
{
  return regs->rsp == j->rsp
         && (regs->rip == j->back || regs->rip == j->back + SYSCALL_SIZE);
}

/* Wipe the detour out, if nobody needs it.  What fails here leaves no more
   than bytes that nobody sees. */
static void
clean_up (struct job *j)
{
  struct user_regs_struct regs;

  if (j->is_there)
    return;
  if (resume (j, PTRACE_CONT, 0) == 0 && interrupt (j) == 0
      && ptrace (PTRACE_GETREGS, j->pid, NULL, &regs) == 0
      && is_back (j, &regs))
    for (unsigned i = DETOUR_WORDS; i > 0; i--)
      poke (j, j->detour + (i - 1) * 8, 0);
}

static int
seize (struct job *j)
{
  /* No PTRACE_O_EXITKILL: our end must never be the guest's. */
  if (ptrace (PTRACE_SEIZE, j->pid, NULL, (void *) PTRACE_O_TRACESYSGOOD)
      == 0) {
    j->seized = true;
    return 0;
  }
  if (errno == EPERM)
    return vr_problem (j->problem, -EPERM,
                       "process %d cannot be traced: another tracer, or no "
                       "permission", (int) j->pid);
  return trace_failed (j, "tracing it");
}

static int
detour (struct job *j)
{
  struct vr_problem *problem = j->problem;
  int64_t result = 0;
  int err = seize (j);

  if (err == 0)
    err = interrupt (j);
  if (err == 0)
    err = start_detour (j);
  if (err == 0)
    err = run_syscall (j, &result);
  if (err < 0)
    return err;
  err = take_descriptor (j, result);
  j->problem = NULL;
  clean_up (j);
  j->problem = problem;
  return err;
}

static void *
detour_thread (void *opaque)
{
  struct job *j = opaque;

  j->deadline_ns = now_ns () + STOP_TIMEOUT_NS;
  j->err = detour (j);
  /* Fails if it is not stopped; then the end of this thread detaches. */
  if (j->seized)
    ptrace (PTRACE_DETACH, j->pid, NULL, NULL);
  if (j->stopped_at)
    j->stopped_ns += now_ns () - j->stopped_at;
  return NULL;
}

/* ---- Attach ------------------------------------------------------------- */

static int
run_thread (struct job *j)
{
  pthread_t thread;
  sigset_t all, old;
  int err;

  /* The thread is short: let others take our signals. */
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  err = pthread_create (&thread, NULL, detour_thread, j);
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  if (err != 0)
    return vr_problem (j->problem, -err, "starting a thread: %s",
                       strerror (err));
  pthread_join (thread, NULL);
  return j->err;
}

static int
attach (struct job *j, int *ret, struct vr_attach_times *times)
{
  int err;

  j->fd = -1;
  j->pidfd = (int) syscall (SYS_pidfd_open, j->pid, 0);
  if (j->pidfd == -1)
    return trace_failed (j, "opening it");
  err = find_room (j);
  if (err == 0)
    err = check_shadow_stack (j);
  if (err == 0)
    err = run_thread (j);
  close (j->pidfd);
  if (times)
    times->stopped_ns = j->stopped_ns;
  if (err == 0)
    *ret = j->fd;
  return err;
}

int
vr_attach (pid_t pid, int *ret, struct vr_attach_times *times,
           struct vr_problem *problem)
{
  struct job j = {
    .pid = pid,
    .number = SYS_userfaultfd,
    .argument = { O_CLOEXEC | O_NONBLOCK },
    .problem = problem,
  };

  return attach (&j, ret, times);
}

/* Linux 6.1; the headers of Debian 12 have it. */
int
vr_attach_by_device (pid_t pid, int device, int *ret,
                     struct vr_attach_times *times, struct vr_problem *problem)
{
  struct job j = {
    .pid = pid,
    .number = SYS_ioctl,
    .argument = { (uint64_t) device, USERFAULTFD_IOC_NEW,
                  O_CLOEXEC | O_NONBLOCK },
    .problem = problem,
  };

  return attach (&j, ret, times);
}

#else /* not x86-64 */

int
vr_attach (pid_t pid, int *ret, struct vr_attach_times *times,
           struct vr_problem *problem)
{
  (void) ret;
  (void) times;
  return vr_problem (problem, -EOPNOTSUPP,
                     "process %d: attaching works on x86-64 only", (int) pid);
}

int
vr_attach_by_device (pid_t pid, int device, int *ret,
                     struct vr_attach_times *times, struct vr_problem *problem)
{
  (void) device;
  return vr_attach (pid, ret, times, problem);
}

#endif

/* ---- An unprivileged QEMU ----------------------------------------------- */

static int
attach_with_device (pid_t pid, struct vr_qmp *q, int device, int *ret,
                    struct vr_attach_times *times, struct vr_problem *problem)
{
  struct vr_qmp_error error;
  int64_t set;
  int err, theirs;

  err = vr_qmp_add_fd (q, device, QMP_TIMEOUT_MS, &set, &theirs, &error);
  if (err < 0)
    return vr_problem (problem, err, "%s", error.text);
  err = vr_attach_by_device (pid, theirs, ret, times, problem);
  /* If that fails it keeps a descriptor that it may not use by itself. */
  vr_qmp_remove_fd (q, set, QMP_TIMEOUT_MS, NULL);
  return err;
}

int
vr_attach_qemu (pid_t pid, struct vr_qmp *q, int *ret,
                struct vr_attach_times *times, struct vr_problem *problem)
{
  int err = vr_attach (pid, ret, times, problem);
  int device;

  if (err != -EPERM)
    return err;
  device = open ("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
  if (device == -1) {
    err = -errno;
    return vr_problem (problem, err,
                       "/dev/userfaultfd, for a QEMU that may not call "
                       "userfaultfd: %s", strerror (-err));
  }
  err = attach_with_device (pid, q, device, ret, times, problem);
  close (device);
  return err;
}
