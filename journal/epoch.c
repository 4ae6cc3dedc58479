/* SPDX-License-Identifier: BSD-3-Clause */
/* See epoch.h.
 *
 * OFD locks belong to the open file description, so a handle keeps the one
 * descriptor it locked with.  Closing it gives up everything at once, and so
 * does the death of the process, unless a forked child still holds a copy.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "journal/epoch.h"

#define VR_EPOCH_SETUP_MS 5000
#define NS_PER_S 1000000000u

struct vr_epoch {
  struct vr_epoch_page *page;
  int fd; /* -1: private memory */
  bool readonly;
  atomic_bool is_clock;
  _Atomic uint32_t slots; /* bit i: slot i is ours */
  pthread_mutex_t mutex;  /* join and the clock: locks do not keep threads of
                             one handle apart */
};

static bool
all_zero (const void *buf, size_t n)
{
  const uint8_t *p = buf;

  for (size_t i = 0; i < n; i++)
    if (p[i] != 0)
      return false;
  return true;
}

/* Ownership.  */

static int
lock_byte (int fd, short type, unsigned byte)
{
  struct flock f = {
    .l_type = type,
    .l_whence = SEEK_SET,
    .l_start = byte,
    .l_len = 1,
  };

  while (fcntl (fd, F_OFD_SETLK, &f) < 0) {
    if (errno == EACCES)
      return -EAGAIN;
    if (errno != EINTR)
      return -errno;
  }
  return 0;
}

/* Whoever sets up or joins does so in microseconds; one that takes seconds is
   stopped, and waiting for ever would stop us, too. */
static int
lock_setup (int fd, short type)
{
  const struct timespec pause = { .tv_nsec = 1000000 };

  for (unsigned i = 0; i < VR_EPOCH_SETUP_MS; i++) {
    int r = lock_byte (fd, type, VR_EPOCH_LOCK_SETUP);

    if (r != -EAGAIN)
      return r;
    nanosleep (&pause, NULL);
  }
  return -ETIMEDOUT;
}

static void
unlock_setup (int fd)
{
  lock_byte (fd, F_UNLCK, VR_EPOCH_LOCK_SETUP);
}

/* Own a byte unless another handle does; there is none in private memory. */
static int
own_byte (const struct vr_epoch *e, unsigned byte)
{
  return e->fd < 0 ? 0 : lock_byte (e->fd, F_WRLCK, byte);
}

/* Field 22 of /proc/self/stat, in clock ticks since boot; 0 if unknown.  The
   second field, the name, may hold spaces and parentheses. */
static uint64_t
own_start_time (void)
{
  char buf[1024];
  unsigned long long start;
  const char *p;
  ssize_t n;
  int fd = open ("/proc/self/stat", O_RDONLY | O_CLOEXEC);

  if (fd < 0)
    return 0;
  n = read (fd, buf, sizeof buf - 1);
  close (fd);
  if (n <= 0)
    return 0;
  buf[n] = '\0';
  p = strrchr (buf, ')');
  if (!p || sscanf (p + 1,
                    " %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s"
                    " %*s %*s %*s %*s %*s %llu",
                    &start) != 1)
    return 0;
  return start;
}

/* The file.  */

static bool
valid_name (const char name[VR_NAME_SIZE])
{
  return name[0] != '\0' && memchr (name, '\0', VR_NAME_SIZE);
}

static bool
valid_member (const struct vr_member *m)
{
  uint32_t kind = atomic_load_explicit (&m->kind, memory_order_relaxed);

  /* The name of a free slot may be half of one: its writer was killed. */
  return kind == VR_MEMBER_FREE ||
         (kind <= VR_MEMBER_MEMORY && valid_name (m->name) &&
          m->reserved == 0 && all_zero (m->spare, sizeof m->spare));
}

/* Is the copy of a file, n bytes of it, an epoch page?  The rest of the copy
   is zeros. */
static int
validate (const struct vr_epoch_page *page, size_t n)
{
  if (memcmp (page->magic, VR_EPOCH_MAGIC, sizeof page->magic) != 0)
    return -EBADMSG;
  if (page->version > VR_EPOCH_VERSION)
    return -EPROTO;
  if (page->version != VR_EPOCH_VERSION || n != VR_EPOCH_FILE_SIZE ||
      page->flags != 0 || !valid_name (page->vm) ||
      !all_zero (page->spare, sizeof page->spare))
    return -EBADMSG;
  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++)
    if (!valid_member (&page->member[i]))
      return -EBADMSG;
  return 0;
}

static int
write_all (int fd, const void *buf, size_t n, off_t offset)
{
  const char *p = buf;

  while (n > 0) {
    ssize_t r = pwrite (fd, p, n, offset);

    if (r < 0 && errno == EINTR)
      continue;
    if (r < 0)
      return -errno;
    p += r;
    n -= (size_t) r;
    offset += r;
  }
  return 0;
}

/* Bytes read, up to n. */
static ssize_t
read_all (int fd, void *buf, size_t n)
{
  size_t done = 0;

  while (done < n) {
    ssize_t r = pread (fd, (char *) buf + done, n - done, (off_t) done);

    if (r < 0 && errno == EINTR)
      continue;
    if (r < 0)
      return -errno;
    if (r == 0)
      break;
    done += (size_t) r;
  }
  return (ssize_t) done;
}

/* Magic last: a file without it was left by one who died here, and may be
   written again. */
static int
initialise_file (int fd, struct vr_epoch_page *page)
{
  int r = write_all (fd, page, VR_EPOCH_FILE_SIZE, 0);

  if (r == 0 && fdatasync (fd) < 0)
    r = -errno;
  if (r < 0)
    return r;
  memcpy (page->magic, VR_EPOCH_MAGIC, sizeof page->magic);
  r = write_all (fd, page->magic, sizeof page->magic, 0);
  if (r == 0 && fdatasync (fd) < 0)
    r = -errno;
  return r;
}

/* A page without magic.  All other counters begin at 0. */
static void
fill_page (struct vr_epoch_page *page, const char *vm, const uint8_t vm_id[16])
{
  page->version = VR_EPOCH_VERSION;
  memcpy (page->vm_id, vm_id, sizeof page->vm_id);
  memcpy (page->vm, vm, strlen (vm) + 1);
}

static int
create_page (int fd, const char *vm, uint8_t vm_id[16])
{
  struct vr_epoch_page *page;
  int r;

  if (all_zero (vm_id, 16) && getrandom (vm_id, 16, 0) != 16)
    return -EIO;
  page = calloc (1, VR_EPOCH_FILE_SIZE);
  if (!page)
    return -ENOMEM;
  fill_page (page, vm, vm_id);
  r = initialise_file (fd, page);
  free (page);
  return r;
}

/* Copy and judge the file, under the setup lock.  1: there is no page yet. */
static int
examine (int fd, struct vr_epoch_page *copy)
{
  struct stat st;
  ssize_t n;

  if (fstat (fd, &st) < 0)
    return -errno;
  if (!S_ISREG (st.st_mode))
    return -EBADMSG;
  n = read_all (fd, copy, VR_EPOCH_FILE_SIZE);
  if (n < 0)
    return (int) n;
  if (st.st_size <= VR_EPOCH_FILE_SIZE &&
      all_zero (copy->magic, sizeof copy->magic))
    return 1;
  return validate (copy, (size_t) st.st_size);
}

static int
check_vm (const struct vr_epoch_page *page, const char *vm,
          const uint8_t vm_id[16])
{
  if (strcmp (page->vm, vm) != 0)
    return -EXDEV;
  if (!all_zero (vm_id, 16) && memcmp (page->vm_id, vm_id, 16) != 0)
    return -EXDEV;
  return 0;
}

/* Find out whose page it is, and make it if there is none. */
static int
set_up (int fd, const char *vm, uint8_t vm_id[16])
{
  struct vr_epoch_page *copy = calloc (1, VR_EPOCH_FILE_SIZE);
  int r;

  if (!copy)
    return -ENOMEM;
  r = examine (fd, copy);
  if (r == 1)
    r = create_page (fd, vm, vm_id);
  else if (r == 0) {
    r = check_vm (copy, vm, vm_id);
    if (r == 0)
      memcpy (vm_id, copy->vm_id, 16);
  }
  free (copy);
  return r;
}

/* Handles.  */

static int
new_handle (int fd, bool readonly, struct vr_epoch **ret)
{
  struct vr_epoch *e = calloc (1, sizeof *e);
  int prot = readonly ? PROT_READ : PROT_READ | PROT_WRITE;
  int flags = fd < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED;
  int r;

  if (!e)
    return -ENOMEM;
  e->fd = fd;
  e->readonly = readonly;
  e->page = mmap (NULL, VR_EPOCH_FILE_SIZE, prot, flags, fd, 0);
  if (e->page == MAP_FAILED) {
    r = -errno;
    free (e);
    return r;
  }
  r = -pthread_mutex_init (&e->mutex, NULL);
  if (r < 0) {
    munmap (e->page, VR_EPOCH_FILE_SIZE);
    free (e);
    return r;
  }
  *ret = e;
  return 0;
}

static int
check_vm_argument (const char *vm)
{
  if (vm[0] == '\0')
    return -EINVAL;
  return strlen (vm) < VR_NAME_SIZE ? 0 : -ENAMETOOLONG;
}

int
vr_epoch_open (const char *path, const char *vm, uint8_t vm_id[16],
               uint64_t open_min, struct vr_epoch **ret)
{
  int fd, r;

  r = check_vm_argument (vm);
  if (r < 0)
    return r;
  fd = open (path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY, 0660);
  if (fd < 0)
    return -errno;
  r = lock_setup (fd, F_WRLCK);
  if (r == 0)
    r = set_up (fd, vm, vm_id);
  if (r == 0)
    r = new_handle (fd, false, ret);
  if (r < 0) {
    close (fd);
    return r;
  }
  unlock_setup (fd);
  vr_epoch_raise (*ret, open_min);
  return 0;
}

int
vr_epoch_new_private (const char *vm, const uint8_t vm_id[16],
                      uint64_t open_min, struct vr_epoch **ret)
{
  int r = check_vm_argument (vm);

  if (r == 0)
    r = new_handle (-1, false, ret);
  if (r < 0)
    return r;
  fill_page ((*ret)->page, vm, vm_id);
  memcpy ((*ret)->page->magic, VR_EPOCH_MAGIC, sizeof (*ret)->page->magic);
  vr_epoch_raise (*ret, open_min);
  return 0;
}

static int
examine_readonly (int fd)
{
  struct vr_epoch_page *copy = calloc (1, VR_EPOCH_FILE_SIZE);
  int r;

  if (!copy)
    return -ENOMEM;
  r = lock_setup (fd, F_RDLCK);
  if (r == 0) {
    r = examine (fd, copy);
    unlock_setup (fd);
  }
  free (copy);
  return r == 1 ? -EBADMSG : r;
}

int
vr_epoch_open_readonly (const char *path, struct vr_epoch **ret)
{
  int fd, r;

  fd = open (path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  if (fd < 0)
    return -errno;
  r = examine_readonly (fd);
  if (r == 0)
    r = new_handle (fd, true, ret);
  if (r < 0)
    close (fd);
  return r;
}

void
vr_epoch_close (struct vr_epoch *e)
{
  uint32_t slots;

  if (!e)
    return;
  slots = atomic_load_explicit (&e->slots, memory_order_relaxed);
  for (unsigned i = 0; i < VR_EPOCH_MEMBERS; i++)
    if (slots & (1u << i))
      atomic_store_explicit (&e->page->member[i].state, VR_STATE_OFFLINE,
                             memory_order_relaxed);
  pthread_mutex_destroy (&e->mutex);
  munmap (e->page, VR_EPOCH_FILE_SIZE);
  if (e->fd >= 0)
    close (e->fd);
  free (e);
}

struct vr_epoch_page *
vr_epoch_page (struct vr_epoch *e)
{
  return e->page;
}

/* The counter.  */

/* Whoever sees the new word in vr_epoch_word (acquire) sees what was stored
   before this (release). */
static void
bump (struct vr_epoch *e, unsigned what)
{
  atomic_fetch_add_explicit (&e->page->word, 1, memory_order_release);
  syscall (SYS_futex, &e->page->word, FUTEX_WAKE_BITSET, INT32_MAX, NULL,
           NULL, what);
}

/* False if it was at least n already.  The release pairs with the acquire of
   whoever reads the counter. */
static bool
raise_to (_Atomic uint64_t *counter, uint64_t n)
{
  uint64_t old = atomic_load_explicit (counter, memory_order_relaxed);

  while (old < n)
    if (atomic_compare_exchange_weak_explicit (
          counter, &old, n, memory_order_release, memory_order_relaxed))
      return true;
  return false;
}

uint64_t
vr_epoch_current (struct vr_epoch *e)
{
  /* Pairs with the release in vr_epoch_cut and raise_to. */
  return atomic_load_explicit (&e->page->open_epoch, memory_order_acquire);
}

void
vr_epoch_raise (struct vr_epoch *e, uint64_t n)
{
  if (raise_to (&e->page->open_epoch, n))
    bump (e, VR_WAKE_CUT);
}

bool
vr_epoch_cut (struct vr_epoch *e, uint64_t n, uint64_t now_ns)
{
  struct vr_epoch_page *page = e->page;
  uint64_t expected = n;
  uint32_t was_dirty;

  if (atomic_load_explicit (&page->open_epoch, memory_order_relaxed) != n)
    return false;

  /* Clear first: who reads N+1 (acquire, vr_epoch_current) from the exchange
     below (release) must see dirty as it is from here on.  Cleared later, the
     mark of a write of N+1 could be lost.  A write of N that marks in between
     costs an empty epoch, no more. */
  was_dirty = atomic_exchange_explicit (&page->dirty, 0, memory_order_relaxed);
  if (!atomic_compare_exchange_strong_explicit (&page->open_epoch, &expected,
                                                n + 1, memory_order_release,
                                                memory_order_relaxed)) {
    if (was_dirty)
      vr_epoch_mark_dirty (e);
    return false;
  }
  atomic_store_explicit (&page->cut_time_ns, now_ns, memory_order_relaxed);
  bump (e, VR_WAKE_CUT);
  return true;
}

void
vr_epoch_raise_generation (struct vr_epoch *e, uint64_t n)
{
  raise_to (&e->page->generation, n);
}

void
vr_epoch_request_cut (struct vr_epoch *e, uint64_t n)
{
  if (raise_to (&e->page->cut_request, n))
    bump (e, VR_WAKE_REQUEST);
}

void
vr_epoch_mark_dirty (struct vr_epoch *e)
{
  /* Relaxed will do: see vr_epoch_cut for what orders it. */
  if (atomic_load_explicit (&e->page->dirty, memory_order_relaxed) == 0)
    atomic_store_explicit (&e->page->dirty, 1, memory_order_relaxed);
}

void
vr_epoch_set_committed (struct vr_epoch *e, uint64_t n)
{
  if (raise_to (&e->page->committed_epoch, n))
    bump (e, VR_WAKE_COMMIT);
}

uint32_t
vr_epoch_word (struct vr_epoch *e)
{
  /* Pairs with the release in bump. */
  return atomic_load_explicit (&e->page->word, memory_order_acquire);
}

void
vr_epoch_wait (struct vr_epoch *e, uint32_t seen, uint64_t timeout_ns,
               unsigned what)
{
  struct timespec until;
  uint64_t ns;

  clock_gettime (CLOCK_MONOTONIC, &until);
  ns = (uint64_t) until.tv_nsec + timeout_ns % NS_PER_S;
  until.tv_sec += (time_t) (timeout_ns / NS_PER_S + ns / NS_PER_S);
  until.tv_nsec = (long) (ns % NS_PER_S);

  while (vr_epoch_word (e) == seen) {
    /* The BITSET variant takes an absolute time (CLOCK_MONOTONIC). */
    long r = syscall (SYS_futex, &e->page->word, FUTEX_WAIT_BITSET, seen,
                      &until, NULL, what);

    if (r < 0 && errno != EINTR && errno != EAGAIN)
      break;
  }
}

/* The clock and the members.  */

static bool
take_clock (struct vr_epoch *e)
{
  if (own_byte (e, VR_EPOCH_LOCK_CLOCK) < 0)
    return false;
  atomic_store_explicit (&e->page->clock_start, own_start_time (),
                         memory_order_relaxed);
  atomic_store_explicit (&e->page->clock_pid, (uint32_t) getpid (),
                         memory_order_relaxed);
  /* It never goes back to false, and nothing else depends on it. */
  atomic_store_explicit (&e->is_clock, true, memory_order_relaxed);
  return true;
}

bool
vr_epoch_try_clock (struct vr_epoch *e)
{
  bool taken;

  if (e->readonly)
    return false;
  if (atomic_load_explicit (&e->is_clock, memory_order_relaxed))
    return true;
  pthread_mutex_lock (&e->mutex);
  taken = take_clock (e);
  pthread_mutex_unlock (&e->mutex);
  return taken;
}

/* The slot of that name, or else a free one. */
static int
find_slot (struct vr_epoch_page *page, const char *name)
{
  int free_slot = -ENOSPC;

  for (int i = 0; i < VR_EPOCH_MEMBERS; i++) {
    struct vr_member *m = &page->member[i];

    /* Pairs with the release in fill_slot: the name is whole. */
    if (atomic_load_explicit (&m->kind, memory_order_acquire) ==
        VR_MEMBER_FREE) {
      if (free_slot < 0)
        free_slot = i;
    } else if (strncmp (m->name, name, VR_NAME_SIZE) == 0)
      return i;
  }
  return free_slot;
}

/* What the last owner counted may be more than its journal still holds. */
static void
reset_counters (struct vr_member *m)
{
  _Atomic uint64_t *const counter[] = {
    &m->sealed_epoch,  &m->committed_epoch, &m->head_lsn,
    &m->durable_lsn,   &m->shipped_lsn,     &m->committed_lsn,
    &m->applied_lsn,   &m->written_bytes,   &m->commits,
    &m->commit_ns,     &m->commit_time_ns,  &m->copied_bytes,
    &m->copy_bytes,    &m->capacity,        &m->reconnects,
    &m->oldest_open_ns, &m->used_bytes,     &m->uncommitted,
  };

  for (size_t i = 0; i < sizeof counter / sizeof counter[0]; i++)
    atomic_store_explicit (counter[i], 0, memory_order_relaxed);
}

static void
fill_slot (struct vr_member *m, const char *name, enum vr_member_kind kind)
{
  reset_counters (m);
  atomic_store_explicit (&m->state, VR_STATE_OFFLINE, memory_order_relaxed);
  atomic_store_explicit (&m->start, own_start_time (), memory_order_relaxed);
  atomic_store_explicit (&m->pid, (uint32_t) getpid (), memory_order_relaxed);
  if (atomic_load_explicit (&m->kind, memory_order_relaxed) ==
      VR_MEMBER_FREE) {
    memset (m->name, 0, sizeof m->name);
    memcpy (m->name, name, strlen (name));
  }
  /* Pairs with the acquire of whoever reads kind before the name. */
  atomic_store_explicit (&m->kind, (uint32_t) kind, memory_order_release);
}

/* Under the setup lock, so that a name gets one slot. */
static int
join (struct vr_epoch *e, const char *name, enum vr_member_kind kind,
      struct vr_member **ret)
{
  int r, slot = find_slot (e->page, name);
  uint32_t bit;

  if (slot < 0)
    return slot;
  bit = 1u << slot;
  if (atomic_load_explicit (&e->slots, memory_order_relaxed) & bit)
    return -EBUSY;
  r = own_byte (e, VR_EPOCH_LOCK_MEMBER + (unsigned) slot);
  if (r < 0)
    return r == -EAGAIN ? -EBUSY : r;
  atomic_fetch_or_explicit (&e->slots, bit, memory_order_relaxed);
  fill_slot (&e->page->member[slot], name, kind);
  *ret = &e->page->member[slot];
  return 0;
}

int
vr_epoch_join (struct vr_epoch *e, const char *name, enum vr_member_kind kind,
               struct vr_member **ret)
{
  int r;

  if (name[0] == '\0' || kind == VR_MEMBER_FREE)
    return -EINVAL;
  if (strlen (name) >= VR_NAME_SIZE)
    return -ENAMETOOLONG;
  if (e->readonly)
    return -EROFS;

  pthread_mutex_lock (&e->mutex);
  r = e->fd < 0 ? 0 : lock_setup (e->fd, F_WRLCK);
  if (r == 0) {
    r = join (e, name, kind, ret);
    if (e->fd >= 0)
      unlock_setup (e->fd);
  }
  pthread_mutex_unlock (&e->mutex);
  return r;
}

/* Does any process own this byte?  A query does not see locks of one's own. */
static bool
byte_is_owned (const struct vr_epoch *e, unsigned byte)
{
  struct flock f = {
    .l_type = F_WRLCK,
    .l_whence = SEEK_SET,
    .l_start = byte,
    .l_len = 1,
  };

  return e->fd >= 0 && fcntl (e->fd, F_OFD_GETLK, &f) == 0 &&
         f.l_type != F_UNLCK;
}

bool
vr_epoch_member_alive (struct vr_epoch *e, unsigned i)
{
  assert (i < VR_EPOCH_MEMBERS);
  return (atomic_load_explicit (&e->slots, memory_order_relaxed) &
          (1u << i)) != 0 ||
         byte_is_owned (e, VR_EPOCH_LOCK_MEMBER + i);
}

bool
vr_epoch_clock_alive (struct vr_epoch *e)
{
  return atomic_load_explicit (&e->is_clock, memory_order_relaxed) ||
         byte_is_owned (e, VR_EPOCH_LOCK_CLOCK);
}

void
vr_epoch_forked (struct vr_epoch *e, struct vr_member *slot)
{
  struct vr_epoch_page *page = e->page;
  uint32_t parent = atomic_load (&slot->pid);

  atomic_store (&slot->pid, (uint32_t) getpid ());
  atomic_store (&slot->start, own_start_time ());
  if (atomic_load (&page->clock_pid) == parent) {
    atomic_store (&page->clock_pid, (uint32_t) getpid ());
    atomic_store (&page->clock_start, own_start_time ());
  }
}

int
vr_epoch_page_check (const struct vr_epoch_page *page)
{
  return validate (page, VR_EPOCH_FILE_SIZE);
}

uint64_t
vr_epoch_page_checksum (const struct vr_epoch_page *page)
{
  struct vr_epoch_page copy;

  memcpy (&copy, page, sizeof copy);
  copy.checksum = 0;
  return XXH3_64bits (&copy, sizeof copy);
}
