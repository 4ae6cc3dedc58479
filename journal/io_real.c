/* SPDX-License-Identifier: BSD-3-Clause */
/* The real environment: POSIX calls, and io_uring where it was measured to
 * pay.
 *
 * Microseconds per element of a batch, wall clock (and CPU), lowest and
 * highest median of three runs; ext4 on virtio-blk, Linux 6.18, 2 CPUs shared
 * with other work, a preallocated 1 GiB file, liburing 2.3:
 *
 *   element           batch      plain calls             io_uring
 *   4 KiB buffered       32   12-15                  18-37
 *   4 KiB buffered      128   12-14                  26-31
 *   4 KiB buffered      512   11-13                  20-30
 *   4 KiB direct         32   58-72    (16-17)       13-18    (1.6-1.9)
 *   4 KiB direct        128   48-58    (18-24)       13-16    (1.4-1.7)
 *   4 KiB direct        512   57-59    (20-22)       10-15    (1.3-1.8)
 *   1 MiB direct          2   274-464  (29-82)       306-309  (25-27)
 *   1 MiB direct          4   287-432  (29-57)       311-338  (18-34)
 *   1 MiB direct         16   311-464  (34-80)       330-343  (12-20)
 *
 * Buffered writes are a copy into the page cache and io_uring only adds to
 * it.  Direct ones overlap in the device.  So a batch goes through io_uring
 * exactly when the file is direct and there is more than one element.
 */
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <liburing.h>

#include "journal/io.h"

#define BLOCK 4096u      /* alignment that every device and O_DIRECT takes */
#define SECTOR 512u      /* smallest unit of O_DIRECT */
#define RING_ENTRIES 128 /* writes in flight per thread */
#define RING_POOL 8      /* idle rings kept; more are made and closed again */

struct real_file {
  struct vr_file file;
  int fd;
  bool is_device; /* a block device, else a regular file */
  bool direct;    /* O_DIRECT is on */
};

/* Idle rings.  A ring is created when first needed, by the process that uses
   it: a server forks after it has opened its files. */
static struct {
  pthread_mutex_t mutex;
  pid_t pid;        /* the process that created the rings */
  bool unavailable; /* the kernel or a sandbox refuses io_uring */
  size_t count;
  struct io_uring *ring[RING_POOL];
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static inline struct real_file *
real (struct vr_file *f)
{
  return (struct real_file *)f;
}

static inline int
real_fd (struct vr_file *f)
{
  return real (f)->fd;
}

static inline uint64_t
min_u64 (uint64_t a, uint64_t b)
{
  return a < b ? a : b;
}

/* ---- Open, size --------------------------------------------------------- */

static int
type_error (mode_t mode)
{
  if (S_ISREG (mode) || S_ISBLK (mode))
    return 0;
  return S_ISDIR (mode) ? -EISDIR : -EINVAL;
}

/* Open and check the type.  stat comes first because opening alone can have
   effects (a watchdog, a tape), fstat after because the name may have changed
   meanwhile; O_NONBLOCK keeps a FIFO that got there from blocking us. */
static int
open_checked (const char *path, int flags, int *ret_fd, mode_t *ret_mode)
{
  const int access = flags & VR_OPEN_READ_ONLY ? O_RDONLY : O_RDWR;
  const int create = flags & VR_OPEN_CREATE ? O_CREAT | O_EXCL : 0;
  struct stat st;
  int fd, r;

  if (!create && stat (path, &st) == 0 && (r = type_error (st.st_mode)) < 0)
    return r;

  do
    fd = open (path, access | create | O_NONBLOCK | O_CLOEXEC, 0600);
  while (fd == -1 && errno == EINTR);
  if (fd == -1)
    return -errno;

  r = fstat (fd, &st) == -1 ? -errno : type_error (st.st_mode);
  if (r < 0) {
    close (fd);
    return r;
  }
  *ret_fd = fd;
  *ret_mode = st.st_mode;
  return 0;
}

/* Clear O_NONBLOCK and, if wanted, try O_DIRECT.  Not at open: there a file
   system that refuses O_DIRECT fails after it has created the file. */
static int
set_status_flags (int fd, bool want_direct, bool *ret_direct)
{
  int flags = fcntl (fd, F_GETFL);

  if (flags == -1)
    return -errno;
  flags &= ~O_NONBLOCK;
  *ret_direct = want_direct && fcntl (fd, F_SETFL, flags | O_DIRECT) == 0;
  if (!*ret_direct && fcntl (fd, F_SETFL, flags) == -1)
    return -errno;
  return 0;
}

static int
real_open (struct vr_io *io, const char *path, int flags,
           struct vr_file **ret_file)
{
  struct real_file *f = calloc (1, sizeof *f);
  mode_t mode;
  int r;

  if (f == NULL)
    return -ENOMEM;
  r = open_checked (path, flags, &f->fd, &mode);
  if (r < 0)
    goto err_free;
  r = set_status_flags (f->fd, flags & VR_OPEN_DIRECT, &f->direct);
  if (r < 0)
    goto err_close;

  f->file.io = io;
  f->is_device = S_ISBLK (mode);
  *ret_file = &f->file;
  return 0;

err_close:
  close (f->fd);
err_free:
  free (f);
  return r;
}

static void
real_close (struct vr_file *f)
{
  /* Durability was asked for by sync or not at all; an error here has no
     one to act on it. */
  close (real_fd (f));
  free (f);
}

static int
real_size (struct vr_file *f, uint64_t *ret_size)
{
  struct stat st;

  if (real (f)->is_device)
    return ioctl (real_fd (f), BLKGETSIZE64, ret_size) == -1 ? -errno : 0;
  if (fstat (real_fd (f), &st) == -1)
    return -errno;
  *ret_size = (uint64_t)st.st_size;
  return 0;
}

static int
real_truncate (struct vr_file *f, uint64_t size)
{
  int r;

  if (size > INT64_MAX)
    return -EFBIG;
  do
    r = ftruncate (real_fd (f), (off_t)size);
  while (r == -1 && errno == EINTR);
  return r == -1 ? -errno : 0;
}

/* ---- Read and write ----------------------------------------------------- */

static int
real_read (struct vr_file *f, void *buf, size_t n, uint64_t offset)
{
  char *p = buf;

  while (n > 0) {
    const ssize_t r = pread (real_fd (f), p, n, (off_t)offset);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -errno;
    /* Direct reads are short by less than a sector only at the end; asking
       again from there would be misaligned. */
    if (r == 0 || ((size_t)r < n && real (f)->direct && r % SECTOR != 0))
      return -ENODATA;
    p += r;
    n -= (size_t)r;
    offset += (uint64_t)r;
  }
  return 0;
}

static int
write_all (int fd, const void *buf, size_t n, uint64_t offset)
{
  const char *p = buf;

  while (n > 0) {
    const ssize_t r = pwrite (fd, p, n, (off_t)offset);

    if (r == -1 && errno == EINTR)
      continue;
    if (r <= 0)
      return r == -1 ? -errno : -EIO;
    p += r;
    n -= (size_t)r;
    offset += (uint64_t)r;
  }
  return 0;
}

/* Write the vector from its byte `skip` on; what comes before is written. */
static int
write_rest (int fd, const struct iovec *iov, int iov_count, uint64_t offset,
            size_t skip)
{
  while (iov_count > 0) {
    const size_t len = iov->iov_len;
    ssize_t written;

    /* Elements done, and the one a short write ended in. */
    if (skip > 0 || len == 0) {
      if (skip < len) {
        const int r = write_all (fd, (const char *)iov->iov_base + skip,
                                 len - skip, offset + skip);
        if (r < 0)
          return r;
      }
      skip -= skip < len ? skip : len;
      offset += len;
      iov++;
      iov_count--;
      continue;
    }

    written = pwritev (fd, iov, iov_count < IOV_MAX ? iov_count : IOV_MAX,
                       (off_t)offset);
    if (written == -1 && errno == EINTR)
      continue;
    if (written <= 0)
      return written == -1 ? -errno : -EIO;
    skip = (size_t)written;
  }
  return 0;
}

static int
real_writev (struct vr_file *f, const struct iovec *iov, int iov_count,
             uint64_t offset)
{
  return write_rest (real_fd (f), iov, iov_count, offset, 0);
}

/* ---- Batches ------------------------------------------------------------ */

static int
write_batch_plain (int fd, const struct vr_io_write *w, size_t n)
{
  for (size_t i = 0; i < n; i++) {
    const int r = write_rest (fd, w[i].iov, w[i].iov_count, w[i].offset, 0);

    if (r < 0)
      return r;
  }
  return 0;
}

static void
ring_free (struct io_uring *ring)
{
  io_uring_queue_exit (ring);
  free (ring);
}

/* A new ring, or NULL if there can be none. */
static struct io_uring *
ring_new (void)
{
  struct io_uring *ring = malloc (sizeof *ring);
  int r;

  if (ring == NULL)
    return NULL;
  r = io_uring_queue_init (RING_ENTRIES, ring, 0);
  if (r == 0)
    return ring;
  free (ring);
  if (r == -ENOSYS || r == -EPERM) {
    pthread_mutex_lock (&pool.mutex);
    pool.unavailable = true;
    pthread_mutex_unlock (&pool.mutex);
  }
  return NULL;
}

/* Take a ring for this thread alone; NULL: use plain calls. */
static struct io_uring *
ring_get (void)
{
  const pid_t pid = getpid ();
  struct io_uring *ring = NULL;
  bool unavailable;

  pthread_mutex_lock (&pool.mutex);
  if (pool.pid != pid) {
    /* We are the child of a fork: the parent may go on using those. */
    while (pool.count > 0)
      ring_free (pool.ring[--pool.count]);
    pool.pid = pid;
  }
  if (pool.count > 0)
    ring = pool.ring[--pool.count];
  unavailable = pool.unavailable;
  pthread_mutex_unlock (&pool.mutex);

  if (ring == NULL && !unavailable)
    ring = ring_new ();
  return ring;
}

static void
ring_put (struct io_uring *ring)
{
  pthread_mutex_lock (&pool.mutex);
  if (pool.count < RING_POOL) {
    pool.ring[pool.count++] = ring;
    ring = NULL;
  }
  pthread_mutex_unlock (&pool.mutex);
  if (ring != NULL)
    ring_free (ring);
}

/* Queue and submit n <= RING_ENTRIES writes; returns how many the kernel
   took, always the first ones. */
static size_t
ring_submit (struct io_uring *ring, int fd, const struct vr_io_write *w,
             size_t n)
{
  size_t taken = 0;

  for (size_t i = 0; i < n; i++) {
    struct io_uring_sqe *sqe = io_uring_get_sqe (ring);

    assert (sqe != NULL); /* the ring was empty */
    io_uring_prep_writev (sqe, fd, w[i].iov, (unsigned)w[i].iov_count,
                          w[i].offset);
    io_uring_sqe_set_data64 (sqe, i);
  }
  while (taken < n) {
    const int r = io_uring_submit_and_wait (ring, (unsigned)(n - taken));

    if (r == -EINTR)
      continue;
    if (r <= 0)
      break;
    taken += (size_t)r;
  }
  return taken;
}

/* Wait for one completion and finish its write: short ones, and those the
   kernel wants repeated, by plain calls. */
static int
ring_reap (struct io_uring *ring, int fd, const struct vr_io_write *w)
{
  struct io_uring_cqe *cqe;
  int r, res;

  do
    r = io_uring_wait_cqe (ring, &cqe);
  while (r == -EINTR);
  if (r < 0)
    abort (); /* the kernel still reads the caller's buffers: no way back */

  res = cqe->res;
  w += io_uring_cqe_get_data64 (cqe);
  io_uring_cqe_seen (ring, cqe);
  if (res == -EINTR || res == -EAGAIN)
    res = 0;
  if (res < 0)
    return res;
  return write_rest (fd, w->iov, w->iov_count, w->offset, (size_t)res);
}

/* Write n <= RING_ENTRIES elements.  Sets *ret_broken if the ring cannot be
   used again. */
static int
ring_write (struct io_uring *ring, int fd, const struct vr_io_write *w,
            size_t n, bool *ret_broken)
{
  const size_t taken = ring_submit (ring, fd, w, n);
  int result = 0;

  /* Also after an error: no write may be in flight when we return. */
  for (size_t i = 0; i < taken; i++) {
    const int r = ring_reap (ring, fd, w);

    if (result == 0)
      result = r;
  }
  *ret_broken = taken < n;
  return result < 0 ? result : write_batch_plain (fd, w + taken, n - taken);
}

/* io_uring refuses vectors longer than IOV_MAX. */
static bool
suits_ring (const struct vr_io_write *w, size_t n)
{
  for (size_t i = 0; i < n; i++)
    if (w[i].iov_count > IOV_MAX)
      return false;
  return n > 1;
}

static int
real_write_batch (struct vr_file *f, const struct vr_io_write *w, size_t n)
{
  struct io_uring *ring = NULL;
  bool broken = false;
  int r = 0;

  if (real (f)->direct && suits_ring (w, n))
    ring = ring_get ();
  if (ring == NULL)
    return write_batch_plain (real_fd (f), w, n);

  while (n > 0 && r == 0 && !broken) {
    const size_t m = n < RING_ENTRIES ? n : RING_ENTRIES;

    r = ring_write (ring, real_fd (f), w, m, &broken);
    w += m;
    n -= m;
  }
  if (broken)
    ring_free (ring);
  else
    ring_put (ring);
  return r < 0 ? r : write_batch_plain (real_fd (f), w, n);
}

/* ---- Zero --------------------------------------------------------------- */

static int
write_zeros (int fd, uint64_t offset, uint64_t end)
{
  static alignas (BLOCK) const uint8_t zeros[64 * 1024];

  while (offset < end) {
    const size_t n = (size_t)min_u64 (end - offset, sizeof zeros);
    const int r = write_all (fd, zeros, n, offset);

    if (r < 0)
      return r;
    offset += n;
  }
  return 0;
}

static int
try_fallocate (int fd, int mode, uint64_t offset, uint64_t end)
{
  int r;

  do
    r = fallocate (fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                   (off_t)(end - offset));
  while (r == -1 && errno == EINTR);
  if (r == 0)
    return 0;
  return errno == ENOSYS ? -EOPNOTSUPP : -errno;
}

/* Zero what of the range lies within the file; bytes past its end may be
   left missing. */
static int
zero_inside (int fd, uint64_t offset, uint64_t end, bool may_deallocate)
{
  int r = -EOPNOTSUPP;

  if (may_deallocate)
    r = try_fallocate (fd, FALLOC_FL_PUNCH_HOLE, offset, end);
  if (r == -EOPNOTSUPP)
    r = try_fallocate (fd, FALLOC_FL_ZERO_RANGE, offset, end);
  if (r == -EOPNOTSUPP)
    r = write_zeros (fd, offset, end);
  return r;
}

/* Devices take whole blocks only; the edges are written. */
static int
zero_device (int fd, uint64_t offset, uint64_t end, bool may_deallocate)
{
  const uint64_t first = (offset + BLOCK - 1) / BLOCK * BLOCK;
  const uint64_t last = end / BLOCK * BLOCK;
  int r;

  if (first >= last)
    return write_zeros (fd, offset, end);
  r = write_zeros (fd, offset, first);
  if (r == 0)
    r = zero_inside (fd, first, last, may_deallocate);
  if (r == 0)
    r = write_zeros (fd, last, end);
  return r;
}

static int
real_zero (struct vr_file *f, uint64_t offset, uint64_t length,
           bool may_deallocate)
{
  const uint64_t end = offset + length;
  uint64_t size, tail;
  int r;

  if (end < offset || end > INT64_MAX)
    return -EFBIG;
  if (length == 0)
    return 0;
  r = real_size (f, &size);
  if (r < 0)
    return r;
  if (real (f)->is_device)
    return end > size ? -ENOSPC
                      : zero_device (real_fd (f), offset, end, may_deallocate);

  r = zero_inside (real_fd (f), offset, end, may_deallocate);
  if (r < 0 || end <= size)
    return r;
  /* Grow by writing the last block: unlike ftruncate this cannot cut off
     what another thread appends meanwhile. */
  tail = length < BLOCK ? offset : end - BLOCK;
  return write_zeros (real_fd (f), tail, end);
}

/* ---- Sync, hints, holes ------------------------------------------------- */

static int
real_sync (struct vr_file *f)
{
  /* Not repeated on EINTR either: after any failure nothing is known. */
  return fdatasync (real_fd (f)) == -1 ? -errno : 0;
}

static void
real_start_writeback (struct vr_file *f, uint64_t offset, uint64_t length)
{
  (void)sync_file_range (real_fd (f), (off64_t)offset, (off64_t)length,
                         SYNC_FILE_RANGE_WRITE);
}

static int
real_prefetch (struct vr_file *f, uint64_t offset, uint64_t length)
{
  return -posix_fadvise (real_fd (f), (off_t)offset, (off_t)length,
                         POSIX_FADV_WILLNEED);
}

static int
real_next_data (struct vr_file *f, uint64_t offset, uint64_t *ret_start,
                uint64_t *ret_end)
{
  uint64_t size;
  off_t start, end;
  int r = real_size (f, &size);

  if (r < 0)
    return r;
  *ret_start = *ret_end = size;
  if (offset >= size)
    return 0;

  start = lseek (real_fd (f), (off_t)offset, SEEK_DATA);
  if (start == -1 && errno == ENXIO)
    return 0;
  if (start == -1 && (errno == EINVAL || errno == EOPNOTSUPP)) {
    *ret_start = offset;
    return 0;
  }
  if (start == -1)
    return -errno;
  end = lseek (real_fd (f), start, SEEK_HOLE);
  if (end == -1)
    return -errno;
  /* Never past the size read before, even if the file grows. */
  *ret_start = min_u64 ((uint64_t)start, size);
  *ret_end = min_u64 ((uint64_t)end, size);
  return 0;
}

/* ---- Lock --------------------------------------------------------------- */

static bool
is_number (const char *s)
{
  return isdigit ((unsigned char)*s);
}

/* Whether one /proc/PID/fdinfo file lists a lock on the inode `key`. */
static bool
fdinfo_has_lock (int dir_fd, const char *name, const char *key)
{
  const int fd = openat (dir_fd, name, O_RDONLY | O_CLOEXEC);
  FILE *fp = fd == -1 ? NULL : fdopen (fd, "r");
  char line[256];
  bool found = false;

  if (fp == NULL) {
    if (fd != -1)
      close (fd);
    return false;
  }
  while (!found && fgets (line, sizeof line, fp) != NULL)
    found = strncmp (line, "lock:", 5) == 0 && strstr (line, key) != NULL;
  fclose (fp);
  return found;
}

static bool
process_has_lock (const char *pid, const char *key)
{
  char path[64];
  const struct dirent *entry;
  bool found = false;
  DIR *dir;

  if (snprintf (path, sizeof path, "/proc/%.20s/fdinfo", pid) < 0)
    return false;
  dir = opendir (path);
  if (dir == NULL)
    return false; /* gone, or not ours to look at */
  while (!found && (entry = readdir (dir)) != NULL)
    found = is_number (entry->d_name) &&
            fdinfo_has_lock (dirfd (dir), entry->d_name, key);
  closedir (dir);
  return found;
}

/* Who holds an OFD lock on the file of fd, 0 if unknown.  The kernel names
   no owner for these (F_OFD_GETLK and /proc/locks give -1), but each
   process's fdinfo lists the locks held through its descriptors. */
static int
find_lock_owner (int fd)
{
  char key[64];
  struct stat st;
  const struct dirent *entry;
  int pid = 0;
  DIR *dir;

  if (fstat (fd, &st) == -1 ||
      snprintf (key, sizeof key, " %02x:%02x:%ju ", major (st.st_dev),
                minor (st.st_dev), (uintmax_t)st.st_ino) < 0)
    return 0;
  dir = opendir ("/proc");
  if (dir == NULL)
    return 0;
  while (pid == 0 && (entry = readdir (dir)) != NULL)
    if (is_number (entry->d_name) && process_has_lock (entry->d_name, key))
      pid = atoi (entry->d_name);
  closedir (dir);
  return pid;
}

#define LOCK_RETRIES 300
#define LOCK_RETRY_US 10000

static int
try_lock (struct vr_file *f, struct vr_lock_owner *ret_owner)
{
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

  if (fcntl (real_fd (f), F_OFD_SETLK, &lock) == 0)
    return 0;
  if (errno != EAGAIN && errno != EACCES)
    return -errno;

  ret_owner->pid = 0;
  if (fcntl (real_fd (f), F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK)
    ret_owner->pid =
      lock.l_pid > 0 ? lock.l_pid : find_lock_owner (real_fd (f));
  return -EAGAIN;
}

/* A process that was killed with requests in its io_uring is gone before
   they are: the kernel holds the file, and so the lock, until the last one is
   done.  Nobody is seen to have the lock then; it is worth waiting. */
static int
real_lock (struct vr_file *f, struct vr_lock_owner *ret_owner)
{
  int err = try_lock (f, ret_owner);

  for (int i = 0; i < LOCK_RETRIES && err == -EAGAIN && ret_owner->pid == 0;
       i++) {
    usleep (LOCK_RETRY_US);
    err = try_lock (f, ret_owner);
  }
  return err;
}

/* ---- Names, clocks, randomness ------------------------------------------ */

static int
real_rename (struct vr_io *io, const char *from, const char *to)
{
  (void)io;
  return rename (from, to) == -1 ? -errno : 0;
}

static int
real_unlink (struct vr_io *io, const char *path)
{
  (void)io;
  return unlink (path) == -1 ? -errno : 0;
}

static int
real_mkdir (struct vr_io *io, const char *path)
{
  struct stat st;

  (void)io;
  if (mkdir (path, 0700) == 0)
    return 0;
  if (errno != EEXIST)
    return -errno;
  return stat (path, &st) == 0 && S_ISDIR (st.st_mode) ? 0 : -EEXIST;
}

static int
real_sync_dir (struct vr_io *io, const char *path)
{
  const int fd = open (path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int r;

  (void)io;
  if (fd == -1)
    return -errno;
  r = fsync (fd) == -1 ? -errno : 0;
  close (fd);
  return r;
}

static uint64_t
clock_ns (clockid_t id)
{
  struct timespec ts;

  clock_gettime (id, &ts); /* cannot fail for these clocks */
  return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static uint64_t
real_now_ns (struct vr_io *io)
{
  (void)io;
  return clock_ns (CLOCK_BOOTTIME);
}

static uint64_t
real_realtime_ns (struct vr_io *io)
{
  (void)io;
  return clock_ns (CLOCK_REALTIME);
}

static int
real_random (struct vr_io *io, void *buf, size_t n)
{
  char *p = buf;

  (void)io;
  while (n > 0) {
    const ssize_t r = getrandom (p, n, 0);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -errno;
    p += r;
    n -= (size_t)r;
  }
  return 0;
}

static const struct vr_io_ops real_ops = {
  .open = real_open,
  .close = real_close,
  .size = real_size,
  .truncate = real_truncate,
  .read = real_read,
  .writev = real_writev,
  .write_batch = real_write_batch,
  .zero = real_zero,
  .sync = real_sync,
  .start_writeback = real_start_writeback,
  .prefetch = real_prefetch,
  .next_data = real_next_data,
  .lock = real_lock,
  .rename = real_rename,
  .unlink = real_unlink,
  .mkdir = real_mkdir,
  .sync_dir = real_sync_dir,
  .now_ns = real_now_ns,
  .realtime_ns = real_realtime_ns,
  .random = real_random,
};

static struct vr_io real_io = {.ops = &real_ops};

struct vr_io *
vr_io_real (void)
{
  return &real_io;
}
