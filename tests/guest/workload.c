/* SPDX-License-Identifier: BSD-3-Clause */
/* The workload of the test guest: a witness of what was made durable.
 *
 *   workload MODE COUNT RENAME-EVERY TRIM-EVERY DELAY-MS DIR...
 *
 * MODE is fresh, resume or check.  Each DIR is a file system on a disk of its
 * own.  Record n is appended to DIR/records of every DIR in the order given,
 * each time with fsync, and only then is "ACK n" printed.  So at any instant,
 * and on any set of disks cut at one moment, these hold:
 *
 *   - every DIR has all records up to the last ACK, intact and in order;
 *   - a DIR never has more records than the one before it, and the first at
 *     most one more than the last (disks that disagree on the epoch break it);
 *   - DIR/state is one whole version, no older than the last "REN n".
 *
 * What is printed, one line each, in one write:
 *
 *   START mode        RESUME n     last record that every DIR has
 *   ACK n             STATE n      version of the oldest DIR/state
 *   REN n             VERIFY ok    or VERIFY bad REASON
 *   TRIM bytes        DONE n       COUNT records were written
 *   ERROR what        a system call failed; the workload stops
 *
 * COUNT 0 means without end.  Exit status: 0 done, 1 error, 2 verify bad.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

enum {
  MAX_DISKS = 8,
  RECORD_WORDS = 8,    /* 64 bytes: magic, n, 5 filler words, checksum */
  STATE_WORDS = 4096,  /* 32 KiB: the same with more filler */
  BIG_BYTES = 4 << 20, /* the file that is deleted and trimmed */
  BIG_WORDS = 8192,
};

static const uint64_t record_magic = UINT64_C (0x3143455250524d56);
static const uint64_t state_magic = UINT64_C (0x3154415453524d56);

struct disk {
  const char *dir;
  int dir_fd;
  int log_fd;
  uint64_t records; /* intact ones, 1..records */
  uint64_t state;   /* version, 0 if there is none */
};

static struct disk disks[MAX_DISKS];
static size_t disk_count;

static void __attribute__ ((format (printf, 1, 2)))
say (const char *format, ...)
{
  char line[256];
  va_list args;
  int n;

  va_start (args, format);
  n = vsnprintf (line, sizeof line - 1, format, args);
  va_end (args);
  if (n < 0)
    return;
  if ((size_t) n > sizeof line - 2)
    n = sizeof line - 2;
  line[n] = '\n';
  /* A console that takes no more is not our subject. */
  if (write (STDOUT_FILENO, line, (size_t) n + 1) == -1)
    return;
}

static void __attribute__ ((noreturn))
die (const char *what, const char *dir)
{
  say ("ERROR %s %s: %s", what, dir, strerror (errno));
  exit (1);
}

static void __attribute__ ((noreturn, format (printf, 1, 2)))
bad (const char *format, ...)
{
  char reason[200];
  va_list args;

  va_start (args, format);
  vsnprintf (reason, sizeof reason, format, args);
  va_end (args);
  say ("VERIFY bad %s", reason);
  exit (2);
}

/* The finalizer of splitmix64: filler that is different in every word. */
static uint64_t
mix (uint64_t x)
{
  x += UINT64_C (0x9e3779b97f4a7c15);
  x = (x ^ (x >> 30)) * UINT64_C (0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C (0x94d049bb133111eb);
  return x ^ (x >> 31);
}

/* FNV-1a, by words. */
static uint64_t
checksum (const uint64_t *words, size_t count)
{
  uint64_t sum = UINT64_C (0xcbf29ce484222325);

  for (size_t i = 0; i < count; i++)
    sum = (sum ^ words[i]) * UINT64_C (0x100000001b3);
  return sum;
}

static void
fill (uint64_t *words, size_t count, uint64_t magic, uint64_t n)
{
  words[0] = magic;
  words[1] = n;
  for (size_t i = 2; i < count - 1; i++)
    words[i] = mix (n * count + i);
  words[count - 1] = checksum (words, count - 1);
}

static bool
is_intact (const uint64_t *words, size_t count, uint64_t magic)
{
  if (words[0] != magic ||
      words[count - 1] != checksum (words, count - 1))
    return false;
  for (size_t i = 2; i < count - 1; i++)
    if (words[i] != mix (words[1] * count + i))
      return false;
  return true;
}

static void
write_all (int fd, const void *buf, size_t size, const char *dir)
{
  const char *p = buf;

  while (size > 0) {
    const ssize_t n = write (fd, p, size);

    if (n == -1)
      die ("write", dir);
    p += n;
    size -= (size_t) n;
  }
}

/* Returns what there is, up to size bytes. */
static size_t
read_all (int fd, void *buf, size_t size, const char *dir)
{
  char *p = buf;
  size_t done = 0;

  while (done < size) {
    const ssize_t n = read (fd, p + done, size - done);

    if (n == -1)
      die ("read", dir);
    if (n == 0)
      break;
    done += (size_t) n;
  }
  return done;
}

/* Count the records that are intact and in order.  What follows the first
   that is not must be the torn tail of a crash: an intact record behind it
   means that one was lost or changed. */
static void
verify_records (struct disk *d)
{
  uint64_t record[RECORD_WORDS];
  uint64_t position = 0;
  bool in_order = true;

  d->records = 0;
  if (lseek (d->log_fd, 0, SEEK_SET) == -1)
    die ("lseek", d->dir);
  while (read_all (d->log_fd, record, sizeof record, d->dir) ==
         sizeof record) {
    const bool intact = is_intact (record, RECORD_WORDS, record_magic);

    position++;
    if (intact && record[1] != position)
      bad ("%s: record %" PRIu64 " in place of %" PRIu64, d->dir, record[1],
           position);
    if (intact && !in_order)
      bad ("%s: record %" PRIu64 " is damaged, a later one is not", d->dir,
           d->records + 1);
    if (intact)
      d->records = position;
    else
      in_order = false;
  }
}

static void
verify_state (struct disk *d)
{
  static uint64_t words[STATE_WORDS];
  const int fd = openat (d->dir_fd, "state", O_RDONLY | O_CLOEXEC);
  size_t size;

  d->state = 0;
  if (fd == -1) {
    if (errno == ENOENT)
      return;
    die ("open state", d->dir);
  }
  size = read_all (fd, words, sizeof words, d->dir);
  close (fd);
  if (size != sizeof words)
    bad ("%s: state has %zu bytes", d->dir, size);
  if (!is_intact (words, STATE_WORDS, state_magic))
    bad ("%s: state is damaged", d->dir);
  if (words[1] > d->records)
    bad ("%s: state %" PRIu64 " is newer than record %" PRIu64, d->dir,
         words[1], d->records);
  d->state = words[1];
}

/* Check all disks, each alone and against each other; returns the last record
   that all have. */
static uint64_t
verify (void)
{
  uint64_t common;
  uint64_t state = UINT64_MAX;

  for (size_t i = 0; i < disk_count; i++) {
    verify_records (&disks[i]);
    verify_state (&disks[i]);
    if (disks[i].state < state)
      state = disks[i].state;
    if (i > 0 && disks[i].records > disks[i - 1].records)
      bad ("%s has %" PRIu64 " records, %s before it %" PRIu64,
           disks[i].dir, disks[i].records, disks[i - 1].dir,
           disks[i - 1].records);
  }
  common = disks[disk_count - 1].records;
  if (disks[0].records > common + 1)
    bad ("%s has %" PRIu64 " records, %s %" PRIu64, disks[0].dir,
         disks[0].records, disks[disk_count - 1].dir, common);
  say ("RESUME %" PRIu64, common);
  say ("STATE %" PRIu64, state);
  say ("VERIFY ok");
  return common;
}

/* Cut off what is after the last common record, and go on behind it. */
static void
prepare_to_append (struct disk *d, uint64_t records)
{
  const off_t end = (off_t) (records * RECORD_WORDS * sizeof (uint64_t));

  if (ftruncate (d->log_fd, end) == -1)
    die ("ftruncate", d->dir);
  if (lseek (d->log_fd, end, SEEK_SET) == -1)
    die ("lseek", d->dir);
  if (unlinkat (d->dir_fd, "state.new", 0) == -1 && errno != ENOENT)
    die ("unlink state.new", d->dir);
  if (fsync (d->log_fd) == -1 || fsync (d->dir_fd) == -1)
    die ("fsync", d->dir);
}

static void
append_record (struct disk *d, uint64_t n)
{
  uint64_t record[RECORD_WORDS];

  fill (record, RECORD_WORDS, record_magic, n);
  write_all (d->log_fd, record, sizeof record, d->dir);
  if (fsync (d->log_fd) == -1)
    die ("fsync", d->dir);
}

static void
replace_state (struct disk *d, uint64_t n)
{
  static uint64_t words[STATE_WORDS];
  const int fd = openat (d->dir_fd, "state.new",
                         O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

  if (fd == -1)
    die ("open state.new", d->dir);
  fill (words, STATE_WORDS, state_magic, n);
  write_all (fd, words, sizeof words, d->dir);
  if (fsync (fd) == -1)
    die ("fsync state.new", d->dir);
  close (fd);
  if (renameat (d->dir_fd, "state.new", d->dir_fd, "state") == -1)
    die ("rename state", d->dir);
  if (fsync (d->dir_fd) == -1)
    die ("fsync", d->dir);
}

/* Delete the big file of the last time, trim its blocks, write a new one.
   Returns the bytes that the file system trimmed. */
static uint64_t
trim (struct disk *d, uint64_t n)
{
  static uint64_t words[BIG_WORDS];
  struct fstrim_range range = { .start = 0, .len = UINT64_MAX, .minlen = 0 };
  int fd;

  if (unlinkat (d->dir_fd, "big", 0) == -1 && errno != ENOENT)
    die ("unlink big", d->dir);
  /* ext4 trims a freed block only once its transaction has committed. */
  if (syncfs (d->dir_fd) == -1)
    die ("syncfs", d->dir);
  if (ioctl (d->dir_fd, FITRIM, &range) == -1) {
    if (errno != EOPNOTSUPP)
      die ("FITRIM", d->dir);
    range.len = 0;
  }

  fd = openat (d->dir_fd, "big", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC,
               0644);
  if (fd == -1)
    die ("open big", d->dir);
  for (size_t i = 0; i < BIG_BYTES / sizeof words; i++) {
    fill (words, BIG_WORDS, state_magic, n + i);
    write_all (fd, words, sizeof words, d->dir);
  }
  close (fd);
  return range.len;
}

static void
step (uint64_t n, uint64_t rename_every, uint64_t trim_every)
{
  for (size_t i = 0; i < disk_count; i++)
    append_record (&disks[i], n);
  say ("ACK %" PRIu64, n);

  if (rename_every > 0 && n % rename_every == 0) {
    for (size_t i = 0; i < disk_count; i++)
      replace_state (&disks[i], n);
    say ("REN %" PRIu64, n);
  }
  if (trim_every > 0 && n % trim_every == 0) {
    uint64_t bytes = 0;

    for (size_t i = 0; i < disk_count; i++)
      bytes += trim (&disks[i], n);
    say ("TRIM %" PRIu64, bytes);
  }
}

static void
open_disk (struct disk *d, const char *dir)
{
  d->dir = dir;
  d->dir_fd = open (dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (d->dir_fd == -1)
    die ("open", dir);
  d->log_fd = openat (d->dir_fd, "records", O_RDWR | O_CREAT | O_CLOEXEC,
                      0644);
  if (d->log_fd == -1)
    die ("open records", dir);
}

/* A plain newline at the end of a line, whatever the terminal prefers. */
static void
make_console_plain (void)
{
  struct termios t;

  if (tcgetattr (STDOUT_FILENO, &t) == 0) {
    t.c_oflag &= ~(tcflag_t) OPOST;
    tcsetattr (STDOUT_FILENO, TCSANOW, &t);
  }
}

int
main (int argc, char *argv[])
{
  uint64_t count, rename_every, trim_every, n;
  struct timespec delay;
  long delay_ms;
  const char *mode;

  if (argc < 7 || argc - 6 > MAX_DISKS) {
    fprintf (stderr, "usage: workload fresh|resume|check COUNT RENAME-EVERY "
                     "TRIM-EVERY DELAY-MS DIR...\n");
    return 1;
  }
  mode = argv[1];
  count = strtoull (argv[2], NULL, 10);
  rename_every = strtoull (argv[3], NULL, 10);
  trim_every = strtoull (argv[4], NULL, 10);
  delay_ms = strtol (argv[5], NULL, 10);
  delay.tv_sec = delay_ms / 1000;
  delay.tv_nsec = delay_ms % 1000 * 1000000;

  make_console_plain ();
  say ("START %s", mode);
  for (int i = 6; i < argc; i++)
    open_disk (&disks[disk_count++], argv[i]);

  n = 0;
  if (strcmp (mode, "fresh") != 0)
    n = verify ();
  if (strcmp (mode, "check") == 0)
    return 0;
  for (size_t i = 0; i < disk_count; i++)
    prepare_to_append (&disks[i], n);

  for (uint64_t done = 0; count == 0 || done < count; done++) {
    step (++n, rename_every, trim_every);
    if (delay_ms > 0)
      nanosleep (&delay, NULL);
  }
  say ("DONE %" PRIu64, n);
  return 0;
}
