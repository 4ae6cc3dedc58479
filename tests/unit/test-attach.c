/* SPDX-License-Identifier: BSD-3-Clause */
/* memsync/attach.h: a process to which somebody attaches notices nothing, even
   if that somebody is killed before or after any of its system calls. */
#include "util.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/userfaultfd.h>

#include "memsync/attach.h"

/* ---- Death at a system call --------------------------------------------- */

/* ptrace and waitpid are replaced, here in the program, by ones that count,
   and that kill the process when the count gets to die_at. */
static unsigned calls, die_at;

static void
count_call (void)
{
  if (++calls == die_at)
    kill (getpid (), SIGKILL);
}

long
ptrace (enum __ptrace_request request, ...)
{
  va_list args;
  pid_t pid;
  void *a, *b;
  long r;

  va_start (args, request);
  pid = va_arg (args, pid_t);
  a = va_arg (args, void *);
  b = va_arg (args, void *);
  va_end (args);
  count_call ();
  r = syscall (SYS_ptrace, request, pid, a, b);
  count_call ();
  return r;
}

pid_t
waitpid (pid_t pid, int *status, int options)
{
  pid_t r = (pid_t) syscall (SYS_wait4, pid, status, options, NULL);

  /* While it has not stopped nothing has happened: one call, not many. */
  if (r != 0)
    count_call ();
  return r;
}

/* ---- The process -------------------------------------------------------- */

/* What it does all the time, and checks. */
enum activity { SLEEPS, POLLS, READS, COMPUTES, TAKES_SIGNALS, KINDS };

struct shared {
  _Atomic uint64_t ticks;
  _Atomic uint64_t wrong; /* the line that found something amiss */
};

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition))                                                         \
      s->wrong = __LINE__;                                                    \
  } while (0)

static uint64_t
elapsed_us (const struct timespec *since)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) ((t.tv_sec - since->tv_sec) * 1000000
                     + (t.tv_nsec - since->tv_nsec) / 1000);
}

/* All general registers, flags and vector registers take part. */
static uint64_t
compute (uint64_t n)
{
  volatile double x = 1;
  uint64_t h = 1;

  for (uint64_t i = 0; i < n; i++) {
    h = (h ^ i) * UINT64_C (0x9e3779b97f4a7c15);
    h ^= h >> 29;
    x = x * 1.0000001 + (double) (i & 3);
  }
  return h ^ (uint64_t) x;
}

static void
act (struct shared *s, enum activity activity, int *pipe_fds)
{
  const struct timespec pause = { 0, 3000000 };
  struct pollfd p = { .fd = pipe_fds[0], .events = POLLIN };
  static uint64_t expected;
  struct timespec since;
  char byte = 'x';

  clock_gettime (CLOCK_MONOTONIC, &since);
  switch (activity) {
  case SLEEPS: /* restarts by restart_syscall */
    CHECK (nanosleep (&pause, NULL) == 0);
    CHECK (elapsed_us (&since) >= 3000);
    break;
  case POLLS: /* restarts without a signal handler */
    CHECK (ppoll (&p, 1, &pause, NULL) == 0);
    CHECK (elapsed_us (&since) >= 3000);
    break;
  case READS: /* restarts always; fed by the parent */
    CHECK (read (pipe_fds[0], &byte, 1) == 1);
    CHECK (byte == 'y');
    break;
  default: /* is not in a system call */
    if (expected == 0)
      expected = compute (20000);
    CHECK (compute (20000) == expected);
  }
  s->ticks++;
}

static void
take_signal (int number)
{
  (void) number;
}

/* Some signals arrive during each attach.  (Many more, and a thread that stops
   for each of them because it is traced gets nowhere.) */
static void
order_signals (void)
{
  const struct sigaction action = { .sa_handler = take_signal };
  const struct itimerval often = { { 0, 200 }, { 0, 200 } };

  sigaction (SIGALRM, &action, NULL);
  setitimer (ITIMER_REAL, &often, NULL);
}

struct process {
  pid_t pid;
  int pipe_fds[2];
  enum activity activity;
  struct shared *s;
};

static void
start_process (struct process *p, enum activity activity)
{
  p->activity = activity;
  p->s = mmap (NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
               -1, 0);
  assert_true (p->s != MAP_FAILED);
  assert_int_equal (pipe2 (p->pipe_fds, O_CLOEXEC), 0);
  p->pid = fork ();
  assert_true (p->pid != -1);
  if (p->pid == 0) {
    prctl (PR_SET_PDEATHSIG, SIGKILL);
    if (activity == TAKES_SIGNALS)
      order_signals ();
    for (;;)
      act (p->s, activity, p->pipe_fds);
  }
}

static void
stop_process (struct process *p)
{
  kill (p->pid, SIGKILL);
  waitpid (p->pid, NULL, 0);
  close (p->pipe_fds[0]);
  close (p->pipe_fds[1]);
  munmap (p->s, 4096);
}

/* It goes on; the 10 s are for a machine that others use. */
static void
assert_goes_on (struct process *p)
{
  const uint64_t ticks = p->s->ticks;

  for (unsigned i = 0; p->s->ticks < ticks + 2; i++) {
    if (p->activity == READS && i % 8 == 0)
      assert_int_equal (write (p->pipe_fds[1], "yy", 2), 2);
    assert_int_equal (waitpid (p->pid, NULL, WNOHANG), 0);
    assert_true (i < 2000);
    usleep (i < 20 ? 1000 : 5000);
  }
  assert_int_equal (p->s->wrong, 0);
}

static unsigned
open_files (pid_t pid)
{
  char path[64];
  unsigned n = 0;
  DIR *d;

  snprintf (path, sizeof path, "/proc/%d/fd", (int) pid);
  d = opendir (path);
  assert_non_null (d);
  while (readdir (d))
    n++;
  closedir (d);
  return n;
}

/* ---- Tests -------------------------------------------------------------- */

static bool may_attach = true;

static int
attach_or_fail (const struct process *p, struct vr_attach_times *times)
{
  struct vr_problem problem = { "" };
  int fd = -1;
  const int err = vr_attach (p->pid, &fd, times, &problem);

  if (err < 0)
    fail_msg ("%s", problem.text);
  return fd;
}

static void
assert_is_userfaultfd (int fd)
{
  struct uffdio_api api = { .api = UFFD_API };

  assert_int_equal (ioctl (fd, UFFDIO_API, &api), 0);
}

static void
attach_often (enum activity activity)
{
  struct vr_attach_times times;
  uint64_t longest = 0;
  struct process p;
  unsigned files;

  start_process (&p, activity);
  assert_goes_on (&p);
  files = open_files (p.pid);
  for (unsigned i = 0; i < 20; i++) {
    const int fd = attach_or_fail (&p, &times);

    if (times.stopped_ns > longest)
      longest = times.stopped_ns;
    assert_is_userfaultfd (fd);
    close (fd);
    assert_goes_on (&p);
  }
  assert_int_equal (open_files (p.pid), files);
  print_message ("activity %d: stopped for %llu us at most\n", activity,
                 (unsigned long long) longest / 1000);
  stop_process (&p);
}

static void
test_attach (void **state)
{
  (void) state;
  if (!may_attach)
    skip ();
  for (int i = 0; i < KINDS; i++)
    attach_often ((enum activity) i);
}

/* The userfaultfd is one of the process' memory, not of ours. */
static void
test_is_theirs (void **state)
{
  const size_t size = 16 * 4096;
  uint8_t *memory = mmap (NULL, size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct uffdio_api api = { .api = UFFD_API };
  struct uffdio_register r = {
    .range = { (uintptr_t) memory, size }, .mode = UFFDIO_REGISTER_MODE_WP };
  struct process p;
  int fd;

  (void) state;
  if (!may_attach)
    skip ();
  start_process (&p, SLEEPS);
  munmap (memory, size); /* the process still has it */
  fd = attach_or_fail (&p, NULL);
  assert_int_equal (ioctl (fd, UFFDIO_API, &api), 0);
  assert_int_equal (ioctl (fd, UFFDIO_REGISTER, &r), 0);
  close (fd);
  assert_goes_on (&p);
  stop_process (&p);
}

/* Attach in a process of its own that dies at call n; false when it did not
   get there. */
static bool
attach_and_die (const struct process *p, unsigned n)
{
  const pid_t pid = fork ();
  int status, fd;

  assert_true (pid != -1);
  if (pid == 0) {
    die_at = n;
    calls = 0;
    _exit (vr_attach (p->pid, &fd, NULL, NULL) == 0 ? 0 : 1);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  if (WIFEXITED (status)) {
    assert_int_equal (WEXITSTATUS (status), 0);
    return false;
  }
  assert_int_equal (WTERMSIG (status), SIGKILL);
  return true;
}

/* With a process of its own for each death, or with one that is attached to
   again and again, in whatever state it was left. */
static void
die_everywhere (enum activity activity, bool own)
{
  struct process p;
  unsigned files, n = 1;

  start_process (&p, activity);
  assert_goes_on (&p);
  files = open_files (p.pid);
  for (; attach_and_die (&p, n); n++) {
    if (n % 2 == 0) /* at once: it may still be on its way back */
      close (attach_or_fail (&p, NULL));
    assert_goes_on (&p);
    assert_int_equal (open_files (p.pid), files);
    if (own) {
      stop_process (&p);
      start_process (&p, activity);
      assert_goes_on (&p);
    }
  }
  print_message ("activity %d: died at %u places\n", activity, n - 1);
  assert_true (n > (own ? 50 : 30));
  stop_process (&p);
}

static void
test_die (void **state)
{
  (void) state;
  if (!may_attach)
    skip ();
  for (int i = 0; i < KINDS; i++) {
    die_everywhere ((enum activity) i, true);
    die_everywhere ((enum activity) i, false);
  }
}

static void
test_refusals (void **state)
{
  struct vr_problem problem;
  struct process p;
  int fd;

  (void) state;
  if (!may_attach)
    skip ();
  start_process (&p, SLEEPS);
  assert_int_equal (syscall (SYS_ptrace, PTRACE_SEIZE, p.pid, NULL, NULL), 0);
  assert_int_equal (vr_attach (p.pid, &fd, NULL, &problem), -EPERM);
  assert_non_null (strstr (problem.text, "another tracer"));
  assert_goes_on (&p);
  stop_process (&p);
  assert_int_equal (vr_attach (p.pid, &fd, NULL, &problem), -ESRCH);

  start_process (&p, SLEEPS);
  kill (p.pid, SIGSTOP);
  assert_int_equal (waitpid (p.pid, NULL, WUNTRACED), p.pid);
  assert_int_equal (vr_attach (p.pid, &fd, NULL, &problem), -EBUSY);
  kill (p.pid, SIGCONT);
  assert_goes_on (&p);
  stop_process (&p);
}

static void
find_out_whether_allowed (void)
{
  struct vr_problem problem;
  struct process p;
  int fd;

  start_process (&p, SLEEPS);
  if (vr_attach (p.pid, &fd, NULL, &problem) == 0)
    close (fd);
  else {
    print_message ("skipped: %s\n", problem.text);
    may_attach = false;
  }
  stop_process (&p);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_attach),
    cmocka_unit_test (test_is_theirs),
    cmocka_unit_test (test_die),
    cmocka_unit_test (test_refusals),
  };

  find_out_whether_allowed ();
  return cmocka_run_group_tests (tests, NULL, NULL);
}
